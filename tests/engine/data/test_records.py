"""Records of every format, and the reasons why records are skipped."""

import pytest

from engine.data.records import Unusable, read_conversation, read_pair, read_text


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


def system(text):
    return {"role": "system", "content": text}


def test_text_is_the_record_or_its_field():
    assert read_text("文", "text") == "文"
    assert read_text({"body": " a\n"}, "body") == " a\n"


@pytest.mark.parametrize(
    "record",
    [
        {"messages": [system("S"), user("U"), assistant("A")]},
        {"conversations": [{"from": "system", "value": "S"}, {"from": "human", "value": "U"}, {"from": "gpt", "value": "A"}]},
        {"prompt": [system("S"), user("U")], "completion": "A"},
        {"messages": [system("S"), user("U"), assistant("A")], "prompt": "U", "conversations": None},
        {"messages": [{**system("S"), "name": None}, user("U"), assistant("A")], "source": "x"},
    ],
)
def test_every_format_gives_the_same_conversation(record):
    assert read_conversation(record) == [system("S"), user("U"), assistant("A")]


def test_alpaca_and_prompt_completion_records_give_conversations():
    assert read_conversation({"instruction": "I", "input": "X", "output": "O"}) == [user("I\n\nX"), assistant("O")]
    for empty in ({}, {"input": ""}, {"input": None}, {"input": " "}):
        assert read_conversation({"instruction": "I", **empty, "output": "O"}) == [user("I"), assistant("O")]
    assert read_conversation({"prompt": "P", "completion": "C"}) == [user("P"), assistant("C")]
    assert read_conversation({"prompt": [user("P")], "completion": [assistant("C")]}) == [user("P"), assistant("C")]


def test_an_empty_system_message_is_dropped():
    assert read_conversation({"messages": [system(" "), user("U"), assistant("A")]}) == [user("U"), assistant("A")]


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        ("text", "not an object"),
        ({"text": "a"}, "no conversation"),
        ({"messages": "hello"}, "no conversation"),
        ({"messages": [{"role": "user"}]}, "no conversation"),
        ({"messages": ["hi"]}, "no conversation"),
        ({"messages": []}, "no assistant turn"),
        ({"messages": [user("U")]}, "no assistant turn"),
        ({"messages": [system("S")]}, "no assistant turn"),
        ({"messages": [user("U"), {"role": "asistant", "content": "A"}]}, "unknown role"),
        ({"messages": [user("U"), {"role": ["x"], "content": "A"}]}, "unknown role"),
        ({"conversations": [{"from": "user", "value": "U"}, {"from": "gpt", "value": "A"}]}, "unknown role"),
        ({"messages": [{"role": "human", "content": "U"}, assistant("A")]}, "unknown role"),
        ({"messages": [user("U"), user("V"), assistant("A")]}, "roles do not alternate"),
        ({"messages": [assistant("A"), user("U")]}, "roles do not alternate"),
        ({"messages": [user("U"), system("S"), assistant("A")]}, "roles do not alternate"),
        ({"messages": [user("U"), assistant("")]}, "empty answer"),
        ({"messages": [user("U"), assistant(" \n")]}, "empty answer"),
        ({"messages": [user(""), assistant("A")]}, "empty message"),
        ({"messages": [user("U"), assistant(None)]}, "content is not text"),
        ({"messages": [user([{"type": "text", "text": "U"}]), assistant("A")]}, "content is not text"),
        ({"instruction": "I", "input": 3, "output": "O"}, "content is not text"),
        ({"messages": [user("U"), assistant("\ud800")]}, "not valid Unicode"),
        ({"prompt": "P", "completion": ""}, "empty answer"),
    ],
)
def test_unusable_conversations_have_a_reason(record, reason):
    with pytest.raises(Unusable) as caught:
        read_conversation(record)
    assert caught.value.reason == reason
    assert caught.value.detail


@pytest.mark.parametrize(
    "record",
    [
        {"prompt": "U", "chosen": "A", "rejected": "B"},
        {"prompt": [user("U")], "chosen": "A", "rejected": [assistant("B")]},
        {"prompt": "U", "chosen": [assistant("A")], "rejected": [assistant("B")]},
        {"prompt": "U", "chosen": [user("U"), assistant("A")], "rejected": [user("U"), assistant("B")]},
        {"prompt": [user("U")], "chosen": [user("U"), assistant("A")], "rejected": "B"},
        {"chosen": [user("U"), assistant("A")], "rejected": [user("U"), assistant("B")]},
    ],
)
def test_every_format_gives_the_same_pair(record):
    pair = read_pair(record)
    assert (pair.prompt, pair.chosen, pair.rejected) == ([user("U")], "A", "B")


def test_a_conversation_may_hold_more_turns_than_its_text_prompt():
    turns = [system("S"), user("U"), assistant("V"), user("W")]
    assert read_pair({"prompt": turns, "chosen": "A", "rejected": "B"}).prompt == turns
    sides = {"chosen": [*turns, assistant("A")], "rejected": [*turns, assistant("B")]}
    assert read_pair(sides).prompt == turns
    assert read_pair({"prompt": "W", **sides}).prompt == turns


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        ({"prompt": "U", "chosen": "A"}, "missing field"),
        (["U", "A", "B"], "not an object"),
        ({"chosen": "A", "rejected": "B"}, "no prompt"),
        ({"prompt": "U", "chosen": "A", "rejected": ""}, "empty answer"),
        ({"prompt": "U", "chosen": " ", "rejected": "B"}, "empty answer"),
        ({"prompt": "U", "chosen": "A", "rejected": "A\n"}, "identical chosen and rejected"),
        ({"prompt": "U", "chosen": 1, "rejected": "A"}, "content is not text"),
        ({"prompt": "", "chosen": "A", "rejected": "B"}, "empty message"),
        (
            {"prompt": "U", "chosen": [user("U"), assistant("A")], "rejected": [user("X"), assistant("B")]},
            "sides of different prompts",
        ),
        ({"prompt": "X", "chosen": [user("U"), assistant("A")], "rejected": "B"}, "sides of different prompts"),
        (
            {"prompt": [system("S"), user("U")], "chosen": [user("U"), assistant("A")], "rejected": "B"},
            "sides of different prompts",
        ),
        ({"prompt": "U", "chosen": [user("U")], "rejected": "B"}, "no assistant turn"),
        ({"prompt": [user("U"), assistant("A")], "chosen": "A", "rejected": "B"}, "roles do not alternate"),
        ({"prompt": [system("")], "chosen": "A", "rejected": "B"}, "roles do not alternate"),
        ({"prompt": [{"role": "bot", "content": "U"}], "chosen": "A", "rejected": "B"}, "unknown role"),
    ],
)
def test_unusable_pairs_have_a_reason(record, reason):
    with pytest.raises(Unusable) as caught:
        read_pair(record)
    assert caught.value.reason == reason


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        ({"txt": "a"}, "missing field"),
        ({"text": None}, "missing field"),
        ({"text": 3}, "content is not text"),
        (7, "not an object"),
        ({"text": " \n"}, "empty text"),
        ({"text": "\udc00"}, "not valid Unicode"),
    ],
)
def test_unusable_texts_have_a_reason(record, reason):
    with pytest.raises(Unusable) as caught:
        read_text(record, "text")
    assert caught.value.reason == reason
