"""FP8 on several ranks, which make the codes of weights from the weights that each pass gathers."""

import json
from dataclasses import replace

import pytest

from engine.settings.sections import ParallelSettings
from engine.settings.toml import to_table


@pytest.mark.slow
def test_two_ranks_follow_one(tiny_settings, tmp_path, run_ranks):
    """Losses of five steps. A weight's gradient differs by roundings, and by what a larger token of its micro-batch lets
    underflow; codes of stale weights would be off by far more."""
    jobs = {}
    for ranks in (1, 2):
        settings = tiny_settings("pretrain", tmp_path / str(ranks), steps=5, precision="fp8", fp8={"bf16_first": 0})
        settings = replace(settings, parallel=ParallelSettings(timeout=120.0))
        jobs[str(ranks)] = {"ranks": ranks, "runs": [["pretrain", to_table(settings)]]}
    for ended in run_ranks(jobs).values():
        assert not any(ended.codes), ended.said[-4000:]
    losses = []
    for ranks in (1, 2):
        lines = (tmp_path / str(ranks) / "metrics.jsonl").read_text().splitlines()
        losses.append([line["loss"] for line in map(json.loads, lines) if "loss" in line])
    assert len(losses[0]) == 5
    assert losses[1][0] == pytest.approx(losses[0][0], rel=1e-6)
    assert losses[1] == pytest.approx(losses[0], rel=2e-4)
    assert abs(losses[0][0] - losses[0][-1]) > 0.05
