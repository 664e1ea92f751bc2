"""A run that cannot work is refused before its first step, in one line with the cause and the remedy, and writes nothing."""

import dataclasses
import json
import os
import shutil
import socket
import tomllib
from pathlib import Path

import pytest
import torch

from engine.data.dataset import DatasetWriter, TokenDataset
from engine.data.stream import step_stream
from engine.observe.preview import describe
from engine.optim.adamw import AdamW
from engine.run import open_run
from engine.settings.training import FREE_ON_RESUME
from model.config import read_config
from model.vocabulary.export import write_tokenizer_folder
from model.vocabulary.tokenizer import Tokenizer, mistral_tokenizer_path
from recipes import dpo, pretrain, sft

RECIPES = {"pretrain": pretrain, "sft": sft, "dpo": dpo}


def refused(recipe, settings, error=ValueError):
    """The message of the refusal. The run folder must stay unchanged."""
    out = Path(settings.out)
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")} if out.is_dir() else None
    with pytest.raises(error) as caught:
        recipe.run(settings)
    assert "\n" not in str(caught.value)
    assert ({path: path.stat().st_mtime_ns for path in out.rglob("*")} if out.is_dir() else None) == before
    return str(caught.value)


@pytest.mark.parametrize(
    ("stage", "kind", "expected"),
    [
        ("pretrain", "conversations", "holds conversations, this recipe trains on text"),
        ("pretrain", "preferences", "holds preferences, this recipe trains on text"),
        ("sft", "preferences", "holds preferences, this recipe trains on conversations or text"),
        ("dpo", "conversations", "holds conversations, this recipe trains on preferences"),
    ],
)
def test_data_of_another_kind_is_refused(tiny_settings, tiny_data, tmp_path, stage, kind, expected):
    folder = str(getattr(tiny_data, kind))
    settings = tiny_settings(stage, tmp_path / "run", sources=[{"path": folder}], heldout=[])
    assert refused(RECIPES[stage], settings) == f"{folder}: {expected}"
    settings = tiny_settings(stage, tmp_path / "run", heldout=[folder])
    assert refused(RECIPES[stage], settings) == f"{folder}: {expected}"


def test_text_may_be_mixed_into_conversations(tiny_settings, tiny_data, tmp_path):
    sources = [{"path": str(tiny_data.conversations), "share": 0.8}, {"path": str(tiny_data.text), "share": 0.2}]
    last = sft.run(tiny_settings("sft", tmp_path / "run", sources=sources, steps=2))
    assert last.name == "step-00000002"


def test_data_of_another_tokenizer_is_refused(tiny_settings, tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    with DatasetWriter(folder, "text", vocab_size=340, tokenizer_fingerprint="0" * 64) as writer:
        writer.add([1, 5, 6, 2])
        writer.finish()
    message = refused(pretrain, tiny_settings("pretrain", tmp_path / "run", sources=[{"path": str(folder)}]))
    assert message == f"{folder}: was prepared with another tokenizer than the model's; prepare it again with recipes.prepare"


@pytest.mark.parametrize(
    ("changes", "error", "parts"),
    [
        ({"model": "nowhere/at/all"}, FileNotFoundError, ["nowhere/at/all", "no such folder"]),
        ({"sources": [{"path": "nowhere"}]}, FileNotFoundError, ["nowhere", "recipes.prepare"]),
        ({"heldout": ["nowhere"]}, FileNotFoundError, ["nowhere", "recipes.prepare"]),
        ({"tokenizer": "nowhere"}, FileNotFoundError, ["nowhere", "no such folder"]),
        ({"model": "preset:tiny"}, ValueError, ["preset:tiny", "a preset has no tokenizer", "name its folder as tokenizer"]),
        ({"context_length": 129}, ValueError, ["context_length = 129", "max_position_embeddings = 128"]),
        ({"step_size": 20}, ValueError, ["step_size = 20", "raise step_size or lower context_length"]),
        ({"pack_tokens": 20}, ValueError, ["pack_tokens = 20", "(32 tokens)", "raise it, or leave it out"]),
        ({"steps": None}, ValueError, ["neither steps nor epochs"]),
        ({"steps": 100, "epochs": 1}, ValueError, ["steps = 100", "lower steps, raise epochs"]),
    ],
)
def test_settings_that_do_not_fit_are_named(tiny_settings, tmp_path, changes, error, parts):
    message = refused(pretrain, tiny_settings("pretrain", tmp_path / "run", **changes), error)
    for part in parts:
        assert part in message


def test_an_unknown_preset_names_the_nearest(tiny_settings, tiny_tokenizer, tmp_path):
    settings = tiny_settings("pretrain", tmp_path / "run", model="preset:tinny", tokenizer=str(tiny_tokenizer))
    assert refused(pretrain, settings) == "unknown preset 'tinny'; the nearest known one is 'tiny'"


def test_a_preset_takes_its_vocabulary_from_the_tokenizer(tiny_settings, tiny_tokenizer, tmp_path):
    changes = {"model": "preset:tiny", "tokenizer": str(tiny_tokenizer), "steps": 1}
    checkpoints = [pretrain.run(tiny_settings("pretrain", tmp_path / name, **changes)) for name in "ab"]
    config = read_config(checkpoints[0])
    assert (config.vocab_size, config.unpadded_vocab_size, config.hidden_size) == (384, 340, 64)
    tokenizer = Tokenizer.load(tiny_tokenizer)
    assert (config.bos_token_id, config.eos_token_id) == (tokenizer.bos_id, tokenizer.eos_id)
    weights = [(folder / "model-00001-of-00001.safetensors").read_bytes() for folder in checkpoints]
    assert weights[0] == weights[1]
    other = pretrain.run(tiny_settings("pretrain", tmp_path / "c", **changes, seed=1))
    assert (other / "model-00001-of-00001.safetensors").read_bytes() != weights[0]


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("preset:tinny", "unknown preset 'tinny'; the nearest known one is 'tiny'"),
        ("preset:", "the preset has no name; the known ones are mistral-7b"),
        ("", "model is empty"),
    ],
)
def test_a_model_that_cannot_be_meant_is_refused(tiny_settings, tmp_path, model, message):
    assert message in refused(pretrain, tiny_settings("pretrain", tmp_path / "run", model=model))


def test_a_run_folder_that_is_the_starting_model_is_refused(tiny_settings, tiny_model):
    assert "the run would write into its starting model" in refused(pretrain, tiny_settings("pretrain", tiny_model))


def test_a_tokenizer_larger_than_the_model_is_refused(tiny_settings, tmp_path):
    write_tokenizer_folder(tmp_path / "large", mistral_tokenizer_path().read_bytes())
    message = refused(pretrain, tiny_settings("pretrain", tmp_path / "run", tokenizer=str(tmp_path / "large")))
    assert "the tokenizer has 32,000" in message
    assert "rows for 340" in message
    assert "or resize the model with recipes.vocabulary" in message


def test_two_held_out_folders_of_one_name_are_refused(tiny_settings, tiny_data, tmp_path):
    copy = shutil.copytree(tiny_data.text_heldout, tmp_path / "copy" / tiny_data.text_heldout.name)
    settings = tiny_settings("pretrain", tmp_path / "run", heldout=[str(tiny_data.text_heldout), str(copy)])
    assert "two folders share a name" in refused(pretrain, settings)


@pytest.mark.filterwarnings("ignore:.*left out of the evaluation")
def test_held_out_pairs_that_are_all_too_long_are_refused(tiny_settings, tiny_data, tmp_path):
    """All pairs, or all pairs within the limit."""
    places = TokenDataset.open(tiny_data.preferences_heldout).lengths.reshape(-1, 2).max(axis=1) - 1
    assert places[0] > places.min()
    for context_length, limit in [(int(places.min()) - 1, None), (int(places[0]) - 1, 1)]:
        changes = {"context_length": context_length, "heldout_limit": limit}
        for dry_run in (False, True):
            message = refused(dpo, tiny_settings("dpo", tmp_path / "run", dry_run=dry_run, **changes))
            assert message.startswith(f"{tiny_data.preferences_heldout}: nothing to evaluate")
            assert f"context_length = {context_length}" in message


@pytest.mark.parametrize("below", ["file", "file/run"])
def test_an_out_that_cannot_be_a_folder_is_refused(tiny_settings, tmp_path, below):
    (tmp_path / "file").write_text("")
    message = refused(pretrain, tiny_settings("pretrain", tmp_path / below), NotADirectoryError)
    assert message == f"{tmp_path / below}: cannot be written: {tmp_path / 'file'} is not a folder; choose another out"


def test_an_out_without_permission_is_refused(tiny_settings, tmp_path, monkeypatch):
    """`os.access` is replaced, as nothing denies the superuser permission."""
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != tmp_path)
    message = refused(pretrain, tiny_settings("pretrain", tmp_path / "deep" / "run"), PermissionError)
    assert message == f"{tmp_path / 'deep' / 'run'}: cannot be written: no permission for {tmp_path}; choose another out"


def test_replicas_that_do_not_divide_the_ranks_are_refused(tiny_settings, tmp_path, monkeypatch):
    settings = tiny_settings("pretrain", tmp_path / "run", parallel={"replicas": 2})
    for ranks in ("1", "3"):
        monkeypatch.setenv("WORLD_SIZE", ranks)
        assert refused(pretrain, settings).startswith(f"parallel.replicas = 2 does not divide the {ranks} ranks of this run; ")
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert open_run(tiny_settings("pretrain", tmp_path / "run"), ("text",)).start == 0


def test_a_port_in_use_is_named(tiny_settings, tmp_path, monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        named = {"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        for name, value in named.items():
            monkeypatch.setenv(name, value)
        message = refused(pretrain, tiny_settings("pretrain", tmp_path / "run"), ConnectionError)
    assert message.startswith(f"rank 0 of 2 could not join the others at 127.0.0.1:{port}: ")
    assert "is the port in use" in message


@pytest.fixture(scope="module")
def begun(tiny_settings, tmp_path_factory):
    """A run of six steps, stopped after three."""
    folder = tmp_path_factory.mktemp("begun") / "run"
    sft.run(tiny_settings("sft", folder, checkpoint_every=3))
    shutil.rmtree(folder / "step-00000006")
    return folder


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"seed": 5}, "seed = 0, the settings now say 5"),
        ({"neftune_alpha": 1.0}, "neftune_alpha = 0.0, the settings now say 1.0"),
        ({"schedule": {"peak": 1e-3, "warmup_steps": 2}}, "schedule.peak = 0.003, the settings now say 0.001"),
        ({"optimizer": {"beta2": 0.99}}, "optimizer.beta2 = 0.95, the settings now say 0.99"),
        ({"dtype": "bfloat16"}, "dtype = 'float32', the settings now say 'bfloat16'"),
        ({"step_size": 257}, "step_size = 256, the settings now say 257"),
    ],
)
def test_changed_settings_on_resuming_are_named(tiny_settings, begun, changes, named):
    message = refused(sft, tiny_settings("sft", begun, **changes))
    remedy = "choose another out, or restore the settings that the run began with"
    assert message == f"{begun}: holds a run with {named}; {remedy}"


def test_changed_sources_on_resuming_are_named(tiny_settings, tiny_data, begun):
    path = str(tiny_data.conversations)
    message = refused(sft, tiny_settings("sft", begun, sources=[{"path": path, "passes": 2.0}]))
    assert "holds a run with sources.0.passes = None, the settings now say 2.0" in message
    message = refused(sft, tiny_settings("sft", begun, sources=[{"path": path}, {"path": str(tiny_data.text)}]))
    assert "holds a run with sources.1.path = None" in message


def test_a_dtype_equal_to_the_resolved_one_resumes(tiny_settings, begun, tmp_path):
    """auto is float32 on a CPU, so asking for float32 continues the same run."""
    copy = Path(shutil.copytree(begun, tmp_path / "run"))
    assert open_run(tiny_settings("sft", copy, dtype="float32"), ("conversations",)).start == 3
    state = json.loads((copy / "step-00000003" / "training" / "state.json").read_text())
    assert state["settings"]["dtype"] == "float32"


def test_data_and_tokenizer_may_move(tiny_settings, tiny_data, tiny_model, begun, tmp_path):
    data, tokenizer = (str(shutil.copytree(path, tmp_path / path.name)) for path in (tiny_data.conversations, tiny_model))
    settings = tiny_settings("sft", begun, sources=[{"path": data}], tokenizer=tokenizer)
    assert open_run(settings, ("conversations",)).start == 3
    settings = tiny_settings("sft", begun, sources=[{"path": str(tiny_data.conversations_heldout)}])
    assert f"the prepared data in {tiny_data.conversations_heldout} changed since this run began" in refused(sft, settings)


def test_a_run_that_began_with_a_short_last_step_goes_on_with_it(tiny_settings, begun, tmp_path):
    """Its checkpoint holds the fingerprint of that order."""
    copy = Path(shutil.copytree(begun, tmp_path / "run"))
    path = copy / "step-00000003" / "training" / "state.json"
    settings = tiny_settings("sft", copy, steps=None, epochs=2.0, step_size=next(_sizes_that_merge(tiny_settings, copy)))
    plan = fresh_plan(settings)
    state = json.loads(path.read_text())
    del state["settings"]["steps"]
    state["settings"] |= {"epochs": 2.0, "step_size": settings.step_size}
    path.write_text(json.dumps(state | {"plan": plan.unmerged().fingerprint}))
    assert open_run(settings, ("conversations",)).plan.steps == plan.steps + 1
    path.write_text(json.dumps(state | {"plan": plan.fingerprint}))
    assert open_run(settings, ("conversations",)).plan.steps == plan.steps


def _sizes_that_merge(tiny_settings, out):
    """Step sizes for which the last step takes what was left."""
    for size in range(200, 400):
        if fresh_plan(tiny_settings("sft", out, steps=None, epochs=2.0, step_size=size)).merged:
            yield size


def fresh_plan(settings):
    """The plan of a fresh run with these settings."""
    return open_run(dataclasses.replace(settings, out=settings.out + "-fresh"), ("conversations",)).plan


def test_a_setting_unknown_to_an_older_run_means_its_default(tiny_settings, begun, tmp_path):
    copy = Path(shutil.copytree(begun, tmp_path / "run"))
    path = copy / "step-00000003" / "training" / "state.json"
    state = json.loads(path.read_text())
    for unknown in ("backend", "neftune_alpha"):
        del state["settings"][unknown]
    del state["settings"]["optimizer"]["clip_norm"]
    path.write_text(json.dumps(state))
    assert open_run(tiny_settings("sft", copy), ("conversations",)).start == 3
    message = refused(sft, tiny_settings("sft", copy, optimizer={"clip_norm": 2.0}))
    assert "holds a run with optimizer.clip_norm = 1.0, the settings now say 2.0" in message


def test_gradients_of_many_micro_batches_add_up_in_float32(tiny_settings, tmp_path):
    """auto counts what one rank would need, so any number of ranks makes the same choice."""

    def chosen(stage="sft", **changes):
        kinds = ("preferences",) if stage == "dpo" else ("conversations",)
        return open_run(tiny_settings(stage, tmp_path / "run", **changes), kinds).settings.optimizer.gradients

    many = {"step_size": 1025, "pack_tokens": 256, "context_length": 64}
    assert chosen(**many, dtype="bfloat16") == "float32"
    assert chosen(**many | {"step_size": 1024}, dtype="bfloat16") == "parameter"
    assert chosen(**many, dtype="float32") == "parameter"
    for named in ("parameter", "float32"):
        assert chosen(**many, dtype="bfloat16", optimizer={"gradients": named}) == named
    # Pairs count with the places that they have, not with the longest.
    run = open_run(tiny_settings("dpo", tmp_path / "run", dtype="bfloat16"), ("preferences",))
    (data,) = run.datasets
    fitting = [pair for pair in (data.lengths - 1).reshape(-1, 2).tolist() if max(pair) <= run.settings.context_length]
    mean = sum(map(sum, fitting)) / len(fitting)
    longest = max(map(sum, fitting))
    few = int(4 * longest / mean)
    for pairs, expected in ((few, "parameter"), (few + 1, "float32")):
        assert chosen("dpo", step_size=pairs, pack_tokens=longest, dtype="bfloat16", share_prompts=False) == expected


def test_a_resumed_run_adds_up_gradients_as_it_began(tiny_settings, tmp_path):
    """Whatever the micro-batch size says now; a run of an older version, in its parameters' dtype."""
    out = tmp_path / "run"
    many = {"step_size": 1025, "context_length": 64, "dtype": "bfloat16", "steps": 2, "checkpoint_every": 1}
    sft.run(tiny_settings("sft", out, pack_tokens=256, **many))
    shutil.rmtree(out / "step-00000002")
    assert tomllib.loads((out / "config.toml").read_text())["optimizer"]["gradients"] == "float32"

    def resumed(**changes):
        run = open_run(tiny_settings("sft", out, **many | changes), ("conversations",))
        assert run.start == 1
        model = run.load_model()
        AdamW(model.named_parameters(), run.settings.optimizer)
        wide = {parameter.grad_dtype for parameter in model.parameters()}
        assert wide == {torch.float32 if run.settings.optimizer.gradients == "float32" else torch.bfloat16}
        return run.settings.optimizer.gradients

    assert resumed(pack_tokens=256) == resumed(pack_tokens=2048) == resumed(optimizer={"gradients": "float32"}) == "float32"
    message = refused(sft, tiny_settings("sft", out, **many, optimizer={"gradients": "parameter"}))
    assert "holds a run with optimizer.gradients = 'float32', the settings now say 'parameter'" in message
    path = out / "step-00000001" / "training" / "state.json"
    state = json.loads(path.read_text())
    for older in ({"gradients": "parameter"}, {}):
        state["settings"]["optimizer"].pop("gradients", None)
        state["settings"]["optimizer"] |= older
        path.write_text(json.dumps(state))
        assert resumed(pack_tokens=256) == resumed(pack_tokens=256, optimizer={"gradients": "parameter"}) == "parameter"
        message = refused(sft, tiny_settings("sft", out, **many, optimizer={"gradients": "float32"}))
        assert "holds a run with optimizer.gradients = 'parameter', the settings now say 'float32'" in message


def test_changed_data_on_resuming_is_refused(tiny_settings, tiny_data, begun, tmp_path, monkeypatch):
    data = Path(shutil.copytree(tiny_data.conversations, tmp_path / "data"))
    out = tmp_path / "run"
    changes = {"sources": [{"path": str(data)}], "checkpoint_every": 3}
    sft.run(tiny_settings("sft", out, **changes))
    shutil.rmtree(out / "step-00000006")
    shutil.rmtree(data)
    shutil.copytree(tiny_data.conversations_heldout, data)
    message = refused(sft, tiny_settings("sft", out, **changes))
    assert message == f"{out}: the prepared data in {data} changed since this run began; restore it or choose another out"


def test_resume_never_refuses_a_folder_with_a_run(tiny_settings, begun):
    message = refused(sft, tiny_settings("sft", begun, resume="never"), FileExistsError)
    assert message == f"{begun}: holds a run already (step-00000003); choose another out, or resume = auto"


def test_pre_training_does_not_continue_a_run_of_fine_tuning(tiny_settings, begun):
    assert f"{begun}: holds a run with " in refused(pretrain, tiny_settings("pretrain", begun))


def test_only_settings_without_influence_on_the_trajectory_may_change_on_resuming(tiny_settings, tmp_path):
    known = set(vars(tiny_settings("dpo", tmp_path)))
    parts = {"fp8.keep_weights", "optimizer.nonfinite", "optimizer.offload", "optimizer.skip_limit"}
    assert known | parts >= FREE_ON_RESUME
    fixed = {
        "model",
        "sources",
        "seed",
        "optimizer",
        "schedule",
        "step_size",
        "context_length",
        "dtype",
        "precision",
        "fp8",
        "share_prompts",
    }
    assert fixed <= known
    assert not FREE_ON_RESUME & fixed


def test_the_default_micro_batch_holds_the_longest_document_or_pair(tiny_settings, tmp_path):
    """One context for documents, two for pairs."""
    for stage, kinds, expected in [("pretrain", ("text",), 32), ("dpo", ("preferences",), 128)]:
        run = open_run(tiny_settings(stage, tmp_path / "run", pack_tokens=0), kinds)
        assert run.pack_tokens == expected
        assert (run.device, run.dtype) == (torch.device("cpu"), torch.float32)


def test_a_run_shorter_than_its_warm_up_says_how_far_it_gets(tiny_settings, tmp_path):
    for warmup, expected in [
        (500, "6 steps end within schedule.warmup_steps = 500, at 1.2% of the peak"),
        (6, "after warm-up"),
    ]:
        settings = tiny_settings("sft", tmp_path / "run", schedule={"peak": 1e-3, "warmup_steps": warmup})
        (line,) = (line for line in describe(open_run(settings, ("conversations",))) if line.startswith("schedule"))
        assert expected in line
        assert line.endswith("at last") == (warmup == 6)


@pytest.mark.parametrize("backend", ["triton", "flash", "flex"])
def test_an_attention_backend_that_needs_a_gpu_is_refused(backend, tiny_settings, tmp_path, monkeypatch):
    monkeypatch.setattr("kernels.attention.backends.INTERPRETED", False)
    message = refused(pretrain, tiny_settings("pretrain", tmp_path / "run", device="cpu", backend=backend))
    assert message.startswith(f"backend = '{backend}': attention backend {backend} ")


def overwrite(path, content):
    """In place: truncating a mapped file would kill the process that reads it."""
    with path.open("r+b") as file:
        file.write(content)


def test_changed_data_is_found_between_runs_and_during_a_run(tiny_settings, tiny_data, tmp_path):
    """One token differs; sizes and dataset.json stay the same."""
    data = shutil.copytree(tiny_data.text, tmp_path / "text")
    settings = tiny_settings(
        "pretrain", tmp_path / "run", sources=[{"path": str(data)}], heldout=[], log={"tensorboard": False}
    )
    run = open_run(settings, ("text",))
    pretrain.run(settings)
    stream = step_stream(run.plan, 2, run.packing, prefetch=1)
    assert next(stream).index == 2
    tokens = bytearray((data / "tokens-00000.bin").read_bytes())
    tokens[100] ^= 1
    overwrite(data / "tokens-00000.bin", tokens)
    with pytest.raises(ValueError, match=r"tokens-00000.bin: changed while it was being read; restore it and start again"):
        list(stream)
    with pytest.raises(ValueError, match=r"tokens-00000.bin: its content is not what was written: prepare the dataset again"):
        pretrain.run(settings)
    # The restored file is newer than dataset.json, and accepted.
    tokens[100] ^= 1
    overwrite(data / "tokens-00000.bin", tokens)
    assert pretrain.run(settings).name == "step-00000006"


def test_a_left_over_world_size_is_named(tiny_settings, tmp_path, monkeypatch):
    settings = tiny_settings("pretrain", tmp_path / "run")
    for name in ("RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WORLD_SIZE", "2")
    message = refused(pretrain, settings)
    assert message.startswith(
        "WORLD_SIZE = 2 is set in the environment, and RANK, MASTER_ADDR, MASTER_PORT are not: it may be left"
    )
    assert "None" not in message
    monkeypatch.setenv("WORLD_SIZE", "two")
    assert refused(pretrain, settings).startswith("WORLD_SIZE = 'two': must be the number of processes")
