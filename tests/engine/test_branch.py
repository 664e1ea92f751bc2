"""A branch starts from another run's checkpoint: with unchanged settings it ends with the bits of its parent's continuation."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from engine.checkpoint.state import Parent, fingerprint_of, read_state
from engine.checkpoint.verifying import problems
from engine.run import open_run
from recipes import dpo, pretrain, sft
from tests.engine.test_run import refused
from tests.engine.trajectories import metric_lines

RECIPES = {"pretrain": (pretrain, "text"), "sft": (sft, "conversations"), "dpo": (dpo, "preferences")}
BRANCHED = 4  # step of the checkpoint
QUIET = {"heldout": [], "log": {"every": 1, "tensorboard": False}}
NARROW = {"dtype": "bfloat16", "optimizer": {"moments": "bfloat16", "gradients": "float32"}}


def parent_settings(tiny_settings, stage, out, **changes):
    return tiny_settings(stage, out, **{"checkpoint_every": 2, "keep_checkpoints": 9, **QUIET} | changes)


def branch_settings(tiny_settings, stage, parent, out, **changes):
    """Without a model, as a branch needs none."""
    return parent_settings(tiny_settings, stage, out, **{"model": None, "from": str(parent)} | changes)


@pytest.fixture(scope="module")
def parents(tiny_settings, tmp_path_factory):
    """parents(stage, **changes) -> the folder of a finished run of six steps."""
    found = {}

    def make(stage, **changes):
        key = json.dumps([stage, changes])
        if key not in found:
            found[key] = tmp_path_factory.mktemp("parent") / stage
            RECIPES[stage][0].run(parent_settings(tiny_settings, stage, found[key], **changes))
        return found[key]

    return make


def checkpoint(folder, step=BRANCHED):
    return folder / f"step-{step:08d}"


@pytest.mark.parametrize(
    ("stage", "changes"),
    [
        ("sft", NARROW | {"neftune_alpha": 5.0}),
        ("dpo", {}),
        pytest.param("pretrain", {"optimizer": {"offload": "moments"}}, marks=pytest.mark.slow),
        pytest.param("dpo", NARROW | {"neftune_alpha": 5.0, "preference": {"loss": "ipo"}}, marks=pytest.mark.slow),
        pytest.param("dpo", {"preference": {"loss": "simpo", "beta": 2.0}}, marks=pytest.mark.slow),
    ],
)
def test_an_unchanged_branch_ends_as_its_parent(tiny_settings, parents, assert_same_end, tmp_path, monkeypatch, stage, changes):
    """The log begins where the parent's checkpoint is, with its name. The reference's log-probabilities are the parent's."""
    parent, out = parents(stage, **changes), tmp_path / "branch"
    monkeypatch.setattr("engine.objectives.reference._compute", None)
    RECIPES[stage][0].run(branch_settings(tiny_settings, stage, checkpoint(parent), out, **changes))
    first, *lines = (out / "metrics.jsonl").read_text().splitlines()
    assert json.loads(first) == {"step": BRANCHED, "parent": str(checkpoint(parent))}
    (out / "metrics.jsonl").write_text("".join(f"{line}\n" for line in lines))
    theirs = Path(shutil.copytree(parent, tmp_path / "parent"))
    logged = (theirs / "metrics.jsonl").read_text().splitlines(keepends=True)
    (theirs / "metrics.jsonl").write_text("".join(line for line in logged if json.loads(line)["step"] > BRANCHED))
    assert_same_end(theirs, out)
    state = read_state(checkpoint(out, 6))
    assert state.parent == Parent(str(checkpoint(parent)), BRANCHED, fingerprint_of(checkpoint(parent)))
    assert state.model == read_state(checkpoint(parent)).model
    assert not list(problems(checkpoint(out, 6)))


@pytest.mark.slow
def test_a_branch_without_the_optimizer_keeps_the_masters_and_begins_its_moments(tiny_settings, parents, tmp_path):
    parent = parents("sft", **NARROW)
    settings = branch_settings(tiny_settings, "sft", parent, tmp_path / "run", steps=7, from_optimizer=False, **NARROW)
    sft.run(settings)
    (line,) = metric_lines(tmp_path / "run")[1:]
    assert line["step"] == 7
    before, after = (_optimizer(checkpoint(folder, step)) for folder, step in ((parent, 6), (tmp_path / "run", 7)))
    for name, moment in after.items():
        if name.endswith("exp_avg"):
            # One update from 0: (1 - beta1) * gradient, far from the parent's mean.
            assert not torch.allclose(moment.float(), before[name].float(), rtol=0.1)
    state = json.loads((checkpoint(tmp_path / "run", 7) / "training" / "state.json").read_text())
    assert (state["step"], state["updates"]) == (7, 1)
    # A rate of almost 0 moves no master: its low bits were taken over.
    still = {"schedule": {"kind": "constant", "peak": 1e-30}}
    sft.run(branch_settings(tiny_settings, "sft", parent, tmp_path / "still", steps=7, from_optimizer=False, **NARROW | still))
    for name, remainder in _optimizer(checkpoint(tmp_path / "still", 7)).items():
        if name.endswith("remainder"):
            torch.testing.assert_close(remainder, before[name], rtol=0, atol=0)


def _optimizer(folder):
    files = sorted((folder / "training" / "optimizer").glob("*.safetensors"))
    return {name: tensor for file in files for name, tensor in load_file(file).items()}


@pytest.mark.slow
def test_a_branch_may_begin_other_data_at_step_0(tiny_settings, tiny_data, parents, tmp_path, capsys):
    """From the run folder's newest checkpoint, with the optimizer's moments."""
    out = tmp_path / "run"
    changes = {"sources": [{"path": str(tiny_data.text)}], "step_size": 300, "steps": 2, "from_data": False}
    settings = branch_settings(tiny_settings, "sft", parents("sft"), out, **changes)
    sft.run(settings)
    said = capsys.readouterr().out
    newest = checkpoint(parents("sft"), 6)
    assert f"branch     of {newest}, step 6: weights, the optimizer's moments taken over, the data order begun anew\n" in said
    assert [line["step"] for line in metric_lines(out)] == [0, 1, 2]
    state = json.loads((checkpoint(out, 2) / "training" / "state.json").read_text())
    assert (state["step"], state["updates"], state["parent"]["step"]) == (2, 8, 6)


def test_a_branch_gives_the_steps_to_come_a_schedule(tiny_settings, parents, tmp_path):
    """Six finished steps, then a warm-up and a decay of their own."""
    schedule = {"kind": "linear", "peak": 1e-3, "warmup_steps": 2, "start": 6}
    out = tmp_path / "run"
    sft.run(branch_settings(tiny_settings, "sft", parents("sft"), out, steps=10, schedule=schedule))
    assert [line["learning_rate"] for line in metric_lines(out)[1:]] == pytest.approx([5e-4, 1e-3, 1e-3, 5e-4])
    message = refused(
        sft, branch_settings(tiny_settings, "sft", parents("sft"), tmp_path / "a", steps=10, schedule=schedule | {"start": 7})
    )
    assert message == "schedule.start = 7: the run begins after step 6; lower it"


@pytest.mark.slow
def test_a_stopped_branch_resumes_without_its_parent(tiny_settings, parents, assert_same_end, tmp_path):
    """Or with its parent's checkpoint elsewhere; another checkpoint is refused."""
    parent = Path(shutil.copytree(parents("sft"), tmp_path / "parent"))
    for name in ("whole", "torn"):
        sft.run(branch_settings(tiny_settings, "sft", checkpoint(parent, 2), tmp_path / name))
    shutil.rmtree(checkpoint(tmp_path / "torn", 6))

    def torn(origin):
        return branch_settings(tiny_settings, "sft", origin, tmp_path / "torn")

    assert f"holds a run with from = '{checkpoint(parent, 2)}', the settings now say '{checkpoint(parent)}'" in refused(
        sft, torn(checkpoint(parent))
    )
    moved = checkpoint(parent, 2).rename(tmp_path / "elsewhere")
    assert open_run(torn(moved), ("conversations",)).start == 4
    shutil.rmtree(moved)
    assert sft.run(torn(checkpoint(parent, 2))).name == "step-00000006"
    assert_same_end(tmp_path / "whole", tmp_path / "torn")


@pytest.mark.slow
def test_a_branch_that_was_killed_before_its_first_checkpoint_begins_anew(tiny_settings, parents, tmp_path):
    """Its log has each line once."""
    out = tmp_path / "run"
    settings = branch_settings(tiny_settings, "sft", checkpoint(parents("sft")), out)
    sft.run(settings)
    shutil.rmtree(checkpoint(out, 6))
    sft.run(settings)
    assert [line["step"] for line in metric_lines(out)] == [4, 5, 6]


@pytest.mark.slow
def test_the_reference_of_a_branch_is_its_parents(tiny_settings, tiny_model, parents, tmp_path, capsys):
    """Where the parent's folder lacks the tables, its starting model computes them; another model may be named."""
    parent = Path(shutil.copytree(parents("dpo"), tmp_path / "parent"))
    for name in ("reference", "reference.json"):
        path = parent / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    dpo.run(branch_settings(tiny_settings, "dpo", checkpoint(parent), tmp_path / "run"))
    assert f"the data order taken over; the reference is {tiny_model}\n" in capsys.readouterr().out
    ours, theirs = (load_file(next((folder / "reference").iterdir())) for folder in (tmp_path / "run", parents("dpo")))
    torch.testing.assert_close(ours["log_probs"], theirs["log_probs"], rtol=0, atol=0, equal_nan=True)
    other = {"model": str(checkpoint(parents("sft"), 2)), "steps": 5}
    dpo.run(branch_settings(tiny_settings, "dpo", checkpoint(parent), tmp_path / "other", **other))
    ours = load_file(next((tmp_path / "other" / "reference").iterdir()))
    assert not torch.allclose(ours["log_probs"], theirs["log_probs"], equal_nan=True)


@pytest.mark.slow
def test_preference_tuning_that_branches_off_another_kind_of_run_has_the_checkpoint_as_its_reference(
    tiny_settings, parents, tmp_path
):
    """So its margins begin at 0."""
    origin = checkpoint(parents("sft"))
    out = tmp_path / "run"
    dpo.run(branch_settings(tiny_settings, "dpo", origin, out, from_data=False, steps=1))
    assert metric_lines(out)[1]["rewards/margins"] == pytest.approx(0, abs=1e-6)
    assert read_state(checkpoint(out, 1)).settings["model"] == str(origin)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"step_size": 300}, "as step_size = 256, the settings now say 300; restore it, or set from_data = false"),
        ({"seed": 1}, "as seed = 0, the settings now say 1; restore it, or set from_data = false"),
        ({"steps": 4}, "has done 4 steps, and the settings ask for 4 in all; raise steps or epochs, or set from_data"),
        (
            {"dtype": "bfloat16"},
            "holds an optimizer's state of dtype = 'float32'; set dtype to that, or from_optimizer = false",
        ),
        ({"optimizer": {"moments": "bfloat16"}}, "of optimizer.moments = 'float32'; set optimizer.moments to that, or"),
        ({"replay": 4}, "replay = 4: the run has the steps 5 to 6"),
        ({"model": "preset:tiny"}, "model = preset:tiny: a branch begins with the weights of from = "),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_branch_that_cannot_be_is_refused(tiny_settings, parents, tmp_path, changes, said):
    assert said in refused(sft, branch_settings(tiny_settings, "sft", checkpoint(parents("sft")), tmp_path / "run", **changes))


def test_a_branch_needs_a_checkpoint_and_a_folder_of_its_own(tiny_settings, tiny_model, tiny_data, parents, tmp_path):
    parent = parents("sft")
    for name, said in [
        (tiny_model, "neither a checkpoint nor a run folder that holds one; a model without training state is named as model"),
        (tmp_path / "nowhere", "no such folder"),
    ]:
        message = refused(sft, branch_settings(tiny_settings, "sft", name, tmp_path / "run"), FileNotFoundError)
        assert message.startswith(f"from = {name}: {said}")
    for name in (parent, checkpoint(parent)):
        assert f"from = {name} lies in out = {parent}: a branch needs its own folder" in refused(
            sft, branch_settings(tiny_settings, "sft", name, parent)
        )
    other = {"sources": [{"path": str(tiny_data.conversations_heldout)}]}
    message = refused(sft, branch_settings(tiny_settings, "sft", parent, tmp_path / "run", **other, steps=9))
    assert f"the prepared data in {tiny_data.conversations_heldout} is other data than its own; restore it" in message


@pytest.mark.slow
def test_a_branch_names_its_parents_model_or_none(tiny_settings, tiny_model, parents, tmp_path):
    """The parent's configuration with --from and --out is enough; the model may have moved."""
    moved = shutil.copytree(tiny_model, tmp_path / "moved")
    for model in (tiny_model, moved):
        settings = branch_settings(tiny_settings, "sft", checkpoint(parents("sft")), tmp_path / "run", model=str(model))
        assert open_run(settings, ("conversations",)).start == BRANCHED
