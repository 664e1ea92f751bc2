"""The frozen reference's log-probabilities: computed once, kept, and never used for another model or other data."""

import dataclasses
import hashlib
import json
import math
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import engine.objectives.reference
import engine.run
from engine.data.batch import Packing, evaluation_batches
from engine.data.dataset import DatasetWriter, TokenDataset
from engine.objectives.preference import reference_log_probs
from engine.objectives.reference import config_hash
from model.config import MistralConfig
from model.weights import load_model, save_model
from recipes import dpo

BOTH = ["source 0", "heldout preferences-heldout"]


@pytest.fixture
def computed(monkeypatch):
    """The names of the sets whose log-probabilities the test computed."""
    names = []
    compute = engine.objectives.reference._compute

    def counted(run, model, name, dataset, batches):
        names.append(name)
        return compute(run, model, name, dataset, batches)

    monkeypatch.setattr(engine.objectives.reference, "_compute", counted)
    return names


@pytest.fixture
def loaded(monkeypatch):
    """The initial models that the test loaded."""
    calls = []
    load = engine.run.Run.load_initial_model

    def counted(run):
        calls.append(run.settings.model)
        return load(run)

    monkeypatch.setattr(engine.run.Run, "load_initial_model", counted)
    return calls


@pytest.fixture(scope="module")
def model_copy(tiny_model, tmp_path_factory):
    return Path(shutil.copytree(tiny_model, tmp_path_factory.mktemp("copy") / "model"))


@pytest.fixture(scope="module")
def finished(tiny_settings, model_copy, tmp_path_factory):
    """The folder of a run of six steps with checkpoints after three and six."""
    out = tmp_path_factory.mktemp("finished") / "run"
    dpo.run(tiny_settings("dpo", out, model=str(model_copy), checkpoint_every=3))
    return out


@pytest.fixture
def cache(finished, tmp_path):
    """A copy of the finished run's log-probabilities."""
    return Path(shutil.copytree(finished / "reference", tmp_path / "cache"))


@pytest.fixture
def one_step(tiny_settings, model_copy, tmp_path, cache):
    """one_step(**changes): another run, of one step, with the finished run's log-probabilities at hand."""

    def run(**changes):
        given = {"model": str(model_copy), "reference_cache": str(cache), "steps": 1} | changes
        dpo.run(tiny_settings("dpo", tmp_path / "run", **given))

    return run


@pytest.fixture
def killed(finished, tmp_path):
    """A copy of the finished run as a kill after step 3 would have left it."""
    out = Path(shutil.copytree(finished, tmp_path / "killed"))
    shutil.rmtree(out / "step-00000006")
    return out


@pytest.fixture
def resume(tiny_settings, model_copy, killed):
    """resume(**changes): continue the killed run."""
    return lambda **changes: dpo.run(tiny_settings("dpo", killed, model=str(model_copy), checkpoint_every=3, **changes))


def exchanged(folder, out):
    """A copy of a prepared folder with chosen and rejected answers exchanged."""
    pairs = TokenDataset.open(folder)
    out.mkdir()
    with DatasetWriter(out, "preferences", vocab_size=340, tokenizer_fingerprint=pairs.tokenizer_fingerprint) as writer:
        for i in range(len(pairs)):
            writer.add(pairs.tokens(i ^ 1), pairs.trained(i ^ 1), int(pairs.prompt_lengths[i ^ 1]))
        writer.finish()
    return out


@torch.no_grad()
def change_weights(folder, out):
    model = load_model(folder)
    model.norm.weight[3] += 1e-3
    save_model(model, out)


def test_computed_once_for_the_same_weights_and_data(finished, cache, one_step, tiny_model, tiny_data, tmp_path, computed):
    tables = [load_file(file)["log_probs"] for file in (finished / "reference").iterdir()]
    assert sorted(map(len, tables)) == [6, 32]
    pairs = TokenDataset.open(tiny_data.preferences)
    expected = reference_log_probs(load_model(tiny_model), evaluation_batches(pairs, Packing(16, 300), 64), 32)
    torch.testing.assert_close(max(tables, key=len), expected, rtol=1e-5, atol=1e-4)
    # Another seed, another loss, another micro-batch size, another layout: the same reference.
    one_step(seed=1, preference={"loss": "hinge"}, pack_tokens=200, share_prompts=False)
    assert computed == []
    assert not (tmp_path / "run" / "reference").exists()
    assert len(list(cache.iterdir())) == 2


CONFIGURATIONS = [
    {"sliding_window": 8},
    {"rms_norm_eps": 1e-3},
    {"rope_parameters": {"rope_theta": 500.0}},
]


@pytest.mark.parametrize("change", CONFIGURATIONS, ids=lambda change: next(iter(change)))
def test_computed_again_for_another_configuration_of_the_same_weights(one_step, cache, tiny_model, tmp_path, computed, change):
    """The policy is the reference before the first update, so every margin is 0."""
    other = Path(shutil.copytree(tiny_model, tmp_path / "other"))
    config = other / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | change))
    one_step(model=str(other))
    assert computed == BOTH
    first = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[0])
    assert first["eval/preferences-heldout/loss"] == pytest.approx(math.log(2), abs=1e-4)


def test_every_field_of_the_configuration_counts_but_four():
    """A field that is added later counts as well, until someone decides otherwise."""
    base = MistralConfig()
    free = {"max_position_embeddings", "initializer_range", "bos_token_id", "eos_token_id"}
    for field in dataclasses.fields(MistralConfig):
        other = dataclasses.replace(base)
        object.__setattr__(other, field.name, "another value")
        assert (config_hash(other) == config_hash(base)) == (field.name in free), field.name


@pytest.mark.parametrize("change", ["weight", "dtype", "dataset", "context"])
def test_computed_again_after_a_change(one_step, cache, tiny_model, tiny_data, tmp_path, computed, change):
    if change == "weight":
        (tmp_path / "other").mkdir()
        change_weights(tiny_model, tmp_path / "other")
        one_step(model=str(tmp_path / "other"), tokenizer=str(tiny_model))
    elif change == "dtype":
        one_step(dtype="bfloat16")
    elif change == "dataset":
        one_step(sources=[{"path": str(exchanged(tiny_data.preferences, tmp_path / "exchanged"))}])
    else:
        one_step(context_length=60)
    assert computed == (BOTH[:1] if change == "dataset" else BOTH)
    assert len(list(cache.iterdir())) == 2 + len(computed)


def test_a_damaged_file_is_computed_again(one_step, cache, computed):
    whole = {file.name: file.read_bytes() for file in cache.iterdir()}
    first, second = sorted(cache.iterdir())
    os.truncate(first, first.stat().st_size // 2)
    save_file({"log_probs": torch.zeros(3, 2)}, second)
    one_step()
    assert computed == BOTH
    assert {file.name: file.read_bytes() for file in cache.iterdir()} == whole


@pytest.mark.parametrize("lost", ["nothing", "manifest", "tables"])
def test_a_resumed_run_computes_only_what_was_lost(finished, killed, resume, metric_lines, computed, loaded, lost):
    if lost == "manifest":
        (killed / "reference.json").unlink()
    if lost == "tables":
        shutil.rmtree(killed / "reference")
    resume()
    assert computed == (BOTH if lost == "tables" else [])
    assert len(loaded) == (lost != "nothing")
    assert metric_lines(killed) == metric_lines(finished)


def test_a_resumed_run_scores_a_changed_held_out_set(killed, resume, tiny_data, tmp_path, metric_lines, computed):
    """Held-out sets may change on resuming: a set of the same name and size is not taken for the old set."""
    changed = exchanged(tiny_data.preferences_heldout, tmp_path / "preferences-heldout")
    resume(heldout=[str(changed)])
    assert computed == BOTH[1:]
    del computed[:]
    shutil.rmtree(killed / "step-00000006")
    resume(heldout_limit=2)
    assert computed == BOTH[1:]
    assert all(torch.tensor(list(line.values())).isfinite().all() for line in metric_lines(killed))


def test_a_changed_reference_is_refused_on_resuming(killed, resume, model_copy, tmp_path):
    shutil.rmtree(killed / "reference")
    whole = shutil.copytree(model_copy, tmp_path / "whole")
    change_weights(whole, model_copy)
    try:
        with pytest.raises(ValueError, match=r"its weights changed since the run in .* began"):
            resume()
    finally:
        shutil.copytree(whole, model_copy, dirs_exist_ok=True)
    assert json.loads((killed / "reference.json").read_text()).keys() == {"weights", "config"}


def test_a_run_that_began_before_the_configuration_counted_finds_its_tables(
    finished, killed, tiny_settings, resume, tiny_data, metric_lines, computed, loaded
):
    """Its manifest holds the weights alone, and so do the names of its files."""
    manifest = killed / "reference.json"
    weights = json.loads(manifest.read_text())["weights"]
    manifest.write_text(json.dumps({"weights": weights}))
    tables = {len(load_file(file)["log_probs"]): file for file in (killed / "reference").iterdir()}
    for folder in (tiny_data.preferences, tiny_data.preferences_heldout):
        dataset = TokenDataset.open(folder)
        pairs = np.repeat(np.arange(len(dataset) // 2), 2).tobytes()
        name = hashlib.sha256(f"1 {weights} {dataset.fingerprint} 64\n".encode() + pairs).hexdigest()[:32]
        tables[len(dataset) // 2].rename(killed / "reference" / f"{name}.safetensors")
    resume()
    assert (computed, loaded) == ([], [])
    assert metric_lines(killed) == metric_lines(finished)


@pytest.mark.parametrize("denied", [False, True])
def test_a_cache_that_cannot_be_written_is_refused_before_computing(one_step, tmp_path, computed, monkeypatch, denied):
    """`os.access` is replaced, as nothing denies the superuser permission."""
    file = tmp_path / "file"
    if denied:
        file.mkdir()
        monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != file)
    else:
        file.write_text("")
    reason = f"no permission for {file}" if denied else f"{file} is not a folder"
    with pytest.raises(OSError, match=rf"cache: cannot be written: {reason}; choose another reference_cache"):
        one_step(reference_cache=str(file / "cache"))
    assert computed == []
    assert not (tmp_path / "run").exists()
