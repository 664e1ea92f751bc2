"""All commands: the same words for a model's name, and one clear line where an optional package is missing."""

import json
import os
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from model.vocabulary.tokenizer import Tokenizer, mistral_tokenizer_path
from recipes import chat, dpo, export, plan, prepare, pretrain, sft, vocabulary
from recipes.command import commands
from recipes.drawing import new_figure
from recipes.vocabulary_comparison import carried

ROOT = Path(__file__).resolve().parents[2]
MODEL = "Run folder (its newest checkpoint), Hugging Face folder,"


@pytest.mark.parametrize("recipe", [pretrain, sft, dpo, chat, vocabulary])
def test_every_help_text_names_a_model_in_the_same_words(recipe, capsys):
    with pytest.raises(SystemExit) as ended:
        recipe.main(["--help"])
    assert ended.value.code == 0
    text = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert MODEL.lower() in text.lower()
    assert "hub repository owner/name" in text


@pytest.fixture
def without(monkeypatch):
    """without(package): importing it fails as if it were not installed."""

    def hide(package: str) -> None:
        monkeypatch.setitem(sys.modules, package, None)

    return hide


def test_without_matplotlib_there_is_one_line_and_no_drawing(without, tmp_path, capsys):
    without("matplotlib.figure")
    assert new_figure(1, 1) is None
    assert capsys.readouterr().err == "no drawing: matplotlib is not installed (pip install matplotlib)\n"
    config = str(Path(plan.__file__).parent / "shisa" / "pretrain.toml")
    plan.main([config, "--model", "preset:shisa-7b", "--plot", str(tmp_path / "plan.png")])
    assert "tokens/s not hidden" in capsys.readouterr().out
    assert not (tmp_path / "plan.png").exists()


def test_without_mistral_common_a_default_tokenizer_is_refused_in_one_line(without, tmp_path, capsys):
    tokenizer = mistral_tokenizer_path()
    without("mistral_common")
    (tmp_path / "text.txt").write_text("One document.\n", encoding="utf-8")
    arguments = ["--kind", "text", "--paths", str(tmp_path / "text.txt"), "--out", str(tmp_path / "out")]
    with pytest.raises(SystemExit, match=r"^error: Mistral 7B's own tokenizer comes with mistral-common, .*pip install"):
        prepare.main(arguments)
    prepare.main([*arguments, "--tokenizer", str(tokenizer)])
    assert carried() == []
    assert "compared without mistral-common's tokenizers" in capsys.readouterr().out
    assert Tokenizer.load(tokenizer).vocab_size == 32000


def test_nothing_heavy_is_imported_before_the_command_line_is_read():
    """Every command's module, its help and its refusals."""
    modules = sorted(
        ".".join(path.relative_to(ROOT).with_suffix("").parts)
        for path in (ROOT / "recipes").rglob("*.py")
        if "def main(" in path.read_text(encoding="utf-8")
    )
    assert {"recipes.pretrain", "recipes.chat", "recipes.plan", "recipes.example.__main__"} <= {*modules}
    program = f"""
import contextlib, importlib, io, sys
for name in {modules}:
    for arguments in (["--help"], ["--no-such-option", "1"]):
        said = io.StringIO()
        with contextlib.suppress(SystemExit), contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            importlib.import_module(name).main(arguments)
    heavy = {{"torch", "triton", "transformers", "datasets"}} & {{*sys.modules}}
    assert not heavy, (name, heavy)
"""
    subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=True)


def test_under_torchrun_a_mistake_is_told_once_and_again_at_the_end_of_torchruns_own_words(tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "recipes.sft"]
    ended = subprocess.run(
        [*command, str(ROOT / "recipes" / "tiny" / "sft1.toml"), "--step-siz", "3"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert ended.returncode == 1
    assert ended.stderr.split("Traceback (most recent call last)")[0].count("Unrecognized options: --step-siz") == 1
    assert "Unrecognized options: --step-siz" in ended.stderr.split("Root Cause")[1]


def test_another_rank_waits_for_rank_0_to_speak_and_tells_what_only_it_has_found(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("recipes.command.PATIENCE", 0.01)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "error.json"))
    before = signal.getsignal(signal.SIGTERM)
    try:
        with pytest.raises(SystemExit) as ended:
            export.main(["--source", str(tmp_path / "nowhere"), "--out", str(tmp_path / "out")])
    finally:
        signal.signal(signal.SIGTERM, before)
    said = f"error on rank 3: {tmp_path / 'nowhere'}: no such run, checkpoint or model folder"
    assert (ended.value.code, capsys.readouterr().err) == (1, said + "\n")
    assert json.loads((tmp_path / "error.json").read_text())["message"]["message"] == said


def test_help_whose_reader_has_gone_ends_quietly():
    shown = subprocess.run(
        f"{sys.executable} -m recipes.pretrain --help | head -1",
        shell=True,
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (shown.stdout, shown.stderr) == ("usage: python -m recipes.pretrain [-h] [OPTIONS]\n", "")


@dataclass(frozen=True)
class Part:
    """One part."""

    number: int = 1


def test_a_recipe_of_several_parts_runs_the_one_that_is_named_first(capsys):
    ran = []
    parts = {"answer": (Part, ran.append), "judge": (Part, lambda _: None)}
    commands(parts, ["answer", "--number", "3"], "python -m recipes.some", "Two parts.")
    assert ran == [Part(3)]
    commands(parts, ["--help"], "python -m recipes.some", "Two parts.")
    assert "python -m recipes.some judge --help" in capsys.readouterr().out
    with pytest.raises(SystemExit, match=r"error: 'juge' is not a part of .*; the nearest one is 'judge' \(of answer, judge\)"):
        commands(parts, ["juge"], "python -m recipes.some", "Two parts.")
    with pytest.raises(SystemExit, match="error: name one of answer, judge"):
        commands(parts, [], "python -m recipes.some", "Two parts.")
