"""A run that is killed and resumed ends with the bits of an uninterrupted run, wherever the kill falls."""

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
PARAMETERS = 15  # of the tiny model; an update calls adamw_ once for each


class Killed(BaseException):
    """Stands for a kill: nothing in the engine may handle it."""


def kill_in_update(monkeypatch, step, parameter):
    """Raise in a step's update (from 0), with the parameters before the given one updated and the others not."""
    original, calls = engine.optim.adamw.adamw_, []

    def adamw_(*arguments, **named):
        calls.append(1)
        if len(calls) == PARAMETERS * step + parameter:
            raise Killed
        original(*arguments, **named)

    monkeypatch.setattr(engine.optim.adamw, "adamw_", adamw_)


def run_until_killed(monkeypatch, recipe, settings, step, parameter=1):
    with monkeypatch.context() as patch:
        kill_in_update(patch, step, parameter)
        with pytest.raises(Killed):
            recipe.run(settings)


@pytest.mark.parametrize(
    ("stage", "changes"),
    [
        ("pretrain", {"dtype": "bfloat16", "optimizer": {"moments": "bfloat16", "gradients": "float32"}}),
        ("pretrain", {"dtype": "bfloat16", "precision": "fp8", "fp8": {"bf16_first": 0}}),
        ("sft", {"neftune_alpha": 5.0}),
        ("dpo", {"dtype": "bfloat16", "neftune_alpha": 5.0, "preference": {"loss": "ipo"}}),
        pytest.param("pretrain", {}, marks=pytest.mark.slow),
        pytest.param("pretrain", {"dtype": "bfloat16"}, marks=pytest.mark.slow),
        pytest.param("dpo", {"neftune_alpha": 5.0}, marks=pytest.mark.slow),
    ],
)
def test_a_resumed_run_ends_as_an_uninterrupted_one(tiny_settings, assert_same_end, tmp_path, monkeypatch, stage, changes):
    """The first kill comes before the first checkpoint, so that the second attempt begins anew."""
    recipe = RECIPES[stage]
    whole, torn = (tiny_settings(stage, tmp_path / name, **EVERY_TWO, **changes) for name in ("whole", "torn"))
    recipe.run(whole)
    run_until_killed(monkeypatch, recipe, torn, step=1)
    assert checkpoints(torn.out) == []
    run_until_killed(monkeypatch, recipe, torn, step=4, parameter=7)
    assert [path.name for path in checkpoints(torn.out)] == ["step-00000002", "step-00000004"]
    steps = []
    accumulate = engine.loop.accumulate

    def counted(model, objective, step):
        steps.append(step.index)
        return accumulate(model, objective, step)

    monkeypatch.setattr(engine.loop, "accumulate", counted)
    last = recipe.run(torn)
    assert steps == [4, 5]
    assert last == tmp_path / "torn" / "step-00000006"
    assert_same_end(tmp_path / "whole", tmp_path / "torn")
    assert read_state(last).step == 6
    with safe_open(last / OPTIMIZER, framework="pt") as saved:
        remainders = [saved.get_tensor(name) for name in saved.keys() if name.endswith(".remainder")]  # noqa: SIM118
    assert len(remainders) == (PARAMETERS if "dtype" in changes else 0)
    assert all(remainder.any() for remainder in remainders)


@pytest.fixture(scope="module")
def finished(tiny_settings, tmp_path_factory):
    """A finished pre-training run without recomputation, for the tests that compare runs with it."""
    settings = tiny_settings("pretrain", tmp_path_factory.mktemp("finished") / "run", recompute="none", **EVERY_TWO)
    pretrain.run(settings)
    return settings


def test_settings_that_keep_the_trajectory_may_change_on_resume(tiny_settings, finished, metric_lines, tmp_path, monkeypatch):
    """Micro-batch size, validation and cadence change, and the run folder moves: only rounding differs."""
    torn, moved = tmp_path / "torn", tmp_path / "moved"
    run_until_killed(monkeypatch, pretrain, tiny_settings("pretrain", torn, **EVERY_TWO), step=2)
    torn.rename(moved)
    settings = tiny_settings("pretrain", moved, pack_tokens=64, heldout=[], keep_checkpoints=1, log={"every": 3})
    assert pretrain.run(settings) == moved / "step-00000006"
    assert [path.name for path in checkpoints(moved)] == ["step-00000006"]
    losses = [[line["loss"] for line in metric_lines(Path(out)) if "loss" in line] for out in (finished.out, moved)]
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    assert losses[1][:2] == losses[0][:2]


def test_recompute_may_change_on_resume_and_changes_no_bit(tiny_settings, finished, assert_same_end, tmp_path, monkeypatch):
    torn = tmp_path / "torn"
    run_until_killed(monkeypatch, pretrain, tiny_settings("pretrain", torn, recompute="ffn", **EVERY_TWO), step=3)
    used = []
    for name in ("log_probs", "nll"):
        monkeypatch.setattr(model.mistral.Mistral, name, record_mode(getattr(model.mistral.Mistral, name), used))
    pretrain.run(tiny_settings("pretrain", torn, recompute="block", **EVERY_TWO))
    assert set(used) == {"block"}
    assert_same_end(Path(finished.out), torn)


def record_mode(method, used):
    def recorded(self, *arguments, **named):
        used.append(self.recompute)
        return method(self, *arguments, **named)

    return recorded


def test_a_finished_run_is_left_as_it_is(finished, capsys):
    out = Path(finished.out)
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    # A kill after the last checkpoint and before its name is written leaves the folder like this.
    (out / "latest").unlink()
    assert pretrain.run(finished) == out / "step-00000006"
    assert "all 6 steps are done already" in capsys.readouterr().out
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before


ERROR, KILLED, TOLD = 1, -signal.SIGKILL, 128 + signal.SIGTERM
# (point of the fault, faulty rank, ranks, ranks that resume) -> (exit codes, newest checkpoint after the fault).
FAULTS = {
    ("never", 0, 1, 0): ([0], 5),
    ("update", 0, 1, 1): ([KILLED], 2),
    ("optimizer", 0, 1, 1): ([KILLED], 2),
    ("weights", 0, 1, 1): ([KILLED], 2),
    ("rename", 0, 1, 1): ([KILLED], 2),
    ("latest", 0, 1, 1): ([KILLED], 4),
    ("removal", 0, 1, 1): ([KILLED], 4),
    ("term", 0, 1, 1): ([TOLD], 3),
    ("never", 0, 2, 0): ([0, 0], 5),
    ("rename", 0, 2, "restart"): ([0], 5),
    ("update", 2, 3, 2): ([ERROR, ERROR, KILLED], 2),
    ("optimizer", 1, 2, 3): ([ERROR, KILLED], 2),
    ("disk", 1, 2, 1): ([ERROR, ERROR], 2),
    ("term", 1, 2, 1): ([TOLD, TOLD], 4),
}


@pytest.fixture(scope="module")
def faults(tiny_settings, tmp_path_factory):
    """{one of FAULTS: (run folder, results of killed_runs)}."""
    folder = tmp_path_factory.mktemp("faults")
    outs, jobs = {}, []
    for fault in FAULTS:
        point, rank, ranks, then = fault
        outs[fault] = folder / "-".join(map(str, fault))
        settings = tiny_settings(
            "sft",
            outs[fault],
            steps=5,
            checkpoint_every=2,
            keep_checkpoints=1,
            pack_tokens=64,
            heldout=None,
            optimizer={"eps": 1e-6},
            log={"every": 2, "tensorboard": False},
            parallel={"timeout": 60.0},
        )
        config = outs[fault].with_suffix(".toml")
        config.write_text(to_toml(settings))
        jobs.append({"stage": "sft", "config": str(config), "ranks": ranks, "point": point, "rank": rank, "then": then})
    (folder / "jobs.json").write_text(json.dumps(jobs))
    done = subprocess.run(
        [sys.executable, "-m", "tests.engine.killed_runs", folder / "jobs.json"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "TRITON_INTERPRET": "0"},
    )
    assert done.returncode == 0, done.stderr
    results = json.loads(done.stdout.splitlines()[-1])
    return {fault: (out, result) for (fault, out), result in zip(outs.items(), results, strict=True)}


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: "-".join(map(str, fault)))
def test_a_run_continues_after_a_fault(faults, assert_same_end, fault):
    """The run continues from the last complete checkpoint on any number of ranks; on the same number, with the same bits."""
    point, rank, ranks, then = fault
    out, result = faults[fault]
    codes, newest = FAULTS[fault]
    resumed = [] if then == "restart" else [0] * then
    assert (result["codes"], result["newest"], result["resumed"]) == (codes, f"step-{newest:08d}", resumed), result["output"]
    assert {path.name for path in out.iterdir()} == {"config.toml", "metrics.jsonl", "latest", "report.html", "step-00000005"}
    whole, _ = faults["never", 0, 1 if ranks == 1 or then == 1 else 2, 0]
    if then in (0, ranks, "restart"):
        assert_same_end(whole, out)
    else:
        assert_close(whole, out)
    said = {
        "disk": f"training/optimizer: rank {rank} could not write: [Errno 27] File too large; free the disk",
        "term": f"stopped by SIGTERM after step {newest}; start again to continue",
    }.get(point, "another rank stopped or did not answer" if ERROR in codes else "")
    assert said in result["output"]
    assert "Traceback" not in result["output"]
