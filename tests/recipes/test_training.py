"""The training recipes as a user calls them: configuration file, overrides, one-line errors."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from engine.data.dataset import DatasetWriter
from engine.settings.toml import read_toml, to_toml
from model.vocabulary.chat import encode_chat
from model.vocabulary.tokenizer import Tokenizer
from recipes import dpo, pretrain, sft
from recipes.command import command
from recipes.dpo import DpoSettings
from recipes.pretrain import PretrainSettings
from recipes.sft import SftSettings

ROOT = Path(__file__).resolve().parents[2]
STAGES = {"pretrain": (pretrain, PretrainSettings), "sft": (sft, SftSettings), "dpo": (dpo, DpoSettings)}
WEIGHTS = "model-00001-of-00001.safetensors"


@pytest.fixture
def toml(tiny_settings, tmp_path):
    """toml(stage) -> a configuration file whose run goes to tmp_path / "run"."""

    def write(stage, **changes):
        path = tmp_path / f"{stage}.toml"
        path.write_text(to_toml(tiny_settings(stage, tmp_path / "run", **changes)), encoding="utf-8")
        return str(path)

    return write


def held_out(out):
    """{step: {name: value}} of the evaluations."""
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return {
        line["step"]: {name.rsplit("eval/")[-1].split("/", 1)[1]: value for name, value in line.items() if "/" in name}
        for line in lines
        if "loss" not in line
    }


@pytest.mark.parametrize("stage", STAGES)
def test_a_recipe_from_its_file_with_overrides(toml, tmp_path, stage):
    recipe, settings_class = STAGES[stage]
    out = tmp_path / "elsewhere"
    recipe.main([toml(stage), "--steps", "3", "--out", str(out), "--schedule.peak", "1e-2", "--log.every", "1"])
    assert not (tmp_path / "run").exists()
    assert (out / "latest").read_text() == "step-00000003\n"
    settings = read_toml(settings_class, out / "config.toml")
    assert (settings.steps, settings.out, settings.schedule.peak, settings.log.every) == (3, str(out), 1e-2, 1)
    assert settings.schedule.warmup_steps == 2
    first, last = held_out(out)[0], held_out(out)[3]
    assert last["loss"] < first["loss"]
    if stage == "dpo":
        assert last["rewards/margins"] > first["rewards/margins"] == pytest.approx(0, abs=1e-5)


@pytest.mark.parametrize("stage", STAGES)
def test_the_written_configuration_is_the_runs_own(toml, tmp_path, capsys, stage):
    """The written file reads back to equal settings, with "auto" decided; running it again finds the run finished."""
    recipe, settings_class = STAGES[stage]
    path = toml(stage, steps=1)
    recipe.main([path])
    given = read_toml(settings_class, path)
    decided = dataclasses.replace(given, optimizer=dataclasses.replace(given.optimizer, gradients="parameter"))
    assert read_toml(settings_class, tmp_path / "run" / "config.toml") == decided
    capsys.readouterr()
    recipe.main([str(tmp_path / "run" / "config.toml")])
    assert "all 1 steps are done already" in capsys.readouterr().out


@pytest.mark.parametrize("stage", STAGES)
def test_a_dry_run_shows_the_plan_and_writes_nothing(toml, tmp_path, capsys, stage):
    recipe = STAGES[stage][0]
    path = toml(stage)
    before = sorted(tmp_path.rglob("*"))
    recipe.main([path, "--dry-run"])
    assert sorted(tmp_path.rglob("*")) == before
    shown = capsys.readouterr().out
    assert shown.endswith("dry run: nothing was trained or written\n")
    for part in ("40,096 parameters, float32 on cpu", "340 pieces, 384 rows", "6 steps of", "cosine: learning rate 1.50e-03"):
        assert part in shown


@pytest.mark.parametrize("stage", STAGES)
def test_a_dry_run_marks_the_trained_tokens_with_brackets(toml, tiny_tokenizer, tmp_path, capsys, stage):
    tokenizer = Tokenizer.load(tiny_tokenizer)
    talk = [{"role": "user", "content": "the cat"}, {"role": "assistant", "content": "ねこ"}]
    more = [{"role": "user", "content": "and"}, {"role": "assistant", "content": "it runs"}]
    chat = encode_chat(tokenizer, talk + more)
    if stage == "pretrain":
        kind, documents = "text", [([1, *tokenizer.encode("the red 🐕"), 2],)]
        expected = ["[ the red <0xF0><0x9F><0x90><0x95></s>]"]
    elif stage == "sft":
        kind, documents = "conversations", [(chat.ids, chat.trained)]
        expected = [" [INST] the cat [/INST][ ねこ </s>]<s> [INST] and [/INST][ it runs </s>]"]
    else:
        kind, documents = "preferences", []
        for answer in ("it", "いぬ"):
            side = encode_chat(tokenizer, [talk[0], {"role": "assistant", "content": answer}])
            documents.append((side.ids, side.trained, len(encode_chat(tokenizer, talk[:1]).ids)))
        expected = [f" [INST] the cat [/INST][ {answer} </s>]" for answer in ("it", "いぬ")]
    folder = tmp_path / "one"
    folder.mkdir()
    with DatasetWriter(folder, kind, vocab_size=340, tokenizer_fingerprint=tokenizer.fingerprint) as writer:
        for document in documents:
            writer.add(*document)
        writer.finish()
    STAGES[stage][0].main([toml(stage), "--dry-run", "--sources.0.path", str(folder)])
    shown = [line.removeprefix(" " * 11) for line in capsys.readouterr().out.splitlines()]
    assert shown[-1 - 3 : -1][: len(expected)] == expected


def test_a_dry_run_refuses_what_the_run_would(toml, tmp_path):
    with pytest.raises(SystemExit, match="error: context_length = 4000 is above"):
        pretrain.main([toml("pretrain"), "--dry-run", "--context-length", "4000"])


@pytest.mark.parametrize("stage", STAGES)
def test_errors_are_one_line_and_status_one(toml, tmp_path, monkeypatch, stage):
    recipe = STAGES[stage][0]
    (tmp_path / "file").write_text("")
    for arguments, message in [
        (["--model", "nowhere/at/all"], "nowhere/at/all"),
        (["--out", str(tmp_path / "file" / "run")], f"{tmp_path / 'file'} is not a folder"),
        (["--sources.0.path", "nowhere"], "recipes.prepare"),
    ]:
        with pytest.raises(SystemExit) as ended:
            recipe.main([toml(stage), *arguments])
        assert str(ended.value.code).startswith("error: ")
        assert message in ended.value.code
        assert "\n" not in ended.value.code
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("RANK", "2")
    with pytest.raises(SystemExit, match=r"error on rank 2: parallel\.replicas = 3 does not divide the 4 ranks"):
        recipe.main([toml(stage), "--parallel.replicas", "3"])


def test_a_diverging_run_names_the_step(toml):
    with pytest.raises(SystemExit, match="error: step 2: loss"):
        pretrain.main([toml("pretrain"), "--schedule.peak", "1e20", "--schedule.warmup-steps", "0"])


class _LibraryError(ValueError):
    """An error class of a library: its message was not written for our user."""


@pytest.mark.parametrize("error", [RuntimeError("mat1 and mat2 shapes"), _LibraryError("internal"), TypeError("a defect")])
def test_a_defect_keeps_its_traceback(toml, error):
    def run(settings):
        raise error

    with pytest.raises(type(error)):
        command(PretrainSettings, run, [toml("pretrain")], "prog")


def test_ctrl_c_ends_with_status_130_and_no_traceback(toml, capsys):
    def run(settings):
        raise KeyboardInterrupt

    with pytest.raises(SystemExit) as ended:
        command(PretrainSettings, run, [toml("pretrain")], "prog")
    assert ended.value.code == 130
    assert "everything that was complete is kept" in capsys.readouterr().err


@pytest.mark.parametrize(("stage", "option"), [("sft", "--neftune-alpha"), ("dpo", "--preference.beta")])
def test_objectives_check_their_settings(toml, capsys, stage, option):
    with pytest.raises(SystemExit) as ended:
        STAGES[stage][0].main([toml(stage), option, "-1"])
    assert ended.value.code == 2
    assert f"{option.removeprefix('--').replace('-', '_')} = -1.0" in capsys.readouterr().err


def test_simpo_needs_no_reference(tiny_settings, tmp_path):
    preference = {"loss": "simpo", "beta": 2.0, "target_margin": 0.5, "sft_weight": 0.1}
    dpo.run(tiny_settings("dpo", tmp_path / "run", preference=preference))
    assert not [path for path in (tmp_path / "run").iterdir() if "reference" in path.name]
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if "loss" in line]
    assert losses[-1] < losses[0]


@pytest.mark.slow
def test_torchrun_with_one_process_trains_the_same(toml, tiny_settings, tmp_path):
    expected = pretrain.run(tiny_settings("pretrain", tmp_path / "here"))
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "1",
        "-m",
        "recipes.pretrain",
        toml("pretrain"),
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "step      6/6" in result.stdout
    assert (tmp_path / "run" / "step-00000006" / WEIGHTS).read_bytes() == (expected / WEIGHTS).read_bytes()
