"""Fixtures that compare training runs."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.engine.trajectories import metric_lines as read_metric_lines


@pytest.fixture(scope="session")
def metric_lines():
    """metric_lines(run folder) -> the computed values in metrics.jsonl, without speed and memory."""
    return read_metric_lines


@pytest.fixture(scope="session")
def assert_same_end(metric_lines):
    """assert_same_end(a, b): two run folders have bit-identical last checkpoints and equal metrics.

    The optimizer's files are compared by tensor, because torch writes their headers in random order.
    """

    def check(a: Path, b: Path) -> None:
        assert (a / "latest").read_text() == (b / "latest").read_text()
        last = (a / "latest").read_text().strip()
        names = {str(file.relative_to(a / last)) for file in (a / last).rglob("*") if file.is_file()}
        optimizer = {name for name in names if name.startswith("training/optimizer/")}
        assert optimizer
        assert {"training/state.json", "model-00001-of-00001.safetensors", "config.json"} < names
        assert names == {str(file.relative_to(b / last)) for file in (b / last).rglob("*") if file.is_file()}
        # The state holds the settings, whose `out` differs.
        for name in names - optimizer - {"training/state.json"}:
            assert (a / last / name).read_bytes() == (b / last / name).read_bytes(), name
        for name in optimizer:
            ours, theirs = load_file(a / last / name), load_file(b / last / name)
            assert ours.keys() == theirs.keys()
            assert all(torch.equal(tensor, theirs[key]) for key, tensor in ours.items()), name
        assert metric_lines(a) == metric_lines(b)

    return check
