"""Metrics: their names and values, their files, and the errors that stop a run."""

import contextlib
import dataclasses
import importlib.machinery
import io
import json
import math
import sys
import types
from pathlib import Path

import pytest
import torch

import engine.loop
import engine.optim.adamw
from engine.checkpoint.state import checkpoints
from engine.data.batch import Packing, make_step
from engine.distributed.ranks import Ranks
from engine.estimate.flops import step_flops, training_flops
from engine.observe.metrics import Metrics, RunFacts, StepRecord
from engine.run import open_run
from engine.settings.sections import LogSettings
from recipes import dpo, pretrain, sft


class Killed(BaseException):
    pass


def lines_of(out):
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def scalars(out):
    """{tag: {step: value}}, as TensorBoard reads the event files."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(out / "tensorboard"), size_guidance={"scalars": 0})
    events.Reload()
    found = {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}
    for tag, pairs in found.items():
        assert len(dict(pairs)) == len(pairs), f"{tag} has a step twice"
    return {tag: dict(pairs) for tag, pairs in found.items()}


def kill_at(monkeypatch, step):
    """Kill the process in the middle of a step (from 0)."""
    accumulate = engine.loop.accumulate

    def dying(model, objective, part):
        if part.index == step:
            raise Killed
        return accumulate(model, objective, part)

    monkeypatch.setattr(engine.loop, "accumulate", dying)


SPEED = {
    "tokens_per_second",
    "tokens_per_second_per_gpu",
    "trained_tokens_per_second",
    "step_seconds",
    "step_seconds_p50",
    "step_seconds_p95",
    "data_wait_seconds",
    "checkpoint_blocked_seconds",
    "memory_peak_rss_gib",
    "memory_planned_gib",
    "wall_seconds",
}


@dataclasses.dataclass(frozen=True)
class Finished:
    settings: object
    lines: list[dict]
    console: list[str]


@pytest.fixture(scope="module")
def finished(tiny_settings, tmp_path_factory):
    """finished(recipe, name, **changes) -> a run that has ended."""

    def run(recipe, name, **changes):
        settings = tiny_settings(name, tmp_path_factory.mktemp("metrics") / "run", **changes)
        console = io.StringIO()
        with contextlib.redirect_stdout(console):
            recipe.run(settings)
        return Finished(settings, lines_of(Path(settings.out)), console.getvalue().splitlines())

    return run


@pytest.fixture(scope="module")
def tuned(finished):
    """Fine-tuning, six steps logged every four, evaluated every four."""
    return finished(sft, "sft", evaluate_every=4, log={"every": 4})


@pytest.fixture(scope="module")
def preferred(finished):
    """Preference tuning, six steps, with shared prompts."""
    return finished(dpo, "dpo", log={"every": 2, "tensorboard": False})


def test_each_step_has_a_line(tuned):
    assert [line["step"] for line in tuned.lines] == [0, 1, 2, 3, 4, 4, 5, 6, 6]
    evaluations = [line for line in tuned.lines if "loss" not in line]
    assert [line.keys() for line in evaluations] == [{"step", "eval/conversations-heldout/loss"}] * 3
    for line in tuned.lines:
        if "loss" in line:
            assert line.keys() == SPEED | {"step", "loss", "learning_rate", "gradient_norm", "tokens", "tokens_seen", "epoch"}
            assert line["trained_tokens_per_second"] < line["tokens_per_second"] == line["tokens_per_second_per_gpu"]
            assert line["step_seconds"] > line["data_wait_seconds"] >= 0
    shown = [line for line in tuned.console if line.startswith("step ") and "held-out" not in line]
    assert [line.split()[1] for line in shown] == ["1/6", "4/6", "6/6"]
    assert all("MFU" not in line and "n/a" not in line and "tok/s" in line and "left" in line for line in shown)


def test_logged_tokens_are_the_plans_without_padding(tuned):
    plan = open_run(tuned.settings, ("conversations",)).plan
    tokens = [int(plan.units(step).places.sum()) for step in range(6)]
    assert [line["tokens"] for line in tuned.lines if "loss" in line] == tokens


def test_tensorboard_holds_the_values_of_the_lines(tuned):
    pytest.importorskip("tensorboard")
    expected = {}
    for line in tuned.lines:
        for tag, value in line.items():
            if tag != "step" and value is not None:
                expected.setdefault(tag, {})[line["step"]] = value
    found = scalars(Path(tuned.settings.out))
    assert found.keys() == expected.keys()
    for tag, values in expected.items():
        assert found[tag] == {step: pytest.approx(value, rel=1e-6) for step, value in values.items()}, tag


def test_a_preference_run_reports_rewards(preferred):
    rewards = {f"rewards/{name}" for name in ("chosen", "rejected", "margins", "accuracies")}
    names = {"loss", *rewards, "logps/chosen", "logps/rejected"}
    for line in preferred.lines:
        if "loss" in line:
            assert names < line.keys()
            margin = line["rewards/chosen"] - line["rewards/rejected"]
            assert line["rewards/margins"] == pytest.approx(margin, abs=1e-6)
        else:
            assert line.keys() == {"step"} | {f"eval/preferences-heldout/{name}" for name in names}
    first = next(line for line in preferred.lines if "loss" in line)
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-5)
    assert any("rewards/margins" in line for line in preferred.console)


def test_a_preference_run_reports_the_tokens_that_shared_prompts_save(preferred, finished):
    """The same run without shared prompts computes the same values from more tokens."""
    unshared = finished(dpo, "dpo", log={"every": 2, "tensorboard": False}, share_prompts=False)
    assert not (Path(unshared.settings.out) / "tensorboard").exists()
    dataset = open_run(preferred.settings, ("preferences",)).datasets[0]
    assert dataset.shared_places.all()
    for shared, whole in zip(preferred.lines, unshared.lines, strict=True):
        for name in whole.keys() - SPEED - {"tokens", "tokens_seen"}:
            assert shared[name] == pytest.approx(whole[name], rel=1e-4, abs=1e-4), name
        if "loss" in whole:
            assert shared.keys() - whole.keys() == {"tokens_saved"}
            assert shared["tokens"] + shared["tokens_saved"] == whole["tokens"]
            assert shared["tokens_saved"] >= 4 * dataset.shared_places.min()


def test_a_resumed_run_drops_the_lines_after_its_checkpoint(tiny_settings, tmp_path, monkeypatch):
    from tensorboard.summary.writer import event_file_writer

    out = tmp_path / "run"
    settings = tiny_settings("pretrain", out, checkpoint_every=2, evaluate_every=2, log={"every": 1})
    # Where three attempts share a second, the second's event file sorts after the third's: .10 before .9.
    monkeypatch.setattr(event_file_writer, "_global_uid", event_file_writer.AtomicCounter(8))
    # An attempt that ended before its first checkpoint leaves nothing behind.
    with monkeypatch.context() as patch:
        kill_at(patch, 1)
        with pytest.raises(Killed):
            pretrain.run(settings)
    assert [line["step"] for line in lines_of(out)] == [0, 1]
    with monkeypatch.context() as patch:
        kill_at(patch, 3)
        with pytest.raises(Killed):
            pretrain.run(settings)
    assert [line["step"] for line in lines_of(out)] == [0, 1, 2, 2, 3]
    first = lines_of(out)
    with (out / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "loss": 3.')
    pretrain.run(settings)
    lines = lines_of(out)
    assert [line["step"] for line in lines] == [0, 1, 2, 2, 3, 4, 4, 5, 6, 6]
    assert lines[:4] == first[:4]
    assert sorted(scalars(out)["loss"]) == [1, 2, 3, 4, 5, 6]
    assert sorted(scalars(out)["eval/text-heldout/loss"]) == [0, 2, 4, 6]


@pytest.mark.parametrize(("what", "every"), [("loss", 1), ("gradient", 4)])
def test_a_value_that_is_not_finite_stops_the_run(tiny_settings, tmp_path, monkeypatch, every, what):
    """However rarely the run logs, no checkpoint holds the step or a later one."""
    out = tmp_path / "run"
    accumulate = engine.loop.accumulate

    def poisoned(model, objective, step):
        values = accumulate(model, objective, step)
        if step.index == 2 and what == "loss":
            values["loss"] = values["loss"] * float("nan")
        elif step.index == 2:
            model.norm.weight.grad[0] = float("inf")
        return values

    monkeypatch.setattr(engine.loop, "accumulate", poisoned)
    settings = tiny_settings(
        "pretrain",
        out,
        steps=5,
        checkpoint_every=1,
        keep_checkpoints=9,
        heldout=[],
        log={"every": every, "tensorboard": False},
    )
    with pytest.raises(FloatingPointError, match=r"step 3: loss .*, gradient norm .*: training stopped") as stopped:
        pretrain.run(settings)
    assert "pass over it (optimizer.nonfinite = skip)" in str(stopped.value)
    assert "\n" not in str(stopped.value)
    assert [path.name for path in checkpoints(out)] == ["step-00000001", "step-00000002"]
    last = lines_of(out)[-1]
    assert last["step"] == 3
    # JSON has no NaN and no infinity.
    assert last["loss" if what == "loss" else "gradient_norm"] is None
    monkeypatch.setattr(engine.loop, "accumulate", accumulate)
    assert pretrain.run(settings).name == "step-00000005"


@pytest.fixture
def metrics_of(tmp_path):
    made = []

    def make(**changes):
        settings = LogSettings(**{"every": 2, "tensorboard": False, **changes.pop("log", {})})
        facts = RunFacts(**{"steps": 4, "start": 0, "planned_bytes": 2**30, "config": {}, **changes})
        metrics = Metrics(tmp_path, settings, Ranks(torch.device("cpu")), facts)
        made.append(metrics)
        return metrics

    yield make
    for metrics in made:
        metrics.close()


def record(step, **changes):
    values = {"loss": torch.tensor(2.0), "gradient_norm": torch.tensor(1.0)}
    return StepRecord(
        **{
            "step": step,
            "learning_rate": 1e-4,
            "values": values,
            "tokens": 100,
            "trained_tokens": 40,
            "flops": 5_000,
            "data_wait": 0.25,
            **changes,
        }
    )


def test_speed_is_work_over_time(tmp_path, metrics_of, monkeypatch, capsys):
    """The second and third step in four seconds. Evaluation and checkpoints in between do not count in the speed."""
    now = [100.0]
    monkeypatch.setattr("engine.observe.metrics.time.perf_counter", lambda: now[0])
    metrics = metrics_of(peak_flops=10_000.0, ceiling=8_000.0, steps=5, log={"every": 3})
    now[0] += 2
    assert metrics.step(record(1)), "the first step is logged at once"
    now[0] += 1
    assert not metrics.step(record(2, recomputed_flops=2_000))
    now[0] += 3
    assert metrics.step(record(3, tokens=300, trained_tokens=60, flops=7_000, data_wait=0.75))
    now[0] += 1000
    metrics.restart_clock()
    metrics.step(record(4, epoch=0.5))
    now[0] += 1
    metrics.step(record(5))
    lines = lines_of(tmp_path)
    assert lines[0]["tokens_per_second"] == 50
    for line in lines[1:3]:
        assert line["tokens_per_second"] == 100
        assert line["trained_tokens_per_second"] == 25
        assert line["mfu"] == pytest.approx(12_000 / 4 / 10_000)
        assert line["hfu"] == pytest.approx(14_000 / 4 / 10_000)
        assert line["of_ceiling"] == pytest.approx(12_000 / 4 / 8_000)
        assert (line["step_seconds"], line["step_seconds_p50"], line["step_seconds_p95"]) == (2, 2, 3)
        assert line["data_wait_seconds"] == 0.5
    assert lines[4]["tokens_per_second"] == 200
    assert [line["tokens"] for line in lines] == [100, 100, 300, 100, 100]
    assert [line["tokens_seen"] for line in lines] == [100, 200, 500, 600, 700]
    assert [line["wall_seconds"] for line in lines] == [2, 3, 6, 1006, 1007]
    assert lines[3]["epoch"] == 0.5
    console = capsys.readouterr().out
    assert "MFU 30.0%  of ceiling 37.5%" in console
    assert "left 00:04" in console


def test_wall_time_and_tokens_go_on_after_a_restart(tmp_path, metrics_of, monkeypatch):
    """Lines of an older version have neither; then the tokens of its steps are added up."""
    now = [100.0]
    monkeypatch.setattr("engine.observe.metrics.time.perf_counter", lambda: now[0])
    older = [{"step": step, "loss": 2.0, "tokens": 100} for step in (1, 2)]
    for before, start, expected in [
        ([*older, {"step": 2, "eval/x/loss": 2.0}], 2, (5, 300)),
        ([{**older[0], "wall_seconds": 7.5, "tokens_seen": 100}, {**older[1], "wall_seconds": 9.0}], 1, (12.5, 200)),
    ]:
        (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in before))
        metrics = metrics_of(start=start)
        now[0] += 5
        metrics.step(record(start + 1))
        last = lines_of(tmp_path)[-1]
        assert (last["step"], last["wall_seconds"], last["tokens_seen"]) == (start + 1, *expected)


def test_the_flops_of_a_step_do_not_depend_on_packing(tiny_settings, tmp_path):
    """Attended pairs count within segments, and only trained places reach the head."""
    run = open_run(tiny_settings("sft", tmp_path / "run"), ("conversations",))
    steps = [make_step(run.plan, 1, Packing(16, pack, rank=rank, ranks=3)) for pack in (64, 100) for rank in range(3)]
    found = {(step_flops(run.config, step), step.trained) for step in steps}
    units = run.plan.units(1)
    trained = sum(
        int(run.datasets[0].trained(document, start + 1, start + places + 1).sum())
        for document, start, places in zip(units.document.tolist(), units.start.tolist(), units.places.tolist(), strict=True)
    )
    pairs = sum(min(i + 1, run.config.sliding_window) for places in units.places.tolist() for i in range(places))
    expected = training_flops(run.config, tokens=int(units.places.sum()), rows=trained, pairs=pairs)
    assert found == {(expected, trained)}


def test_too_many_skipped_steps_in_a_row_end_the_run(tmp_path, metrics_of, capsys):
    def bad(step):
        values = {"loss": torch.tensor(torch.nan), "gradient_norm": torch.tensor(1.0), "skipped": torch.tensor(1.0)}
        return record(step, values=values)

    metrics = metrics_of(steps=10, skip_limit=2)
    for step in (1, 2, 3):
        metrics.step(bad(step) if step != 2 else record(2))
    with pytest.raises(FloatingPointError, match=r"step 4: loss nan"):
        metrics.step(bad(4))
    assert [line.get("skipped") for line in lines_of(tmp_path)] == [1, None, 1, 1]
    assert "step 1: loss nan, gradient norm 1.0: not finite, no update" in capsys.readouterr().out


def test_weights_and_biases_gets_the_logged_values(tmp_path, metrics_of, monkeypatch):
    calls = []
    stub = types.ModuleType("wandb")
    stub.__spec__ = importlib.machinery.ModuleSpec("wandb", None)
    started = {}
    run = types.SimpleNamespace(
        log=lambda values, step: calls.append((step, values)),
        finish=lambda exit_code: calls.append(exit_code),
    )
    stub.init = lambda **named: started.update(named) or run
    monkeypatch.setitem(sys.modules, "wandb", stub)
    metrics = metrics_of(log={"wandb": "project"}, config={"seed": 3})
    assert started == {
        "project": "project",
        "id": (tmp_path / "wandb-id").read_text().strip(),
        "name": tmp_path.name,
        "dir": str(tmp_path),
        "config": {"seed": 3},
        "resume": "allow",
    }
    metrics.evaluation(0, {"eval/x/loss": 5.0})
    metrics.step(record(1))
    metrics.step(record(2))
    metrics.close()
    assert calls[0] == (0, {"eval/x/loss": 5.0})
    assert [call[0] for call in calls[1:3]] == [1, 2]
    assert calls[1][1]["loss"] == 2.0
    assert "mfu" not in calls[1][1]
    assert calls[-1] == 0
    first = started["id"]
    with pytest.raises(ValueError, match="broken"), metrics_of(start=1, log={"wandb": "project"}):
        raise ValueError("broken")
    assert started["id"] == first
    assert calls[-1] == 1
    with pytest.raises(SystemExit), metrics_of(start=0, log={"wandb": "project"}):
        raise SystemExit(143)
    # A fresh run in the same folder is another run.
    assert started["id"] != first
    assert calls[-1] == 143


def test_the_real_weights_and_biases_continues_one_run(tiny_settings, tmp_path, monkeypatch):
    """Offline. Each attempt has a folder of its own, named by the same id, which `wandb sync` puts together."""
    pytest.importorskip("wandb", reason="wandb is not installed")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    settings = tiny_settings("pretrain", tmp_path / "run", checkpoint_every=3, heldout=[], log={"every": 1, "wandb": "komainu"})
    with monkeypatch.context() as patch:
        kill_at(patch, 4)
        with pytest.raises(Killed):
            pretrain.run(settings)
    pretrain.run(settings)
    name = (tmp_path / "run" / "wandb-id").read_text().strip()
    attempts = sorted((tmp_path / "run" / "wandb").glob("offline-run-*"))
    assert [folder.name.rsplit("-", 1)[1] for folder in attempts] == [name, name]
    assert all((folder / f"run-{name}.wandb").stat().st_size for folder in attempts)


def test_a_cpu_run_on_a_machine_with_a_gpu_logs_its_own_memory(metrics_of, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    metrics = metrics_of()
    metrics.step(record(1))
    metrics.step(record(2))
    line = lines_of(tmp_path)[0]
    assert line["memory_peak_rss_gib"] > 0
    assert not any(name.startswith("memory_allocated") for name in line)


def test_without_tensorboard_one_line_says_so_and_the_run_goes_on(tmp_path, metrics_of, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    monkeypatch.delitem(sys.modules, "torch.utils.tensorboard", raising=False)
    metrics = metrics_of(log={"tensorboard": True})
    said = "tensorboard is not installed: no event files (pip install tensorboard, or log.tensorboard = false)\n"
    assert capsys.readouterr().out == said
    metrics.step(record(1))
    metrics.step(record(2))
    assert [line["step"] for line in lines_of(tmp_path)] == [1, 2]
    assert not (tmp_path / "tensorboard").exists()


def test_weights_and_biases_without_its_package_is_refused(metrics_of, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ValueError, match=r"log.wandb is set but wandb is not installed"):
        metrics_of(log={"wandb": "project"})


def test_missing_weights_and_biases_is_found_before_anything_is_computed(tiny_settings, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    settings = tiny_settings("dpo", tmp_path / "run", log={"wandb": "project"})
    with pytest.raises(ValueError, match=r"log.wandb is set but wandb is not installed: pip install wandb"):
        open_run(settings, ("preferences",))
    assert not (tmp_path / "run").exists()


def test_settings_out_of_range_are_refused():
    with pytest.raises(ValueError, match=r"log.every = 0: must be at least 1"):
        LogSettings(every=0)
