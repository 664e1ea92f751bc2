"""Random documents to train on, and steps as one file that a peer reads.

The file (safetensors) holds every place of every step, in order: tokens, labels (the token to predict at each place), weight
(0: not trained), and the bounds of documents (in places), micro-batches (in documents) and steps (in micro-batches).
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from engine.data.batch import Step
from engine.data.dataset import DatasetWriter
from model.config import MistralConfig
from model.tensor_file import TensorStream, write_tensor_file

Documents = Literal["full", "mixed"]
_PROMPT_SHARE = 0.4


def write_synthetic(
    folder: Path,
    kind: str,  # text, conversations or preferences
    config: MistralConfig,
    *,
    places: int,  # at least as many in all
    sequence: int,  # places of the longest document
    documents: Documents,  # full: all of this length; mixed: log-normal lengths with a quarter of it as their median
    seed: int,
) -> None:
    """Write a prepared dataset of random tokens.

    The first 40 % of a conversation, or of the longer side of a pair, are its prompt. A pair shares its prompt.
    """
    folder.mkdir(parents=True)
    rng = np.random.default_rng(seed)

    def random_tokens(count: int) -> np.ndarray:
        return rng.integers(3, config.unpadded_vocab_size, count)

    def length() -> int:
        if documents == "full":
            return sequence + 1
        return int(np.clip(rng.lognormal(np.log(sequence / 4), 0.8), min(16, sequence), sequence)) + 1

    with DatasetWriter(folder, kind, vocab_size=config.unpadded_vocab_size, tokenizer_fingerprint="synthetic") as writer:
        written = 0
        while written < places:
            longest = length()
            prompt = max(1, int(_PROMPT_SHARE * longest))
            ids = random_tokens(longest)
            trained = np.arange(longest) >= prompt
            if kind == "text":
                writer.add(ids)
            elif kind == "conversations":
                writer.add(ids, trained)
            else:
                other = longest if documents == "full" else int(rng.integers(prompt + 1, longest + 1))
                writer.add(ids, trained, prompt)
                writer.add(np.concatenate((ids[:prompt], random_tokens(other - prompt))), trained[:other], prompt)
                written += other - 1
            written += longest - 1
        writer.finish()


def export_steps(steps: Sequence[Step], path: Path) -> None:
    """Write the file of one rank's steps; no document of them may share its prompt with another."""
    batches = [batch for step in steps for batch in step.batches]
    assert not any(batch.tokens_saved for batch in batches)

    def bounds(counts: list[int]) -> torch.Tensor:
        return torch.tensor([0, *np.cumsum(counts).tolist()], dtype=torch.int64)

    tensors = {name: torch.cat([getattr(batch, f"{name}_T") for batch in batches]) for name in ("tokens", "labels", "weight")}
    tensors["document_bounds"] = bounds([end - start for batch in batches for start, end, _ in batch.attention.segments])
    tensors["batch_bounds"] = bounds([len(batch.document_B) for batch in batches])
    tensors["step_bounds"] = bounds([len(step.batches) for step in steps])
    write_tensor_file(path, {name: TensorStream.of(tensor) for name, tensor in tensors.items()})
