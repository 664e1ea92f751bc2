"""The loop keeps the host out of the device's way: it reads no value of a step, and collects garbage only at log lines."""

import gc

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import engine.loop
from engine.distributed.garbage import GarbageAtLogLines
from recipes import dpo, pretrain, sft

STAGES = {"pretrain": pretrain, "sft": sft, "dpo": dpo}


class _Reads(TorchDispatchMode):
    """Records operations whose result the host would wait for if they ran on a GPU."""

    WAITING = frozenset({"_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "equal", "_unique2"})

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, operation, _types, arguments=(), keywords=None):
        name = operation.name().removeprefix("aten::").split(".")[0]
        self.found.extend([name] if name in self.WAITING else [])
        return operation(*arguments, **(keywords or {}))


@pytest.mark.parametrize("stage", STAGES)
def test_the_host_reads_no_value_of_a_step(tiny_settings, tmp_path, monkeypatch, stage):
    """Forward and backward, with NEFTune and shared prompts. tests/engine/test_gpu.py watches whole steps, updates included."""
    reads, accumulate = _Reads(), engine.loop.accumulate

    def watched(*arguments):
        with reads:
            return accumulate(*arguments)

    monkeypatch.setattr(engine.loop, "accumulate", watched)
    changes = {} if stage == "pretrain" else {"neftune_alpha": 5.0}
    log = {"every": 1, "tensorboard": False}
    STAGES[stage].run(tiny_settings(stage, tmp_path / "run", steps=1, heldout=[], log=log, **changes))
    assert reads.found == []
    with reads:
        assert float(torch.ones(())) == 1.0
    assert reads.found == ["_local_scalar_dense"]


def test_garbage_is_collected_at_log_lines_only(tiny_settings, tmp_path, monkeypatch):
    collected, enabled = [], []
    accumulate, collect = engine.loop.accumulate, GarbageAtLogLines.collect

    def watched(model, objective, step):
        enabled.append(gc.isenabled())
        return accumulate(model, objective, step)

    def counted(garbage):
        collected.append(len(enabled))
        collect(garbage)

    monkeypatch.setattr(engine.loop, "accumulate", watched)
    monkeypatch.setattr(GarbageAtLogLines, "collect", counted)
    log = {"every": 4, "tensorboard": False}
    pretrain.run(tiny_settings("pretrain", tmp_path / "run", step_size=64, heldout=[], log=log))
    assert enabled == [False] * 6
    assert collected == [4, 6]
    assert gc.isenabled()
    assert gc.get_freeze_count() == 0
