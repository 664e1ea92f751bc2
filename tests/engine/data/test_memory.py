"""What a rank holds of its data: a few numbers a pair, whatever the pairs' length and how much of them was read."""

import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch

from engine.data.batch import Packing, evaluation_batches, make_step, share_of
from engine.data.dataset import DatasetWriter, TokenDataset
from engine.data.plan import Plan
from engine.settings.sections import Source

# Bytes of host memory that a pair may take: a million pairs then take half of a gibibyte.
BYTES_A_PAIR = 512
PACKING = Packing(window=None, pack_tokens=1024, rank=1, ranks=4)


def write_pairs(folder: Path, pairs: int, answer: int) -> TokenDataset:
    """Pairs of a prompt of 6 tokens and answers of `answer` tokens."""
    folder.mkdir()
    prompt = np.arange(3, 9)
    trained = np.arange(6 + answer) >= 6
    with DatasetWriter(folder, "preferences", vocab_size=100_000, tokenizer_fingerprint="0" * 64) as writer:
        for side in range(2 * pairs):
            writer.add(np.concatenate((prompt, np.full(answer, 10 + side % 2))), trained, 6)
        writer.finish()
    return TokenDataset.open(folder)


def read_all(folder: Path) -> Plan:
    """What a run of preference tuning does with its data, without a model: reference pass, then an epoch of steps."""
    dataset = TokenDataset.open(folder)
    batches = evaluation_batches(dataset, PACKING, 1024, share_prompts=True)
    table = torch.full((len(dataset) // 2, 2), torch.nan)
    for batch in share_of(batches, PACKING.rank, PACKING.ranks):
        table[batch.pair_B[batch.pair_B >= 0]] = 0.0
    plan = Plan(
        [dataset],
        [Source(path=str(folder))],
        seed=0,
        context_length=1024,
        step_size=64,
        steps=None,
        epochs=1.0,
        share_prompts=True,
    )
    for step in range(plan.steps):
        make_step(plan, step, PACKING)
    return plan


@pytest.mark.slow
def test_a_million_pairs_take_half_a_gibibyte_of_each_rank(tmp_path):
    """The peak grows by a few numbers a pair, not by the pairs' tokens: steps and reference batches are made one by one."""
    peaks = {}
    for pairs, answer in ((500, 8), (1_500, 8), (500, 200)):
        write_pairs(tmp_path / f"{pairs}-{answer}", pairs, answer)
        tracemalloc.start()
        read_all(tmp_path / f"{pairs}-{answer}")
        peaks[pairs, answer] = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert (peaks[1_500, 8] - peaks[500, 8]) / 1_000 < BYTES_A_PAIR
    # 15 times the tokens: only the batches of a step are larger, of 41 bytes a place.
    assert peaks[500, 200] - peaks[500, 8] < 64 * 2 * 206 * 41 * 3


def test_what_was_read_does_not_stay_mapped(tmp_path):
    """A mapped file would count as this process's memory as far as it was read."""
    dataset = write_pairs(tmp_path / "pairs", 500, 50)
    assert sum(int(dataset.tokens(document)[-1]) for document in range(len(dataset))) == 500 * (10 + 11)
    assert str(tmp_path / "pairs") not in Path("/proc/self/maps").read_text()


def test_a_file_that_is_cut_while_it_is_read_is_named(tmp_path):
    """A mapped file would end the process without a word."""
    dataset = write_pairs(tmp_path / "pairs", 4, 5)
    with (tmp_path / "pairs" / "tokens-00000.bin").open("r+b") as file:
        file.truncate(100)
    assert dataset.tokens(0).tolist() == [3, 4, 5, 6, 7, 8, 10, 10, 10, 10, 10]
    with pytest.raises(ValueError, match=r"tokens-00000.bin: cut short while it was being read; restore it and start again"):
        dataset.tokens(7)
