"""The texts of records in every form: taken out, changed, and put back where they were."""

import json

import pytest

from engine.data.records import Unusable, read_conversation, read_pair
from recipes.data_making.record_texts import Text, read_texts, with_texts

TURNS = [{"role": "user", "content": "two and three?"}, {"role": "assistant", "content": "five"}]
SHARE = [{"from": "human", "value": "two and three?"}, {"from": "gpt", "value": "five"}]
PARTS = [{"role": "user", "content": [{"type": "text", "text": "two "}, {"type": "text", "text": "three?"}]}, TURNS[1]]
HH = "\n\nHuman: hello\n\nAssistant: hello!\n\nHuman: two and three?\n\nAssistant: five"
CONVERSATIONS = [
    {"id": "x", "messages": [{"role": "system", "content": "be brief"}, *TURNS], "source": "five"},
    {"conversations": SHARE, "system": "be brief"},
    {"messages": json.dumps(TURNS)},
    {"messages": PARTS},
    {"messages": {"role": ["user", "assistant"], "content": ["two and three?", "five"]}},
    {"prompt": "two and three?", "completion": "five"},
    {"prompt": TURNS[:1], "completion": TURNS[1:]},
    {
        "instruction": "add",
        "input": "two and three",
        "output": "five",
        "history": [["hi", "hello"]],
        "system_prompt": "be brief",
    },
    {"instruction": "add", "input": "", "output": "five", "history": json.dumps([["hi", "hello"]])},
    {"question": "two and three?", "response": "five", "context": "numbers", "history": TURNS},
    {"messages": [{**TURNS[0]}, {**TURNS[1], "weight": 0}, *TURNS], "n": 3},
]
PAIRS = [
    {"prompt": "two and three?", "chosen": "five", "rejected": "six", "score": 9.5},
    {"prompt": TURNS[:1], "chosen": TURNS[1:], "rejected": [{"role": "assistant", "content": "six"}]},
    {
        "prompt": "two and three?",
        "chosen": TURNS,
        "rejected": [TURNS[0], {"role": "assistant", "content": "six"}],
        "messages": TURNS,
    },
    {"chosen": HH, "rejected": HH.replace("five", "six")},
    {"instruction": "add", "input": "two and three", "chosen": "five", "rejected": "six", "system": "be brief"},
    {"chosen": json.dumps(TURNS), "rejected": json.dumps([TURNS[0], {"role": "assistant", "content": "six"}])},
]


def changed(text: str) -> str:
    return f"＜{text}＞"


def read(record: dict, kind: str) -> list[tuple[str, str]]:
    """The meaning of a record, by the reader of training data."""
    if kind == "conversations":
        return [(turn["role"], turn["content"]) for turn in read_conversation(record)]
    pair = read_pair(record)
    said = [(turn["role"], turn["content"]) for turn in pair.prompt]
    return [*said, ("assistant", pair.chosen), ("assistant", pair.rejected)]


@pytest.mark.parametrize(
    ("kind", "record"), [*(("conversations", each) for each in CONVERSATIONS), *(("preferences", each) for each in PAIRS)]
)
def test_changed_texts_are_what_training_reads_and_the_form_stays(kind, record):
    before = json.dumps(record)
    texts = read_texts(record, kind)
    new = with_texts(record, kind, {text: changed(text.text) for text in texts})
    joined = {text: changed(text) for _, text in read(record, kind)}
    for one, other in (("add", "two and three"), ("two and three?", "numbers")):
        joined[f"{one}\n\n{other}"] = f"{changed(one)}\n\n{changed(other)}"
    joined["two three?"] = changed("two ") + changed("three?")
    assert read(new, kind) == [(role, joined[text]) for role, text in read(record, kind)]
    assert [*new] == [*record]
    assert {name: type(value) for name, value in new.items()} == {name: type(value) for name, value in record.items()}
    for name in ("id", "source", "score", "n"):
        assert new.get(name) == record.get(name)
    assert json.dumps(record) == before
    assert with_texts(record, kind, {}) == record


def test_a_text_that_stands_twice_comes_once_and_in_the_order_of_the_conversation():
    assert read_texts(PAIRS[2], "preferences") == [
        Text("user", "two and three?"),
        Text("assistant", "five"),
        Text("assistant", "six"),
    ]
    roles = [text.role for text in read_texts(CONVERSATIONS[7], "conversations")]
    assert roles == ["system", "user", "assistant", "user", "user", "assistant"]


@pytest.mark.parametrize(("kind", "record"), [("conversations", {"messages": TURNS[:1]}), ("preferences", {"prompt": "a"})])
def test_a_record_that_training_would_skip_is_refused(kind, record):
    with pytest.raises(Unusable):
        read_texts(record, kind)


def test_texts_that_change_the_form_are_refused():
    record = {"prompt": "two and three?", "chosen": "five", "rejected": "six"}
    text = "Human: hello\n\nAssistant: hi\n\nHuman: more?\n\nAssistant:"
    with pytest.raises(Unusable, match="another form"):
        with_texts(record, "preferences", {Text("user", "two and three?"): text})
