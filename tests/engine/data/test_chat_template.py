"""The chat template that data was prepared with goes through training into the model's folder."""

import json

import pytest

from engine.data.chat_template import with_template_of
from engine.data.dataset import TokenDataset
from engine.data.prepare import prepare
from model.vocabulary.chat import encode_chat, template_name, with_named_template
from model.vocabulary.export import write_tokenizer_folder
from model.vocabulary.tokenizer import CHATML, Tokenizer
from model.vocabulary.tokenizer_folder import AddedToken, with_pieces
from recipes import sft

MESSAGES = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]


@pytest.fixture
def tokenizer(tiny_tokenizer, tmp_path) -> Tokenizer:
    """The tiny one with ChatML's tokens, and its folder at tmp_path/tokenizer."""
    plain = Tokenizer.load(tiny_tokenizer)
    added = [AddedToken(plain.vocab_size + n, token, True, ()) for n, token in enumerate(CHATML)]
    tokenizer = Tokenizer(with_pieces(plain.model_bytes, added))
    write_tokenizer_folder(tmp_path / "tokenizer", tokenizer)
    return tokenizer


@pytest.fixture
def prepared(tmp_path, tokenizer):
    """prepared(name, template) -> the folder of prepared conversations."""

    def make(name: str, template: str) -> str:
        source = tmp_path / "chat.jsonl"
        source.write_text((json.dumps({"messages": MESSAGES}) + "\n") * 20)
        named = with_named_template(tokenizer, template)
        prepare([str(source)], tmp_path / name, tokenizer=named, kind="conversations", overwrite=True)
        return str(tmp_path / name)

    return make


def settings_of(tiny_settings, tmp_path, data, **changes):
    options = {"model": "preset:tiny", "tokenizer": str(tmp_path / "tokenizer"), "steps": 1, "heldout": []}
    out = changes.pop("out", tmp_path / "run")
    return tiny_settings("sft", out, **{"sources": [{"path": data}], **options, **changes})


def test_a_model_carries_the_template_of_its_data(tiny_settings, tmp_path, tokenizer, prepared, capsys):
    last = sft.run(settings_of(tiny_settings, tmp_path, prepared("chatml", "chatml")))
    assert "chat template: chatml" in capsys.readouterr().out
    trained = Tokenizer.load(last)
    assert template_name(trained) == "chatml"
    assert encode_chat(trained, MESSAGES) == encode_chat(with_named_template(tokenizer, "chatml"), MESSAGES)
    ends = json.loads((last / "generation_config.json").read_text())["eos_token_id"]
    assert trained.special_ids["<|im_end|>"] in (ends if isinstance(ends, list) else [ends])
    # The run goes on with the same template, and data of another one may follow.
    again = sft.run(settings_of(tiny_settings, tmp_path, prepared("chatml", "chatml"), steps=1))
    assert again == last
    following = {"model": str(last), "tokenizer": None, "out": tmp_path / "other"}
    other = sft.run(settings_of(tiny_settings, tmp_path, prepared("shisa", "shisa"), **following))
    assert Tokenizer.load(other).template is None


def test_data_of_two_templates_is_refused(tiny_settings, tmp_path, prepared):
    one, two = prepared("one", "shisa"), prepared("two", "chatml")
    with pytest.raises(ValueError, match=r"one and .*two were prepared with different chat templates"):
        sft.run(settings_of(tiny_settings, tmp_path, one, sources=[{"path": one}, {"path": two}]))


def test_data_that_names_no_template_leaves_the_tokenizers(tokenizer, prepared):
    old = TokenDataset.open(prepared("old", "shisa"))
    del old.report["template"]
    chatml = with_named_template(tokenizer, "chatml")
    assert with_template_of([old], chatml) is chatml
