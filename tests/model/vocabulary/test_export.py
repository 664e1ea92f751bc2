"""The written folder, as `tokenizers` and `transformers` read it, against sentencepiece."""

import json
import random
import shutil
from pathlib import Path

import pytest
import sentencepiece
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from kernels import padded_to_tiles
from model.vocabulary.export import write_tokenizer_folder
from model.vocabulary.merge import extend, merge
from model.vocabulary.template import CHAT_TEMPLATE
from model.vocabulary.tokenizer import CHATML, Tokenizer

SPECIALS = ("<s>", "</s>", "<unk>", "<|im_start|>", "<|im_end|>")
CHARACTERS = (
    "あいうがぎ日本語人。、「」（）！？・ー々〆ｶﾞﾊﾟａＡ１①㎡😀👨‍👩‍👧\u3099\u309a\u200d\ufe0fé\u0301ß\u00a0\u2003\u3000한국어ไทย"
    "العربيةעברית中文简体abTZ019 \n\t\r\x00\x1f\x7f\u2028\ufeff\u2581<>/[]"
)


def varied_strings(tokenizer: Tokenizer, count: int) -> list[str]:
    """Each piece's own text, runs of spaces beside many things, code, and random strings of several kinds."""
    draw = random.Random(0)
    pieces = [piece.replace("\u2581", " ") for piece in tokenizer.pieces()]
    strings = pieces[259:32000:7] + pieces[32000:]
    for before in ("", "a", "あ", "\n", "。"):
        for after in ("", "b", "い", "\n", "、"):
            strings += [before + " " * n + after for n in range(40)]
            strings += [before + blank * n + after for n in range(5) for blank in ("\t", "\u3000", " \n", before + after)]
    strings += Path(__file__).read_text().split("\n")
    strings += ["".join(draw.choices(CHARACTERS, k=draw.randint(1, 40))) for _ in range(count)]
    strings += ["".join(draw.choices(pieces[32000:], k=draw.randint(1, 8))) for _ in range(count)]
    strings += [
        "".join(chr(draw.choice((draw.randint(0, 0xD7FF), draw.randint(0xE000, 0x2FFFF)))) for _ in range(draw.randint(1, 30)))
        for _ in range(count)
    ]
    return [text for text in strings if not any(special in text for special in SPECIALS)]


def test_transformers_and_tokenizers_give_the_ids_of_sentencepiece(extended, loaded, tmp_path):
    """`AutoTokenizer` reads a tokenizer alone, and one beside a model's configuration."""
    folder = shutil.copytree(extended.folder, tmp_path / "copy")
    (folder / "config.json").write_text(json.dumps({"model_type": "mistral"}))
    reference = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    beside_a_model = AutoTokenizer.from_pretrained(folder)
    bare = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    strings = varied_strings(extended.tokenizer, 700) + extended.texts[:40]
    expected = reference.encode(strings, out_type=int)
    for automatic in (loaded, beside_a_model):
        assert automatic(strings, add_special_tokens=False)["input_ids"] == expected
    assert [encoding.ids for encoding in bare.encode_batch(strings, add_special_tokens=False)] == expected
    for text, ids in zip(strings, expected, strict=True):
        assert bare.decode(ids) == extended.tokenizer.decode(ids) == text.replace("\u2581", " ")


@settings(deadline=None, derandomize=True)
@given(text=st.text(alphabet=st.one_of(st.sampled_from(CHARACTERS), st.characters(exclude_categories=["Cs"])), max_size=80))
def test_any_text_has_the_same_ids(extended, loaded, text):
    if not any(special in text for special in SPECIALS):
        assert loaded(text, add_special_tokens=False)["input_ids"] == extended.tokenizer.encode(text)


@pytest.fixture(scope="module")
def loaded(extended):
    return AutoTokenizer.from_pretrained(extended.folder)


def test_transformers_knows_the_specials_and_the_template(extended, loaded):
    tokenizer = extended.tokenizer
    assert (loaded.bos_token_id, loaded.eos_token_id, loaded.unk_token_id) == (1, 2, 0)
    assert loaded("はい")["input_ids"] == [1, *tokenizer.encode("はい")]
    assert loaded("</s>", add_special_tokens=False)["input_ids"] == [2]
    assert loaded.chat_template == CHAT_TEMPLATE
    assert len(loaded) == tokenizer.vocab_size
    assert loaded.decode([1, *tokenizer.encode(" 日本 x"), 2], skip_special_tokens=True) == " 日本 x"
    assert json.loads((extended.folder / "tokenizer_config.json").read_text())["chat_template"] == CHAT_TEMPLATE


def test_chatml_stands_in_the_padding(mistral, tmp_path):
    merged = merge(mistral.model_bytes, ["日月", "土日"], 2, controls=[*CHATML, "<s>"])
    assert merged.controls == list(CHATML)
    assert merge(merged.model_bytes, ["火水"], 1, controls=CHATML).controls == []
    write_tokenizer_folder(tmp_path, merged.model_bytes)
    tokenizer, loaded = Tokenizer(merged.model_bytes), AutoTokenizer.from_pretrained(tmp_path)
    start, end = 32002, 32003
    assert padded_to_tiles(tokenizer.vocab_size) == padded_to_tiles(32002) == 32128
    assert loaded("<|im_start|>日月<|im_end|>", add_special_tokens=False)["input_ids"] == [
        start,
        *tokenizer.encode("日月"),
        end,
    ]
    assert loaded.decode([start, *tokenizer.encode("日月"), end], skip_special_tokens=True) == "日月"
    # What a message says stays text for us, and decodes to itself.
    ids = tokenizer.encode("<|im_start|>")
    assert start not in ids
    assert tokenizer.decode([start, *ids, end]) == "<|im_start|>"
    stream = tokenizer.stream_decoder()
    spaced = [start, *tokenizer.encode(" 日月"), end, *tokenizer.encode(" a b")]
    assert "".join(map(stream.push, spaced)) + stream.finish() == tokenizer.decode(spaced)


def test_writing_repeats_byte_for_byte_and_replaces(extended, mistral, tmp_path):
    write_tokenizer_folder(tmp_path, mistral.model_bytes)
    write_tokenizer_folder(tmp_path, extended.tokenizer.model_bytes)
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {
        "tokenizer.model",
        "tokenizer.json",
        "tokenizer_config.json",
        "special_tokens_map.json",
        "chat_template.jinja",
    }
    for name in names:
        assert (tmp_path / name).read_bytes() == (extended.folder / name).read_bytes()


@pytest.mark.parametrize(
    "options",
    [
        {"add_dummy_prefix": False},
        {"user_defined_symbols": ["<sep>", "<sep><sep>", "日本"]},
        {"control_symbols": ["[INST]", "<sep>"]},
        {"allow_whitespace_only_pieces": True, "split_digits": True},
        {"normalization_rule_name": "nmt_nfkc", "remove_extra_whitespaces": True},
    ],
    ids=lambda options: next(iter(options)),
)
def test_other_bases_are_written_for_transformers(options, written_texts, train_model, tmp_path):
    """Every base that new pieces can be merged into is written so that `transformers` agrees."""
    merged, _ = extend(train_model(**options), written_texts, 150)
    write_tokenizer_folder(tmp_path, merged.model_bytes)
    tokenizer, loaded = Tokenizer(merged.model_bytes), AutoTokenizer.from_pretrained(tmp_path)
    draw = random.Random(0)
    words = [*"あ日本、。１ａA1 \n\t①😀", "ﾊﾟ", "ガ", "  ", "<sep>", "[INST]", " the ", *written_texts[::40]]
    for _ in range(500):
        text = "".join(draw.choices(words, k=draw.randint(0, 12)))
        ids = tokenizer.encode(text)
        assert loaded(text, add_special_tokens=False)["input_ids"] == ids
        assert loaded.decode(ids) == tokenizer.decode(ids)


def test_a_model_that_is_not_bpe_is_refused(train_model, tmp_path):
    with pytest.raises(ValueError, match="type BPE"):
        write_tokenizer_folder(tmp_path, train_model(model_type="unigram"))
    assert not list(tmp_path.iterdir())
