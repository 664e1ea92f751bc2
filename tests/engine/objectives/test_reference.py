"""The frozen reference's log-probabilities: computed once, kept, and never taken for another model's or data's."""

import json
import os

import pytest
import torch
from safetensors.torch import load_file, save_file

import engine.objectives.reference
import engine.run
from engine.data.batch import Packing, evaluation_batches
from engine.data.dataset import DatasetWriter, TokenDataset
from engine.objectives.preference import reference_log_probs
from model.weights import load_model, save_model
from recipes import dpo


@pytest.fixture
def computed(monkeypatch):
    """The names of the sets whose log-probabilities were computed since."""
    names = []
    compute = engine.objectives.reference._compute

    def counted(run, model, name, dataset, batches):
        names.append(name)
        return compute(run, model, name, dataset, batches)

    monkeypatch.setattr(engine.objectives.reference, "_compute", counted)
    return names


@pytest.fixture
def loaded(monkeypatch):
    """How often a run's initial model was loaded since."""
    calls = []
    load = engine.run.Run.load_initial_model

    def counted(run):
        calls.append(run.settings.model)
        return load(run)

    monkeypatch.setattr(engine.run.Run, "load_initial_model", counted)
    return calls


def cut_back(out, step):
    """Leave the run as a kill after `step` would have: without its later checkpoints."""
    for folder in out.glob("step-*"):
        if int(folder.name.removeprefix("step-")) > step:
            folder.rename(folder.with_name("removed" + folder.name))


def exchanged(folder, out):
    """A copy of a prepared folder whose rejected answers are the chosen ones."""
    pairs = TokenDataset.open(folder)
    out.mkdir()
    with DatasetWriter(out, "preferences", vocab_size=340, tokenizer_fingerprint=pairs.tokenizer_fingerprint) as writer:
        for i in range(len(pairs)):
            writer.add(pairs.tokens(i ^ 1), pairs.trained(i ^ 1), int(pairs.prompt_lengths[i ^ 1]))
        writer.finish()
    return out


BOTH = ["source 0", "heldout preferences-heldout"]


def test_computed_once_for_the_same_weights_and_data(tiny_settings, tiny_model, tiny_data, tmp_path, computed):
    cache = str(tmp_path / "cache")
    dpo.run(tiny_settings("dpo", tmp_path / "a", reference_cache=cache))
    assert computed == BOTH
    tables = [load_file(file)["log_probs"] for file in (tmp_path / "cache").iterdir()]
    pairs = TokenDataset.open(tiny_data.preferences)
    batches = evaluation_batches(pairs, Packing(16, 300), 64)
    expected = reference_log_probs(load_model(tiny_model), batches, 32)
    torch.testing.assert_close(next(table for table in tables if len(table) == 32), expected, rtol=1e-5, atol=1e-4)
    # Another seed, another loss, another micro-batch size, another layout: the same reference.
    changes = {"seed": 1, "preference": {"loss": "hinge"}, "pack_tokens": 200, "share_prompts": False}
    dpo.run(tiny_settings("dpo", tmp_path / "b", reference_cache=cache, **changes))
    assert computed == BOTH
    assert not (tmp_path / "a" / "reference").exists()


def test_kept_in_the_run_folder_by_default(tiny_settings, tmp_path, computed):
    dpo.run(tiny_settings("dpo", tmp_path / "run", dtype="bfloat16"))
    assert computed == BOTH
    assert len(list((tmp_path / "run" / "reference").iterdir())) == 2


@pytest.mark.parametrize("change", ["weight", "dtype", "dataset", "context"])
def test_computed_again_when_something_changed(tiny_settings, tiny_model, tiny_data, tmp_path, computed, change):
    cache = str(tmp_path / "cache")
    dpo.run(tiny_settings("dpo", tmp_path / "a", reference_cache=cache))
    changes, expected = {}, BOTH
    if change == "weight":
        model = load_model(tiny_model)
        with torch.no_grad():
            model.norm.weight[3] += 1e-3
        (tmp_path / "other").mkdir()
        save_model(model, tmp_path / "other")
        changes = {"model": str(tmp_path / "other"), "tokenizer": str(tiny_model)}
    elif change == "dtype":
        changes = {"dtype": "bfloat16"}
    elif change == "dataset":
        # As many pairs, chosen and rejected exchanged.
        changes = {"sources": [{"path": str(exchanged(tiny_data.preferences, tmp_path / "exchanged"))}]}
        expected = ["source 0"]
    else:
        changes = {"context_length": 60}
    dpo.run(tiny_settings("dpo", tmp_path / "b", reference_cache=cache, **changes))
    assert computed == BOTH + expected


def test_a_damaged_file_is_computed_again(tiny_settings, tmp_path, computed):
    cache = tmp_path / "cache"
    dpo.run(tiny_settings("dpo", tmp_path / "a", reference_cache=str(cache)))
    whole = {file.name: file.read_bytes() for file in cache.iterdir()}
    first, second = sorted(cache.iterdir())
    os.truncate(first, first.stat().st_size // 2)
    save_file({"log_probs": torch.zeros(3, 2)}, second)
    dpo.run(tiny_settings("dpo", tmp_path / "b", reference_cache=str(cache)))
    assert sorted(computed) == sorted(BOTH * 2)
    assert {file.name: file.read_bytes() for file in cache.iterdir()} == whole


def test_a_resumed_run_does_not_load_the_reference(tiny_settings, tmp_path, computed, loaded):
    dpo.run(tiny_settings("dpo", tmp_path / "run", checkpoint_every=3))
    cut_back(tmp_path / "run", 3)
    del computed[:], loaded[:]
    dpo.run(tiny_settings("dpo", tmp_path / "run", checkpoint_every=3))
    assert computed == loaded == []


@pytest.mark.parametrize("lost", ["manifest", "tables"])
def test_a_resumed_run_computes_what_was_lost(tiny_settings, tmp_path, metric_lines, computed, lost):
    out = tmp_path / "run"
    dpo.run(tiny_settings("dpo", out, checkpoint_every=3))
    lines = metric_lines(out)
    cut_back(out, 3)
    for file in [out / "reference.json"] if lost == "manifest" else (out / "reference").iterdir():
        file.unlink()
    del computed[:]
    dpo.run(tiny_settings("dpo", out, checkpoint_every=3))
    assert computed == ([] if lost == "manifest" else BOTH)
    assert metric_lines(out) == lines


def test_a_resumed_run_scores_a_changed_held_out_set(tiny_settings, tiny_data, tmp_path, metric_lines, computed):
    """Held-out sets may change on resuming: one of the same name and size is not taken for the old one."""
    out = tmp_path / "run"
    dpo.run(tiny_settings("dpo", out, checkpoint_every=3, heldout_limit=2))
    cut_back(out, 3)
    del computed[:]
    dpo.run(tiny_settings("dpo", out, checkpoint_every=3))
    assert computed == BOTH[1:]
    assert all(torch.tensor(list(line.values())).isfinite().all() for line in metric_lines(out))


def test_a_changed_reference_is_refused_on_resuming(tiny_settings, tiny_model, tmp_path):
    folder = tmp_path / "model"
    model = load_model(tiny_model)
    folder.mkdir()
    save_model(model, folder)
    settings = tiny_settings("dpo", tmp_path / "run", checkpoint_every=3, model=str(folder), tokenizer=str(tiny_model))
    dpo.run(settings)
    cut_back(tmp_path / "run", 3)
    for file in (tmp_path / "run" / "reference").iterdir():
        file.unlink()
    with torch.no_grad():
        model.norm.weight[3] += 1e-3
    save_model(model, folder)
    with pytest.raises(ValueError, match=r"its weights have changed since the run in .* began"):
        dpo.run(settings)
    assert json.loads((tmp_path / "run" / "reference.json").read_text()).keys() == {"weights"}
