"""Small prepared datasets written directly, without a tokenizer."""

import numpy as np
import pytest

from engine.data.dataset import DatasetWriter, TokenDataset


@pytest.fixture
def write_dataset(tmp_path):
    """write_dataset(documents, kind=..., trained=..., ...) -> TokenDataset; ids are taken as they are."""
    made = []

    def write(documents, kind="text", trained=None, prompts=None, vocab_size=60000, tokenizer="stub", shard_tokens=2**20):
        folder = tmp_path / f"written-{len(made)}"
        folder.mkdir()
        made.append(folder)
        with DatasetWriter(
            folder, kind, vocab_size=vocab_size, tokenizer_fingerprint=tokenizer, shard_tokens=shard_tokens
        ) as writer:
            for i, document in enumerate(documents):
                mask = None
                if kind != "text":
                    mask = np.ones(len(document), dtype=bool) if trained is None else trained[i]
                writer.add(document, mask, 0 if prompts is None else prompts[i])
            writer.finish()
        return TokenDataset.open(folder)

    return write


@pytest.fixture
def random_documents():
    """random_documents(count, longest, seed=0): lists of ids of lengths 2 to `longest`."""

    def make(count, longest, seed=0):
        rng = np.random.default_rng(seed)
        return [rng.integers(0, 60000, rng.integers(2, longest + 1)).tolist() for _ in range(count)]

    return make
