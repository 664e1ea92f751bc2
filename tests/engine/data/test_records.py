"""Records of every format, and the reasons why records are skipped."""

import json

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
        {"conversations": [{"from": "developer", "value": "S"}, {"from": "user", "value": "U"}, {"from": "gpt", "value": "A"}]},
        {"conversations": [system("S"), user("U"), assistant("A")]},
        {"messages": [{"role": "developer", "content": "S"}, user([{"type": "text", "text": "U"}]), assistant(["A"])]},
        {"messages": [user("U"), assistant("A")], "system": "S", "tools": [], "images": None, "history": []},
        {"messages": [system("S"), user("U"), {**assistant("A"), "tool_calls": [], "weight": 1}], "system": "S"},
        {"system": "S", "prompt": "U", "completion": "A"},
        {"system": "S", "instruction": "U", "output": "A", "history": None},
        {"system_prompt": "S", "question": "U", "response": "A"},
        {"system_message": "S", "prompt": "U", "completion": "A", "response": "A", "label": True, "weight": 1.0, "train": True},
        {"messages": [{"role": "System", "content": "S"}, {"role": "User", "content": "U"}, {"role": "GPT", "content": "A"}]},
        {"messages": [system("S"), user("U"), {**assistant("A"), "mask": False, "refusal": None}], "documents": [], "label": 3},
        {"system": "S", "query": "U", "response": "A", "history": "[]"},
        # As Parquet holds them: a table of lists, columns of both spellings, and JSON.
        {"messages": {"role": ["system", "user", "assistant"], "content": ["S", "U", "A"]}, "tools": "[]"},
        {
            "messages": [
                {"role": "system", "content": "S", "from": None, "value": None, "tool_calls": None},
                {"role": None, "content": None, "from": "human", "value": "U", "tool_calls": []},
                {"role": "assistant", "content": "A", "from": None, "function_call": {"name": None, "arguments": None}},
            ]
        },
        {"messages": json.dumps([system("S"), user("U"), assistant("A")])},
        {"prompt": json.dumps([system("S"), user("U")]), "completion": "A"},
    ],
)
def test_every_format_gives_the_same_conversation(record):
    assert read_conversation(record) == [system("S"), user("U"), assistant("A")]


def test_alpaca_and_prompt_completion_records_give_conversations():
    assert read_conversation({"instruction": "I", "input": "X", "output": "O"}) == [user("I\n\nX"), assistant("O")]
    for empty in ({}, {"input": ""}, {"input": None}, {"input": " "}):
        assert read_conversation({"instruction": "I", **empty, "output": "O"}) == [user("I"), assistant("O")]
    assert read_conversation({"instruction": "", "input": "X", "output": "O"}) == [user("X"), assistant("O")]
    assert read_conversation({"prompt": "P", "completion": "C"}) == [user("P"), assistant("C")]
    assert read_conversation({"prompt": [user("P")], "completion": [assistant("C")]}) == [user("P"), assistant("C")]


def test_a_history_is_earlier_exchanges():
    expected = [system("S"), user("U"), assistant("A"), user("I\n\nX"), assistant("O")]
    record = {"instruction": "I", "input": "X", "output": "O", "system": "S"}
    for history in ([["U", "A"]], json.dumps([["U", "A"]]), [user("U"), assistant("A")]):
        assert read_conversation({**record, "history": history}) == expected


def test_an_answer_of_weight_0_is_context_only():
    names = ("weight", "train", "loss", "loss_weight", "trainable", "training")
    for untrained in (*({name: False} for name in names), {"weight": 0}, {"weight": 0.0, "loss": False}):
        turns = [user("U"), {**assistant("A"), **untrained}, {**user("V"), "weight": None}, {**assistant("B"), "weight": 1}]
        expected = [user("U"), {**assistant("A"), "train": False}, user("V"), assistant("B")]
        assert read_conversation({"messages": turns}) == expected


def test_a_text_that_is_json_of_something_else_stays_text():
    for text in ("[1, 2]", '{"role": "x", "content": "y"}', '[{"role": "admin"}]', "[", "{}"):
        assert read_conversation({"prompt": "P", "completion": text})[1] == assistant(text)


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
        ({"messages": [{"role": "tool", "content": "U"}, assistant("A")]}, "unknown role"),
        ({"messages": [user("U"), {**assistant("A"), "tool_calls": [{"name": "f"}]}]}, "tool calls"),
        ({"messages": [user("U"), {**assistant("A"), "function_call": {"name": "f"}}]}, "tool calls"),
        ({"messages": [user("U"), {**assistant("A"), "reasoning_content": "R"}]}, "reasoning beside the text"),
        ({"messages": [user("U"), {**assistant("A"), "prefix": True}]}, "weights within a turn"),
        ({"messages": [user("U"), assistant("A")], "tools": [{"name": "f"}]}, "tools"),
        ({"messages": [user("U"), assistant("A")], "tools": '[{"name": "f"}]'}, "tools"),
        ({"messages": [user("U"), assistant("A")], "images": ["a.png"]}, "media beside the text"),
        ({"messages": [user("U"), {**assistant("A"), "weight": 0.5}]}, "weight that is neither 0 nor 1"),
        ({"messages": [user("U"), {**assistant("A"), "weight": "0"}]}, "weight that is neither 0 nor 1"),
        ({"messages": [user("U"), {**assistant("A"), "weight": 0, "train": True}]}, "weights that disagree"),
        ({"messages": [{**user("U"), "train": True}, assistant("A")]}, "weight on a turn that is not the assistant's"),
        ({"messages": [user("U"), {**assistant("A"), "weight": 0}]}, "no trained turn"),
        ({"messages": [{**user("U"), "from": "gpt"}, assistant("A")]}, "two values for one thing"),
        ({"messages": [system("S"), user("U"), assistant("A")], "system": "T"}, "two system messages"),
        ({"messages": [user("U"), assistant("A")], "history": [["U", "A"]]}, "history beside turns"),
        ({"messages": [user("U"), assistant("A")], "system": 0}, "content is not text"),
        ({"prompt": [system("S"), user("U")], "completion": "A", "history": [["U", "A"]]}, "history or context beside turns"),
        ({"prompt": "U", "completion": "A", "history": False}, "history is not a list"),
        ({"prompt": "U", "completion": "A", "history": [["U", "A", "B"]]}, "no conversation"),
        ({"instruction": "I", "input": "X", "context": "Y", "output": "O"}, "two contexts"),
        ({"prompt": False, "completion": "A"}, "content is not text"),
        ({"messages": [user("U"), user("V"), assistant("A")]}, "roles do not alternate"),
        ({"messages": [assistant("A"), user("U")]}, "roles do not alternate"),
        ({"messages": [user("U"), system("S"), assistant("A")]}, "roles do not alternate"),
        ({"messages": [user("U"), assistant("")]}, "empty answer"),
        ({"messages": [user("U"), assistant(" \n")]}, "empty answer"),
        ({"messages": [user(""), assistant("A")]}, "empty message"),
        ({"messages": [user("U"), assistant(None)]}, "content is not text"),
        ({"messages": [user([]), assistant("A")]}, "content is not text"),
        ({"messages": [user([{"type": "image_url", "image_url": "u"}]), assistant("A")]}, "content is not text"),
        ({"messages": [user([{"type": "text", "text": "U", "image": "u"}]), assistant("A")]}, "content is not text"),
        *(({"instruction": "I", "input": wrong, "output": "O"}, "content is not text") for wrong in (3, 0, False, [], {})),
        ({"messages": [user("U"), assistant("\ud800")]}, "not valid Unicode"),
        ({"prompt": "P", "completion": ""}, "empty answer"),
        ({"prompt": "P", "completion": "C", "label": False}, "labelled as a bad answer"),
        ({"messages": [user("U"), assistant("A")], "label": False}, "labelled as a bad answer"),
        ({"messages": [user("U"), assistant("A")], "weight": 0}, "record of weight 0"),
        ({"messages": [user("U"), assistant("A")], "train": False}, "record of weight 0"),
        ({"messages": [user("U"), assistant("A")], "weight": 0.5}, "weight that is neither 0 nor 1"),
        ({"messages": [user("U"), assistant("A")], "train": "no"}, "weight that is neither 0 nor 1"),
        ({"messages": [user("U"), assistant("A")], "function_call": {"name": "f"}}, "tool calls"),
        ({"messages": [user("U"), assistant("A")], "documents": [{"text": "D"}]}, "documents beside the text"),
        ({"messages": [user("U"), {**assistant("A"), "mask": True}]}, "weights within a turn"),
        ({"messages": [user("U"), {**assistant("A"), "refusal": "no"}]}, "a refusal beside the text"),
        ({"messages": [user("U"), {**assistant("A"), "thought": "T"}]}, "reasoning beside the text"),
        ({"prompt": "P", "completion": "C", "response": "R"}, "two answers"),
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
        {"prompt": "U", "chosen": assistant("A"), "rejected": {"from": "gpt", "value": "B"}},
        {"conversations": [{"from": "human", "value": "U"}], "chosen": assistant("A"), "rejected": assistant("B")},
        {"question": "U", "chosen": "A", "rejected": "B", "system": ""},
        {"instruction": "U", "input": "", "chosen": "A", "rejected": "B"},
        {"chosen": "\n\nHuman: U\n\nAssistant: A", "rejected": "\n\nHuman: U\n\nAssistant: B"},
        {"prompt": "\n\nHuman: U\n\nAssistant:", "chosen": " A".strip(), "rejected": "B"},
        {"chosen": json.dumps([user("U"), assistant("A")]), "rejected": json.dumps([user("U"), assistant("B")])},
        {"prompt": "U", "chosen": [user("U"), assistant("A")], "rejected": "B", "messages": [user("U"), assistant("A")]},
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


def test_a_pairs_prompt_has_its_system_message_and_history():
    turns = [system("S"), user("U"), assistant("V"), user("W\n\nX")]
    record = {"system": "S", "history": [["U", "V"]], "instruction": "W", "input": "X", "chosen": "A", "rejected": "B"}
    assert read_pair(record).prompt == turns
    sides = {"chosen": [user("U"), assistant("A")], "rejected": [user("U"), assistant("B")]}
    for prompt in ({}, {"prompt": "U"}, {"prompt": [user("U")]}):
        assert read_pair({"system": "S", **prompt, **sides}).prompt == [system("S"), user("U")]
    weighted = [user("U"), {**assistant("V"), "weight": 0}, user("W")]
    assert read_pair({"prompt": weighted, "chosen": "A", "rejected": "B"}).prompt == [user("U"), assistant("V"), user("W")]


def test_transcripts_are_conversations():
    text = "\n\nHuman: U\nand more\n\nAssistant: V\n\nHuman: W\n\nAssistant: "
    pair = read_pair({"chosen": text + "A", "rejected": text + "B"})
    assert pair.prompt == [user("U\nand more"), assistant("V"), user("W")]
    assert (pair.chosen, pair.rejected) == ("A", "B")


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        ({"prompt": "U", "chosen": "A"}, "missing field"),
        ({"prompt": "U", "chosen": "A", "rejected": "B", "weight": 0}, "record of weight 0"),
        ({"chosen": "\n\nHuman: U\n\nAssistant:", "rejected": "\n\nHuman: U\n\nAssistant: B"}, "empty answer"),
        ({"chosen": "Human: U", "rejected": "\n\nHuman: U\n\nAssistant: B"}, "sides of different prompts"),
        ({"prompt": "U", "chosen": [{**assistant("A"), "weight": 0}], "rejected": "B"}, "answer of weight 0"),
        ({"prompt": "U", "chosen": "A", "rejected": "B", "tools": [{"name": "f"}]}, "tools"),
        ({"prompt": "U", "chosen": ["A"], "rejected": "B"}, "no conversation"),
        ({"prompt": "U", "chosen": [], "rejected": "B"}, "no assistant turn"),
        ({"prompt": "U", "chosen": "A", "rejected": False}, "content is not text"),
        ({"chosen": "\n\nHuman: U\n\nAssistant: A", "rejected": "\n\nHuman: X\n\nAssistant: B"}, "sides of different prompts"),
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
