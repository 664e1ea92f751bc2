"""All commands: the same words for a model's name, and one clear line where an optional package is missing."""

import sys
from pathlib import Path

import pytest

from model.vocabulary.tokenizer import Tokenizer, mistral_tokenizer_path
from recipes import chat, dpo, plan, prepare, pretrain, sft, vocabulary
from recipes.drawing import new_figure
from recipes.vocabulary_comparison import carried

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
    assert "tokens/s expected" in capsys.readouterr().out
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
