"""Scripts: the characters against Unicode's own table, what a piece may hold, the stretches pieces are cut from, errors."""

import re
import unicodedata

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from model.vocabulary.scripts import JAPANESE, Scripts

NAMES = {"hira": "Hiragana", "han": "Han", "hang": "Hangul", "thai": "Thai", "deva": "Devanagari", "hebr": "Hebrew"}


@pytest.mark.parametrize("name", NAMES)
def test_letters_agree_with_unicode(name):
    regex = pytest.importorskip("regex", reason="holds Unicode's table of scripts")
    script, reference = Scripts([name]), regex.compile(rf"\p{{Script={NAMES[name]}}}")
    east_asian = {*range(0x3000, 0x3040), *range(0xFF00, 0xFF66)}  # signs and wide forms, allowed to all of them
    for code in set(range(0x16000)) - east_asian:
        character = chr(code)
        if unicodedata.category(character)[0] in "LM" and character not in "ーｰﾞﾟ":
            assert script.allow(character) == bool(reference.match(character)), hex(code)


@pytest.mark.parametrize(
    "piece",
    ["の", "です", "\u2581日本", "、", "」。", "です。", "ー", "々", "ｶﾞ", "〇", "！」", "です😀", "Ａ", "１", "　", "カ\u3099"],
)
def test_pieces_of_japanese_are_allowed(piece):
    assert Scripts().allow(piece)
    assert Scripts().occur_in(piece)


@pytest.mark.parametrize(
    "piece",
    ["a", "1", "\u2581", "(", "日a", "第1", "です\n", "日é", "한", "日한", "Ａの", "１２", "！？", "日①", "😀", "―", "\x1f日"],
)
def test_other_pieces_are_not_allowed(piece):
    assert not Scripts().allow(piece)


@settings(deadline=None, derandomize=True)
@given(text=st.text(st.characters(exclude_categories=["Cs"])))
def test_pieces_stand_in_text_of_their_scripts_only(text):
    scripts = Scripts()
    if text and scripts.allow(text):
        assert scripts.occur_in(text)
        others = [character for character in text if character.isalnum() and len(text) > 1]
        names = ("HIRAGANA", "KATAKANA", "CJK", "HALFWIDTH KATAKANA", "IDEOGRAPHIC", "HENTAIGANA", "VERTICAL KANA", "HANGZHOU")
        assert all(unicodedata.name(character, "CJK").startswith(names) for character in others)


@settings(deadline=None, derandomize=True)
@given(text=st.text(st.one_of(st.sampled_from("日本語、。 aé1１Ａ\n한ไ①"), st.characters(exclude_categories=["Cs"]))))
def test_runs_hold_every_possible_piece_and_nothing_foreign(text):
    scripts = Scripts()
    runs = list(scripts.runs(text))
    assert "".join(map(re.escape, runs)) == "" or re.search(".*?".join(map(re.escape, runs)), text, re.DOTALL)
    kept = "".join(runs)
    for character in text:
        assert not scripts.allow(character) or character in kept
    assert not re.search(r"[\x00-\x1f\u2581A-Za-z0-9]", kept)


@pytest.mark.parametrize(
    ("names", "text", "runs"),
    [
        (["hang"], "안녕하세요, 세계! abc 日本「어」12", ["안녕하세요, 세계! ", "「어」"]),
        (["thai"], "สวัสดี ชาวโลก ๑๒ ok 「日", ["สวัสดี ชาวโลก ", "๑", "๒"]),
        (["deva"], "नमस्ते दुनिया 日本 x", ["नमस्ते दुनिया "]),
        (JAPANESE, "日本 한 12　ＡＢ、x", ["日本 ", "　", "Ａ", "Ｂ", "、"]),
    ],
)
def test_runs_of_other_languages(names, text, runs):
    assert list(Scripts(names).runs(text)) == runs


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ([], "no script: name at least one of hira, kata"),
        (["hani"], "script 'hani': did you mean 'han'?"),
        (["hira", "latn"], "script 'latn': Latin letters stay as the base writes them"),
        (["zzz9"], "script 'zzz9': must be one of hira"),
    ],
)
def test_unknown_scripts_are_refused(names, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        Scripts(names)
