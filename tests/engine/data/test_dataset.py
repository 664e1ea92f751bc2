"""Prepared datasets: written, opened, and refused where a file is missing or changed."""

import json
import os

import numpy as np
import pytest

from engine.data.dataset import DatasetWriter, TokenDataset


@pytest.mark.parametrize(("vocab_size", "dtype"), [(32000, "uint16"), (65536, "uint16"), (65537, "uint32")])
def test_round_trip_of_tokens_and_masks_over_shards(write_dataset, vocab_size, dtype):
    rng = np.random.default_rng(1)
    documents = [rng.integers(0, vocab_size, rng.integers(2, 40)) for _ in range(100)]
    documents[3][0] = vocab_size - 1
    masks = [rng.integers(0, 2, len(document)).astype(bool) for document in documents]
    dataset = write_dataset(documents, "conversations", masks, vocab_size=vocab_size, shard_tokens=101)
    assert dataset.report["dtype"] == dtype
    assert len(dataset.report["shards"]) > 10
    assert all(shard["tokens"] <= 101 for shard in dataset.report["shards"])
    assert dataset.lengths.tolist() == [len(document) for document in documents]
    for i, (document, mask) in enumerate(zip(documents, masks, strict=True)):
        assert dataset.tokens(i).tolist() == document.tolist()
        assert dataset.trained(i).tolist() == mask.tolist()
        assert dataset.trained(i, 1, 7).tolist() == mask[1:7].tolist()
    assert dataset.report["trained_tokens"] == sum(int(mask[1:].sum()) for mask in masks)
    dataset.verify()


def test_masks_survive_flushes_at_odd_bits(tmp_path, monkeypatch):
    monkeypatch.setattr("engine.data.dataset.FLUSH_TOKENS", 5)
    masks = [np.arange(3 + i) % 3 == 0 for i in range(20)]
    with DatasetWriter(tmp_path, "conversations", vocab_size=9, tokenizer_fingerprint="t") as writer:
        for mask in masks:
            writer.add(np.arange(len(mask)) % 9, mask)
        writer.finish()
    dataset = TokenDataset.open(tmp_path)
    assert [dataset.trained(i).tolist() for i in range(20)] == [mask.tolist() for mask in masks]


def test_text_is_trained_everywhere_and_preferences_keep_prompt_lengths(write_dataset):
    text = write_dataset([[1, 5, 2], [1, 6, 7, 2]])
    assert text.trained(1).tolist() == [True] * 4
    assert text.prompt_lengths is None
    assert text.report["trained_tokens"] == 5
    pairs = write_dataset([[1, 5, 6, 2], [1, 5, 7, 2]], "preferences", prompts=[2, 2])
    assert pairs.prompt_lengths.tolist() == [2, 2]


@pytest.mark.parametrize(
    ("chosen", "rejected", "prompt", "trained", "expected"),
    [
        ([1, 5, 6, 7, 2], [1, 5, 6, 8, 2], 3, 3, 2),  # the prompt's last token has two successors
        ([1, 5, 6, 7, 2], [1, 5, 6, 7, 9], 3, 3, 2),  # answers that begin alike
        ([1, 5, 6, 7, 2], [1, 5, 4, 8, 2], 3, 3, 1),  # prompts that differ
        ([1, 5, 6, 7, 2], [3, 5, 6, 8, 2], 3, 3, 0),
        ([1, 5, 6, 7, 2], [1, 5, 6, 8, 2], 1, 3, 0),
        ([1, 5, 6, 7, 2], [1, 5, 6, 8, 2], 0, 3, 0),
        ([1, 5, 6, 7, 2], [1, 5, 6, 8, 2], 3, 2, 1),  # trained within the prompt
        ([1, 5, 6, 7, 2], [1, 5, 6, 8, 2], 3, 0, 0),
        ([1, 5], [1, 5, 6, 8, 2], 3, 3, 1),
    ],
)
def test_the_sides_of_a_pair_share_the_start_of_their_prompt(write_dataset, chosen, rejected, prompt, trained, expected):
    masks = [[place >= trained for place in range(len(side))] for side in (chosen, rejected)]
    other = [[1, 2, 3], [1, 2, 3]]
    for sides, order in (([chosen, rejected], masks), ([rejected, chosen], masks[::-1])):
        dataset = write_dataset([*other, *sides], "preferences", [[False] * 3] * 2 + order, prompts=[2, 2, prompt, prompt])
        assert dataset.shared_places.tolist() == [1, expected]
        if prompt:
            dataset = write_dataset([*other, *sides], "preferences", [[False] * 3] * 2 + order, prompts=[2, 2, prompt, 5])
            assert dataset.shared_places.tolist() == [1, expected]


def test_the_mask_of_a_first_token_is_ignored(write_dataset):
    dataset = write_dataset([[1, 5, 6, 7]] * 2, "preferences", [[True, False, False, True]] * 2, prompts=[3, 3])
    assert dataset.shared_places.tolist() == [2]


def test_the_fingerprint_depends_on_content_masks_and_tokenizer(write_dataset):
    base = write_dataset([[1, 5, 2]], "conversations")
    assert write_dataset([[1, 5, 2]], "conversations").fingerprint == base.fingerprint
    assert write_dataset([[1, 6, 2]], "conversations").fingerprint != base.fingerprint
    assert write_dataset([[1, 5, 2]], "conversations", [[True, False, True]]).fingerprint != base.fingerprint
    assert write_dataset([[1, 5, 2]], "conversations", tokenizer="other").fingerprint != base.fingerprint
    assert write_dataset([[1, 5], [2, 4]]).fingerprint != write_dataset([[1, 5, 2, 4]]).fingerprint


def test_an_incomplete_folder_is_refused_and_its_file_named(write_dataset):
    def damaged(name, change):
        folder = write_dataset([[1, 5, 2]], "conversations").folder
        change(folder / name)
        return folder

    with pytest.raises(FileNotFoundError, match=r"dataset\.json"):
        TokenDataset.open(damaged("dataset.json", lambda path: path.unlink()))
    for name in ("tokens-00000.bin", "trained-00000.bin", "lengths.bin"):
        with pytest.raises(ValueError, match=rf"{name}: missing.*prepare"):
            TokenDataset.open(damaged(name, lambda path: path.unlink()))
        with pytest.raises(ValueError, match=rf"{name}: \d bytes.*prepare"):
            TokenDataset.open(damaged(name, lambda path: path.write_bytes(path.read_bytes() + b"x")))
    with pytest.raises(ValueError, match="not valid JSON"):
        TokenDataset.open(damaged("dataset.json", lambda path: path.write_text("{")))
    with pytest.raises(ValueError, match="not a prepared dataset"):
        TokenDataset.open(damaged("dataset.json", lambda path: path.write_text("{}")))
    with pytest.raises(ValueError, match="field 'shards'"):
        TokenDataset.open(damaged("dataset.json", lambda path: _edit(path, lambda report: report.pop("shards"))))
    with pytest.raises(ValueError, match="version 99"):
        TokenDataset.open(damaged("dataset.json", lambda path: _edit(path, lambda report: report.update(version=99))))
    flipped = damaged("tokens-00000.bin", lambda path: path.write_bytes(bytes(len(path.read_bytes()))))
    with pytest.raises(ValueError, match=r"tokens-00000\.bin: its content"):
        TokenDataset.open(flipped).verify()


def _edit(path, change):
    report = json.loads(path.read_text())
    change(report)
    path.write_text(json.dumps(report))


def test_an_unfinished_folder_is_not_a_dataset(tmp_path):
    with DatasetWriter(tmp_path, "text", vocab_size=9, tokenizer_fingerprint="t") as writer:
        writer.add([1, 2, 3])
    with pytest.raises(FileNotFoundError, match=r"recipes\.prepare"):
        TokenDataset.open(tmp_path)


def test_a_document_out_of_range_is_an_error(write_dataset):
    with pytest.raises(IndexError, match="document 1 of 1"):
        write_dataset([[1, 2]]).tokens(1)


def test_a_file_of_another_time_and_equal_content_is_unchanged(write_dataset):
    dataset = write_dataset([[1, 2, 3]])
    path = dataset.folder / "tokens-00000.bin"
    for time in (10**18, 2 * 10**18):
        os.utime(path, ns=(time, time))
        dataset.check_unchanged()
    with path.open("r+b") as file:
        file.write(b"\x07")
    with pytest.raises(ValueError, match=r"tokens-00000\.bin: changed while it was being read"):
        dataset.check_unchanged()
