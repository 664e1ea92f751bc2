"""Weights & Biases, with a stand-in for its package: a run that is started again continues the same run there."""

import importlib.machinery
import json
import sys
import types

import pytest

import engine.loop
from recipes import pretrain


class Killed(BaseException):
    pass


@pytest.fixture
def wandb(monkeypatch):
    """The stand-in: `started` has the arguments of each start, `logged` each start's (step, values)."""
    module = types.ModuleType("wandb")
    module.__spec__ = importlib.machinery.ModuleSpec("wandb", None)
    module.started, module.logged, module.ended = [], [], []

    def init(**named):
        module.started.append(named)
        module.logged.append([])
        return types.SimpleNamespace(
            log=lambda values, step: module.logged[-1].append((step, values)),
            finish=lambda exit_code: module.ended.append(exit_code),
        )

    module.init = init
    module.Table = lambda columns, data: {"columns": columns, "data": data}
    monkeypatch.setitem(sys.modules, "wandb", module)
    return module


def test_a_run_that_is_killed_and_started_again_is_one_run_with_its_samples(tiny_settings, tmp_path, wandb, monkeypatch):
    (tmp_path / "prompts.txt").write_text("the cat\nit runs\n")
    out, accumulate = tmp_path / "run", engine.loop.accumulate
    settings = tiny_settings(
        "pretrain",
        out,
        steps=4,
        heldout=[],
        evaluate_every=2,
        checkpoint_every=2,
        evaluate={"prompts": str(tmp_path / "prompts.txt"), "new_tokens": 3},
        log={"every": 1, "tensorboard": False, "wandb": "komainu"},
    )

    def dying(model, objective, step):
        if step.index == 3:
            raise Killed
        return accumulate(model, objective, step)

    with monkeypatch.context() as patch:
        patch.setattr(engine.loop, "accumulate", dying)
        with pytest.raises(Killed):
            pretrain.run(settings)
    pretrain.run(settings)
    first, second = wandb.started
    assert first["id"] == second["id"] == (out / "wandb-id").read_text().strip()
    assert (second["project"], second["name"], second["resume"]) == ("komainu", "run", "allow")
    assert wandb.ended == [1, 0]
    before, after = ([step for step, _ in logged] for logged in wandb.logged)
    assert before == [0, 1, 2, 2, 3]
    assert after == [3, 4, 4]
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    tables = [values["samples"] for logged in wandb.logged for _, values in logged if "samples" in values]
    assert [table["data"] for table in tables] == [
        [[line["step"], sample["prompt"], sample["answer"]] for sample in line["samples"]]
        for line in lines
        if "samples" in line
    ]
    assert all(table["columns"] == ["step", "prompt", "answer"] for table in tables)
    assert wandb.logged[1][-2][1]["loss"] == next(line["loss"] for line in lines if line["step"] == 4 and "loss" in line)
    assert all({"wall_seconds", "tokens_seen", "epoch"} <= values.keys() for _, values in wandb.logged[1][:2])
