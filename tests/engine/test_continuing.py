"""Runs that go on: with another length, behind a step that is not finite, from another folder, behind a trial."""

import json
import shutil
from pathlib import Path

import pytest

import engine.continuing
import engine.loop
from engine.checkpoint.state import checkpoints, read_state
from engine.data.plan import Plan
from engine.run import open_run
from recipes import dpo, sft
from tests.engine.test_run import refused

CONSTANT = {"schedule": {"kind": "constant", "peak": 3e-3, "warmup_steps": 2}}
FALLING = {"schedule": {"peak": 3e-3}}
QUIET = {"heldout": [], "log": {"every": 1, "tensorboard": False}}


@pytest.fixture
def no_trials(monkeypatch):
    """Runs of a few steps are no trials, so that the tests' runs can be real ones."""
    monkeypatch.setattr(engine.continuing, "TRIAL_STEPS", 0)


@pytest.mark.parametrize(
    "changes",
    [CONSTANT, pytest.param({"schedule": {"peak": 3e-3, "warmup_steps": 2}}, marks=pytest.mark.slow)],
    ids=["constant", "warm-up"],
)
def test_a_lengthened_run_ends_as_one_of_that_length(tiny_settings, assert_same_end, tmp_path, changes, capsys):
    """A finished run goes on where a longer run would be: in a constant schedule, or before the warm-up ends."""
    sft.run(tiny_settings("sft", tmp_path / "whole", steps=5, **changes, **QUIET))
    sft.run(tiny_settings("sft", tmp_path / "grown", steps=3, **changes, **QUIET))
    assert sft.run(tiny_settings("sft", tmp_path / "grown", steps=5, **changes, **QUIET)).name == "step-00000005"
    assert "note       the run has 5 steps now, and had 3\n" in capsys.readouterr().out
    assert_same_end(tmp_path / "whole", tmp_path / "grown")


def test_a_schedule_that_ends_with_the_run_fixes_its_length(tiny_settings, tmp_path, no_trials):
    out = tmp_path / "run"
    sft.run(tiny_settings("sft", out, steps=4, **QUIET))
    message = refused(sft, tiny_settings("sft", out, steps=8, **QUIET))
    assert message.startswith(
        f"{out}: holds a run of 4 steps, the settings now ask for 8; its cosine schedule ends with the run, so step 4 would "
        "have had the learning rate 0.002799 and not 0.0015. "
    )
    assert message.endswith(
        f"Branch instead: another out, from = {out}, and schedule.start = 4 for a schedule of the steps to come"
    )


def test_a_run_is_not_made_shorter_than_it_is(tiny_settings, tmp_path):
    out = tmp_path / "run"
    sft.run(tiny_settings("sft", out, steps=4, **CONSTANT, **QUIET))
    message = refused(sft, tiny_settings("sft", out, steps=3, **CONSTANT, **QUIET))
    assert message.startswith(f"{out}: has done 4 steps, and the settings now ask for 3 in all; raise steps or epochs")


@pytest.mark.slow
@pytest.mark.parametrize("merged", [False, True], ids=["short", "long"])
def test_more_epochs_say_what_the_seam_leaves_out_or_repeats(tiny_settings, tmp_path, capsys, merged):
    """The last step of the shorter run took what was left: less than a step, or more."""

    def settings(step_size, epochs):
        options = {"steps": None, "step_size": step_size, "epochs": epochs, **CONSTANT, **QUIET}
        return tiny_settings("sft", tmp_path / "run", **options)

    def plan_at(step_size, epochs=0.5):
        return open_run(settings(step_size, epochs), ("conversations",)).plan

    size = next(size for size in range(300, 400, 10) if plan_at(size).merged == merged)
    plan = plan_at(size)
    sft.run(settings(size, 0.5))
    longer = plan_at(size, 1.0)
    ours, theirs = (seen(each, range(plan.steps)) for each in (plan, longer))
    over, again = (sum(found.values()) for found in (difference(theirs, ours), difference(ours, theirs)))
    assert (over > 0, again > 0) == (not merged, merged)
    what = f"{again:,} tokens are seen once more" if merged else f"{over:,} tokens are left out"
    said = f"the run has {longer.steps} steps now, and had {plan.steps}; {what} where the earlier end was"
    assert said in capsys.readouterr().out
    assert sft.run(settings(size, 1.0)).name == f"step-{longer.steps:08d}"


def seen(plan: Plan, steps) -> dict[tuple[int, int], int]:
    """{(document, start): places} of these steps."""
    found = {}
    for step in steps:
        units = plan.units(step)
        found |= dict(zip(zip(units.document.tolist(), units.start.tolist(), strict=True), units.places.tolist(), strict=True))
    return found


def difference(a: dict, b: dict) -> dict:
    return {key: value for key, value in a.items() if key not in b}


def test_a_run_that_stopped_at_a_bad_step_passes_over_it(tiny_settings, metric_lines, tmp_path, monkeypatch):
    """`skip` is allowed on resuming, and the run ends as one that skips from its start."""
    accumulate = engine.loop.accumulate

    def poisoned(model, objective, step):
        values = accumulate(model, objective, step)
        return values | {"loss": values["loss"] * (float("nan") if step.index == 3 else 1.0)}

    monkeypatch.setattr(engine.loop, "accumulate", poisoned)
    options = {"checkpoint_every": 2, **QUIET}
    with pytest.raises(FloatingPointError, match=r"step 4: .* pass over it \(optimizer.nonfinite = skip\), or branch off"):
        sft.run(tiny_settings("sft", tmp_path / "torn", **options))
    assert [path.name for path in checkpoints(tmp_path / "torn")] == ["step-00000002"]
    skip = {"optimizer": {"nonfinite": "skip", "skip_limit": 3}}
    assert sft.run(tiny_settings("sft", tmp_path / "torn", **options, **skip)).name == "step-00000006"
    sft.run(tiny_settings("sft", tmp_path / "whole", **options, **skip))
    assert metric_lines(tmp_path / "torn") == metric_lines(tmp_path / "whole")
    skipped = [json.loads(line).get("skipped") for line in (tmp_path / "torn" / "metrics.jsonl").read_text().splitlines()]
    assert skipped == [None, None, None, 1.0, None, None]


@pytest.mark.parametrize(
    "rest", [{}, pytest.param({"steps": None, "epochs": 2.0}, marks=pytest.mark.slow)], ids=["steps", "epochs"]
)
def test_a_trial_moves_aside_for_the_real_run(tiny_settings, assert_same_end, tmp_path, capsys, rest):
    """Nothing of it is lost, and the real run is as without it. A dry run moves nothing."""
    out, options = tmp_path / "run", {**rest, **FALLING, **QUIET}
    sft.run(tiny_settings("sft", out, **options | {"steps": 2}))
    before = {path.name for path in out.iterdir()}
    sft.run(tiny_settings("sft", out, **options, dry_run=True))
    said = capsys.readouterr().out
    assert f"trial      {out} holds a trial of 2 steps that this longer run cannot continue; it moves aside" in said
    assert {path.name for path in out.iterdir()} == before
    sft.run(tiny_settings("sft", out, **options))
    assert f"note       the trial of 2 steps in {out} is now {out}-trial\n" in capsys.readouterr().out
    assert {path.name for path in Path(f"{out}-trial").iterdir()} == before
    sft.run(tiny_settings("sft", tmp_path / "whole", **options))
    assert_same_end(tmp_path / "whole", out)


@pytest.mark.slow
def test_a_trial_whose_steps_are_the_real_runs_is_continued(tiny_settings, assert_same_end, tmp_path):
    sft.run(tiny_settings("sft", tmp_path / "run", steps=3, **CONSTANT, **QUIET))
    sft.run(tiny_settings("sft", tmp_path / "run", **CONSTANT, **QUIET))
    sft.run(tiny_settings("sft", tmp_path / "whole", **CONSTANT, **QUIET))
    assert_same_end(tmp_path / "whole", tmp_path / "run")
    assert not Path(f"{tmp_path / 'run'}-trial").exists()


@pytest.mark.slow
def test_only_a_longer_run_takes_a_trials_folder(tiny_settings, tmp_path):
    out = tmp_path / "run"
    sft.run(tiny_settings("sft", out, steps=3, **QUIET))
    assert "holds a run with seed = 0, the settings now say 1" in refused(
        sft, tiny_settings("sft", out, steps=3, seed=1, **QUIET)
    )
    refused(sft, tiny_settings("sft", out, steps=9, seed=1, **QUIET, resume="never"), FileExistsError)
    assert open_run(tiny_settings("sft", out, steps=9, seed=1, **QUIET), ("conversations",)).trial.checkpoint.parent == out


@pytest.mark.slow
def test_a_trial_leaves_the_references_log_probabilities(tiny_settings, tmp_path, monkeypatch):
    """A second trial gets another name."""
    out = tmp_path / "run"
    for steps in (2, 3, 4):
        dpo.run(tiny_settings("dpo", out, steps=steps, **FALLING, **QUIET))
        monkeypatch.setattr("engine.objectives.reference._compute", None)
    assert (len(list((out / "reference").iterdir())), (out / "latest").read_text()) == (1, "step-00000004\n")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run", "run-trial", "run-trial-2"]


@pytest.mark.slow
def test_a_run_goes_on_elsewhere_with_its_data_and_tokenizer_copied(
    tiny_settings, tiny_data, tiny_model, assert_same_end, tmp_path
):
    """Everything is known by its content; changed content is named."""
    here, there = tmp_path / "here", tmp_path / "there"
    shutil.copytree(tiny_data.conversations, here / "data")
    shutil.copytree(tiny_model, here / "model")

    def settings(folder, run="run", **changes):
        paths = {"model": folder / "model", "tokenizer": folder / "model", "sources": folder / "data"}
        named = {name: str(path) for name, path in paths.items()}
        return tiny_settings("sft", folder / run, **(named | {"sources": [{"path": named["sources"]}], **QUIET} | changes))

    sft.run(settings(here, checkpoint_every=2, keep_checkpoints=9))
    shutil.copytree(here, there)
    whole = here.rename(tmp_path / "gone") / "run"
    for step in (4, 6):
        shutil.rmtree(there / "run" / f"step-0000000{step}")
    sft.run(settings(there, checkpoint_every=2, keep_checkpoints=9))
    assert_same_end(whole, there / "run")
    contents = read_state(there / "run" / "step-00000006").contents
    assert contents.keys() == {"tokenizer", "sources.0.path"}
    shutil.rmtree(there / "data")
    shutil.copytree(tiny_data.conversations_heldout, there / "data")
    message = refused(sft, settings(there))
    assert message.startswith(
        f"{there / 'run'}: the prepared data in {there / 'data'} changed since this run began; restore it"
    )
