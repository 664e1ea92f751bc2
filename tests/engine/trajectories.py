"""Compares the trajectories of runs: metrics and final weights."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

# Names of computed values; the rest of a line is speed and memory.
_COMPUTED = {"step", "loss", "learning_rate", "gradient_norm", "tokens", "tokens_saved"}


def metric_lines(out: Path) -> list[dict]:
    """The computed values in a run folder's metrics.jsonl, without speed and memory."""
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key in _COMPUTED or "/" in key} for line in lines]


def assert_close(a: Path, b: Path) -> None:
    """Two runs on different numbers of ranks have the same trajectory; only the order of sums differs."""
    lines, others = metric_lines(a), metric_lines(b)
    assert [line["step"] for line in lines] == [line["step"] for line in others]
    for line, other in zip(lines, others, strict=True):
        for name in line.keys() | other.keys():
            if name in {"loss", "gradient_norm"} or name.endswith("/loss"):
                assert line[name] == pytest.approx(other[name], rel=1e-6), (line["step"], name)
    assert (a / "latest").read_text() == (b / "latest").read_text()
    weights = Path((a / "latest").read_text().strip()) / "model-00001-of-00001.safetensors"
    ours, theirs = load_file(a / weights), load_file(b / weights)
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        torch.testing.assert_close(tensor, theirs[name], rtol=0, atol=1e-6)
