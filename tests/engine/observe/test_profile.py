"""Profiles of chosen steps: trace, shares of time, memory over time."""

import json
import sys
from xml.etree import ElementTree

import pytest
import torch

from engine.observe.profile import CATEGORIES, memory_curve, profiled
from engine.settings.sections import ProfileSettings
from recipes import pretrain


@pytest.fixture(scope="module")
def runs(tiny_settings, tmp_path_factory):
    """A folder with two runs of two steps: "plain", and "profiled", whose second step is profiled."""
    folder = tmp_path_factory.mktemp("profile")
    changes = {"steps": 2, "step_size": 64, "heldout": [], "log": {"every": 1, "tensorboard": False}}
    pretrain.run(tiny_settings("pretrain", folder / "plain", **changes))
    pretrain.run(tiny_settings("pretrain", folder / "profiled", profile={"steps": [2]}, **changes))
    return folder


def test_a_profile_changes_nothing(runs, metric_lines):
    assert metric_lines(runs / "profiled") == metric_lines(runs / "plain")


def test_a_profile_holds_trace_shares_and_memory(runs):
    assert [step.name for step in (runs / "profiled" / "profile").iterdir()] == ["step-00000002"]
    folder = runs / "profiled" / "profile" / "step-00000002" / "rank-0"
    shares = json.loads((folder / "time.json").read_text())["shares"]
    assert tuple(shares) == CATEGORIES
    assert sum(shares.values()) == pytest.approx(1)
    assert min(shares[name] for name in ("products", "attention", "our operators", "optimizer", "waiting")) > 0
    trace = json.loads((folder / "trace.json").read_text())
    assert {"komainu optimizer", "komainu attention", "aten::mm"} <= {event.get("name") for event in trace["traceEvents"]}
    peak = max(size for _, size in memory_curve(trace, cuda=False))
    # The logits of one micro-batch alone take this much.
    assert peak > 128 * 340 * 4
    pytest.importorskip("matplotlib")
    drawing = ElementTree.parse(folder / "memory.svg").getroot()
    assert f"{peak / 2**30:.3f} GiB" in "".join(drawing.itertext())


def test_without_matplotlib_a_line_says_that_the_drawing_is_missing(tiny_settings, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    changes = {"steps": 1, "step_size": 64, "heldout": [], "log": {"every": 1, "tensorboard": False}}
    pretrain.run(tiny_settings("pretrain", tmp_path / "run", profile={"steps": [1]}, **changes))
    said = capsys.readouterr().out.splitlines()
    assert said.count("matplotlib is not installed: no memory.svg (pip install matplotlib)") == 1
    names = {path.name for path in (tmp_path / "run/profile/step-00000001/rank-0").iterdir()}
    assert names == {"trace.json", "time.json"}


def test_a_profile_that_no_disk_takes_costs_nothing_else(tmp_path, capsys):
    (tmp_path / "profile").write_text("a file where the folder belongs")
    with profiled(torch.device("cpu"), tmp_path / "profile") as shares:
        torch.ones(8).sum()
    assert shares == {}
    assert "the profile could not be written: [Errno 17] File exists" in capsys.readouterr().out


def test_memory_over_time_adds_up_allocations():
    def event(at, size, held, device):
        return {"name": "[memory]", "ts": at, "args": {"Bytes": size, "Total Allocated": held, "Device Type": device}}

    trace = {"traceEvents": [event(3000.0, -8, 99, 0), event(1000.0, 8, 98, 0), event(2000.0, 5, 50, 1), {"name": "aten::mm"}]}
    assert memory_curve(trace, cuda=False) == [(0.0, 8), (2.0, 0)]
    assert memory_curve(trace, cuda=True) == [(0.0, 50)]


def test_profile_settings_out_of_range_are_named():
    with pytest.raises(ValueError, match=r"profile.steps = \[0\]: steps are numbered from 1"):
        ProfileSettings(steps=(0,))
    with pytest.raises(ValueError, match=r"profile.tool = 'nvtx': Nsight Systems"):
        ProfileSettings(tool="nvtx").check("cpu")
