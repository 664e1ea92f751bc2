"""The split by language: the criterion, completeness, and refusals."""

import gzip
import json
import unicodedata

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.data.languages import share
from engine.data.records import read_conversation
from recipes.shisa.split_languages import SplitSettings, main, run


def chat(question: str, answer: str, system: str = "") -> dict:
    turns = [{"from": "system", "value": system}] if system else []
    return {"conversations": [*turns, {"from": "human", "value": question}, {"from": "gpt", "value": answer}]}


JAPANESE = [
    chat("日本で一番高い山は何ですか？", "富士山です。", system="You are a helpful, unbiased assistant."),
    chat(
        "PythonでHello Worldを表示してください。",
        "次のとおりです。\n```python\nprint('hello world, this is a long line of code')\n```",
    ),
    # An answer that its length cut within the code.
    chat(
        "PythonでHello Worldを表示してください。",
        "次のとおりです。\n```python\nprint('hello world, this is a long line of code that never ends')",
    ),
    chat("文の関係を答えてください。前提：男が走っている。仮説：男が動いている。", "entailment"),
]
REST = [
    chat("What is the highest mountain of Japan?", "It is Mount Fuji.", system="あなたは公平で、役立つアシスタントです。"),
    chat("Translate the following to Japanese:\nThe cat sleeps on the old wooden chair.", "猫は古い木の椅子で眠っている。"),
    chat(
        "次の文を英語に翻訳してください。猫は古い木の椅子で眠っている。",
        "The cat is sleeping on the old wooden chair in the room.",
    ),
    chat("1 + 1 = ?", "2"),
]


def write(path, rows) -> str:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def read(path) -> list[dict]:
    with gzip.open(path, "rt", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def is_japanese_letter(character: str) -> bool:
    """Whether a character is a Japanese letter by its Unicode name."""
    name = unicodedata.name(character, "")
    return character.isalpha() and name.startswith(
        ("HIRAGANA", "KATAKANA", "HALFWIDTH KATAKANA", "CJK UNIFIED", "CJK COMPATIBILITY IDEOGRAPH", "IDEOGRAPHIC ")
    )


@settings(max_examples=50, deadline=None)
@given(st.text(st.one_of(st.characters(codec="utf-8"), st.sampled_from("ぁんァヺーゝ々〆漢字ｱﾞabcé1。、・ 　！Ａ"))))
def test_the_japanese_share_agrees_with_unicode_names(text):
    # Historic kana outside the usual blocks do not occur in real text.
    text = "".join(character for character in text if not 0x1AFF0 <= ord(character) < 0x1B170)
    letters = [character for character in text if character.isalpha()]
    expected = sum(map(is_japanese_letter, letters)) / len(letters) if letters else 0
    assert share(text, "ja") == pytest.approx(expected)


def test_user_and_assistant_text_decides_the_language(tmp_path):
    source = write(tmp_path / "chat.jsonl", [row for pair in zip(JAPANESE, REST, strict=False) for row in pair])
    report = run(SplitSettings(kind="conversations", paths=(source,), out=str(tmp_path / "out")))
    for part, rows in (("ja", JAPANESE), ("rest", REST)):
        assert read(tmp_path / "out" / f"{part}.jsonl.gz") == [{"messages": read_conversation(row)} for row in rows]
        assert report["parts"][part]["records"] == len(rows)
    assert json.loads((tmp_path / "out" / "split.json").read_text(encoding="utf-8")) == report


def test_a_conversation_reads_the_same_after_the_split(tmp_path):
    """Preparing a part therefore holds out the same conversations as preparing the whole."""
    source = write(tmp_path / "chat.jsonl", JAPANESE + REST)
    run(SplitSettings(kind="conversations", paths=(source,), out=str(tmp_path / "out")))
    assert [read_conversation(row) for row in read(tmp_path / "out" / "ja.jsonl.gz")] == list(map(read_conversation, JAPANESE))


def test_texts_are_split_and_bad_records_counted(tmp_path):
    rows = [{"text": "これは日本語の文書です。"}, {"text": "This document is English."}, {"text": "  "}, {"body": "lost"}]
    source = write(tmp_path / "text.jsonl", rows)
    report = run(SplitSettings(kind="text", paths=(source,), out=str(tmp_path / "out")))
    assert read(tmp_path / "out" / "ja.jsonl.gz") == rows[:1]
    assert read(tmp_path / "out" / "rest.jsonl.gz") == rows[1:2]
    assert {reason: skip["count"] for reason, skip in report["skipped"].items()} == {"empty text": 1, "missing field": 1}
    assert report["skipped"]["missing field"]["first"] == f"{source}:4"


def test_the_same_source_gives_the_same_bytes(tmp_path):
    source = write(tmp_path / "chat.jsonl", JAPANESE + REST)
    for out in ("first", "second"):
        run(SplitSettings(kind="conversations", paths=(source,), out=str(tmp_path / out)))
    for name in ("ja.jsonl.gz", "rest.jsonl.gz"):
        assert (tmp_path / "first" / name).read_bytes() == (tmp_path / "second" / name).read_bytes()


@pytest.mark.parametrize(("rows", "part"), [(JAPANESE, "rest"), (REST, "ja")])
def test_an_empty_part_is_refused_in_one_line(tmp_path, rows, part):
    source = write(tmp_path / "chat.jsonl", rows)
    with pytest.raises(SystemExit) as caught:
        main(["--kind", "conversations", "--paths", source, "--out", str(tmp_path / "out")])
    message = str(caught.value)
    assert message.startswith(f"error: {source}: ")
    assert f"'{part}'" in message
    assert "\n" not in message
    assert list(tmp_path.iterdir()) == [tmp_path / "chat.jsonl"]


@pytest.mark.parametrize(
    ("setting", "message"), [({"least_share": 0.0}, "least_share = 0.0"), ({"text_field": "body"}, "text_field = 'body'")]
)
def test_wrong_settings_are_refused(setting, message):
    with pytest.raises(ValueError, match=message):
        SplitSettings(kind="conversations", paths=("chat.jsonl",), out="out", **setting)


def test_an_existing_folder_is_kept(tmp_path):
    source = write(tmp_path / "chat.jsonl", JAPANESE + REST)
    wanted = SplitSettings(kind="conversations", paths=(source,), out=str(tmp_path / "out"))
    run(wanted)
    before = (tmp_path / "out" / "ja.jsonl.gz").read_bytes()
    with pytest.raises(FileExistsError, match="exists already"):
        run(wanted)
    assert (tmp_path / "out" / "ja.jsonl.gz").read_bytes() == before


def test_real_conversations_are_classified_correctly(shared_data):
    for name, japanese in (("ja_sharegpt", True), ("ja_alpaca", True), ("en_alpaca", False), ("en_sharegpt", False)):
        shares = []
        for row in read(shared_data / "sft" / f"{name}.jsonl.gz")[:500]:
            messages = read_conversation(row)
            shares.append(share("\n".join(message["content"] for message in messages), "ja") >= 0.5)
        assert sum(share == japanese for share in shares) >= 0.99 * len(shares), name
