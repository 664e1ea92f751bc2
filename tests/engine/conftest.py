"""What the tests of training compare runs by."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

# What a step computed; the rest of a line is speed and memory.
_COMPUTED = {"step", "loss", "learning_rate", "gradient_norm", "tokens", "tokens_saved"}


@pytest.fixture(scope="session")
def metric_lines():
    """metric_lines(run folder) -> the lines of metrics.jsonl without speed and memory."""

    def read(out: Path) -> list[dict]:
        lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
        return [{key: value for key, value in line.items() if key in _COMPUTED or "/" in key} for line in lines]

    return read


@pytest.fixture(scope="session")
def assert_same_end(metric_lines):
    """assert_same_end(a, b): the last checkpoints of two run folders hold equal bytes, and their metrics equal values.

    Of the optimizer's files the tensors are compared: torch writes what lies before them in random order.
    """

    def check(a: Path, b: Path) -> None:
        assert (a / "latest").read_text() == (b / "latest").read_text()
        last = (a / "latest").read_text().strip()
        names = {str(file.relative_to(a / last)) for file in (a / last).rglob("*") if file.is_file()}
        optimizer = {name for name in names if name.startswith("training/optimizer/")}
        assert optimizer
        assert {"training/state.json", "model-00001-of-00001.safetensors", "config.json"} < names
        assert names == {str(file.relative_to(b / last)) for file in (b / last).rglob("*") if file.is_file()}
        # The state also holds the settings, of which `out` differs.
        for name in names - optimizer - {"training/state.json"}:
            assert (a / last / name).read_bytes() == (b / last / name).read_bytes(), name
        for name in optimizer:
            ours, theirs = load_file(a / last / name), load_file(b / last / name)
            assert ours.keys() == theirs.keys()
            assert all(torch.equal(tensor, theirs[key]) for key, tensor in ours.items()), name
        assert metric_lines(a) == metric_lines(b)

    return check
