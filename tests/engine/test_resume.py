"""n steps equal k steps, a kill, and n - k steps after resuming: bit for bit, wherever the kill falls."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors import safe_open

import engine.loop
import engine.optim.adamw
import model.mistral
from engine.checkpoint.state import checkpoints, read_state
from engine.settings.toml import to_toml
from recipes import dpo, pretrain, sft
from tests.engine.trajectories import assert_close

ROOT = Path(__file__).resolve().parents[2]
RECIPES = {"pretrain": pretrain, "sft": sft, "dpo": dpo}
OPTIMIZER = "training/optimizer/shard-00001-model-00001-of-00001.safetensors"
EVERY_TWO = {"checkpoint_every": 2, "evaluate_every": 3}


class Killed(BaseException):
    """In place of a kill: nothing in the engine may handle it."""


def kill_in_update(monkeypatch, call):
    """Raise at the `call`th parameter update, with some parameters of that step updated and some not."""
    original, calls = engine.optim.adamw.adamw_, []

    def adamw_(*arguments, **named):
        calls.append(1)
        if len(calls) == call:
            raise Killed
        original(*arguments, **named)

    monkeypatch.setattr(engine.optim.adamw, "adamw_", adamw_)


@pytest.mark.parametrize(
    ("stage", "changes"),
    [
        ("pretrain", {}),
        ("pretrain", {"dtype": "bfloat16"}),
        ("pretrain", {"dtype": "bfloat16", "optimizer": {"moments": "bfloat16", "gradients": "float32"}}),
        ("sft", {"neftune_alpha": 5.0}),
        ("dpo", {"neftune_alpha": 5.0}),
        ("dpo", {"dtype": "bfloat16", "preference": {"loss": "ipo"}}),
    ],
)
def test_a_resumed_run_ends_as_an_uninterrupted_one(tiny_settings, assert_same_end, tmp_path, monkeypatch, stage, changes):
    recipe = RECIPES[stage]
    whole, torn = tmp_path / "whole", tmp_path / "torn"
    recipe.run(tiny_settings(stage, whole, **EVERY_TWO, **changes))
    with monkeypatch.context() as patch:
        kill_in_update(patch, call=15 * 4 + 7)
        with pytest.raises(Killed):
            recipe.run(tiny_settings(stage, torn, **EVERY_TWO, **changes))
    assert [path.name for path in checkpoints(torn)] == ["step-00000002", "step-00000004"]
    steps = []
    accumulate = engine.loop.accumulate

    def counted(model, objective, step):
        steps.append(step.index)
        return accumulate(model, objective, step)

    monkeypatch.setattr(engine.loop, "accumulate", counted)
    last = recipe.run(tiny_settings(stage, torn, **EVERY_TWO, **changes))
    assert steps == [4, 5]
    assert last == torn / "step-00000006"
    assert_same_end(whole, torn)
    assert read_state(last).step == 6
    with safe_open(last / OPTIMIZER, framework="pt") as saved:
        remainders = [saved.get_tensor(name) for name in saved.keys() if name.endswith(".remainder")]  # noqa: SIM118
    assert len(remainders) == (15 if "dtype" in changes else 0)
    assert all(remainder.any() for remainder in remainders)


def test_a_run_killed_before_its_first_checkpoint_begins_anew(tiny_settings, assert_same_end, tmp_path, monkeypatch):
    whole, torn = tmp_path / "whole", tmp_path / "torn"
    changes = {"log": {"every": 1}}
    sft.run(tiny_settings("sft", whole, **changes))
    with monkeypatch.context() as patch:
        kill_in_update(patch, call=15 * 3 + 1)
        with pytest.raises(Killed):
            sft.run(tiny_settings("sft", torn, **changes))
    assert len((torn / "metrics.jsonl").read_text().splitlines()) == 4
    sft.run(tiny_settings("sft", torn, **changes))
    assert_same_end(whole, torn)


def test_settings_that_do_not_change_the_trajectory_may_differ(tiny_settings, metric_lines, tmp_path, monkeypatch):
    """Another micro-batch size, held-out set and cadence, and the run folder moved: only rounding differs."""
    whole, torn, moved = tmp_path / "whole", tmp_path / "torn", tmp_path / "moved"
    pretrain.run(tiny_settings("pretrain", whole))
    with monkeypatch.context() as patch:
        kill_in_update(patch, call=15 * 2 + 1)
        with pytest.raises(Killed):
            pretrain.run(tiny_settings("pretrain", torn, **EVERY_TWO))
    torn.rename(moved)
    settings = tiny_settings("pretrain", moved, pack_tokens=64, heldout=[], keep_checkpoints=1, log={"every": 3})
    assert pretrain.run(settings) == moved / "step-00000006"
    assert [path.name for path in checkpoints(moved)] == ["step-00000006"]
    losses = [[line["loss"] for line in metric_lines(out) if "loss" in line] for out in (whole, moved)]
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    assert losses[1][:2] == losses[0][:2]


def test_what_is_recomputed_changes_no_bit_and_may_change_on_resume(tiny_settings, assert_same_end, tmp_path, monkeypatch):
    whole, torn = tmp_path / "whole", tmp_path / "torn"
    pretrain.run(tiny_settings("pretrain", whole, recompute="none", **EVERY_TWO))
    with monkeypatch.context() as patch:
        kill_in_update(patch, call=15 * 3 + 1)
        with pytest.raises(Killed):
            pretrain.run(tiny_settings("pretrain", torn, recompute="ffn", **EVERY_TWO))
    used = []
    monkeypatch.setattr(model.mistral.Mistral, "log_probs", record_mode(model.mistral.Mistral.log_probs, used))
    monkeypatch.setattr(model.mistral.Mistral, "nll", record_mode(model.mistral.Mistral.nll, used))
    pretrain.run(tiny_settings("pretrain", torn, recompute="block", **EVERY_TWO))
    assert set(used) == {"block"}
    assert_same_end(whole, torn)


def record_mode(method, used):
    def recorded(self, *arguments, **named):
        used.append(self.recompute)
        return method(self, *arguments, **named)

    return recorded


def test_a_finished_run_is_left_as_it_is(tiny_settings, tmp_path, capsys):
    last = pretrain.run(tiny_settings("pretrain", tmp_path / "run"))
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    # As a kill between the last checkpoint and its name in this file would leave it.
    (tmp_path / "run" / "latest").unlink()
    assert pretrain.run(tiny_settings("pretrain", tmp_path / "run")) == last
    assert "all 6 steps are done already" in capsys.readouterr().out
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


# Where something goes wrong, in which of how many processes, how many resume -> exit codes, the newest checkpoint then.
ERROR, KILLED, TOLD = 1, -signal.SIGKILL, 128 + signal.SIGTERM
FAULTS = {
    ("never", 0, 1, 0): ([0], 5),
    ("update", 0, 1, 1): ([KILLED], 2),
    ("optimizer", 0, 1, 1): ([KILLED], 2),
    ("weights", 0, 1, 1): ([KILLED], 2),
    ("rename", 0, 1, 1): ([KILLED], 2),
    ("latest", 0, 1, 1): ([KILLED], 4),
    ("removal", 0, 1, 1): ([KILLED], 4),
    ("term", 0, 1, 1): ([TOLD], 3),
    ("never", 0, 4, 0): ([0, 0, 0, 0], 5),
    ("rename", 0, 4, "restart"): ([0], 5),
    ("update", 2, 4, 3): ([ERROR, ERROR, KILLED, ERROR], 2),
    ("optimizer", 1, 4, 2): ([ERROR, KILLED, ERROR, ERROR], 2),
    ("disk", 3, 4, 1): ([ERROR, ERROR, ERROR, ERROR], 2),
    ("term", 1, 2, 1): ([TOLD, TOLD], 4),
}


@pytest.fixture(scope="module")
def faults(tiny_settings, tmp_path_factory):
    """faults[one of FAULTS] -> its run folder and what became of it."""
    folder = tmp_path_factory.mktemp("faults")
    outs, jobs = {}, []
    for fault in FAULTS:
        point, rank, ranks, then = fault
        outs[fault] = folder / "-".join(map(str, fault))
        settings = tiny_settings(
            "sft", outs[fault], steps=5, checkpoint_every=2, keep_checkpoints=1, pack_tokens=64, heldout=None,
            optimizer={"eps": 1e-6}, log={"every": 2, "tensorboard": False}, parallel={"timeout": 60.0},
        )  # fmt: skip
        config = outs[fault].with_suffix(".toml")
        config.write_text(to_toml(settings))
        jobs.append({"stage": "sft", "config": str(config), "ranks": ranks, "point": point, "rank": rank, "then": then})
    (folder / "jobs.json").write_text(json.dumps(jobs))
    done = subprocess.run(
        [sys.executable, "-m", "tests.engine.killed_runs", folder / "jobs.json"], cwd=ROOT, capture_output=True, text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "TRITON_INTERPRET": "0"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    results = json.loads(done.stdout.splitlines()[-1])
    return {fault: (out, result) for (fault, out), result in zip(outs.items(), results, strict=True)}


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: "-".join(map(str, fault)))
def test_a_run_in_which_something_goes_wrong_is_continued(faults, assert_same_end, fault):
    """From the last complete checkpoint, by any number of ranks: by as many as before, to the same bits."""
    point, _, ranks, then = fault
    out, result = faults[fault]
    codes, newest = FAULTS[fault]
    resumed = [] if then == "restart" else [0] * then
    assert (result["codes"], result["newest"], result["resumed"]) == (codes, f"step-{newest:08d}", resumed), result["output"]
    assert {path.name for path in out.iterdir()} == {"config.toml", "metrics.jsonl", "latest", "step-00000005"}
    whole, _ = faults["never", 0, 1 if ranks == 1 or then == 1 else 4, 0]
    if then in (0, ranks, "restart"):
        assert_same_end(whole, out)
    else:
        assert_close(whole, out)
    said = {
        "disk": f"training/optimizer: rank {fault[1]} could not write: [Errno 27] File too large; free the disk",
        "term": f"stopped by SIGTERM after step {newest}; start again to continue",
    }.get(point, "another rank stopped or did not answer" if ERROR in codes else "")
    assert said in result["output"]
    assert "Traceback" not in result["output"]
