"""A file of prompts is read and checked before a run starts."""

import json

import pytest

from engine.inference.prompts import read_prompts
from model.config import read_config
from model.vocabulary.chat import encode_prompt
from model.vocabulary.tokenizer import Tokenizer


@pytest.fixture
def read(tiny_model, tmp_path):
    """read(content, name, chat) -> the prompts of a file with this content."""
    tokenizer, config = Tokenizer.load(tiny_model), read_config(tiny_model)

    def prompts(content, name="prompts.txt", chat=True, new_tokens=60):
        file = tmp_path / name
        if content is not None:
            file.write_text(content if isinstance(content, str) else "".join(json.dumps(line) + "\n" for line in content))
        return read_prompts(str(file), tokenizer, config, chat=chat, new_tokens=new_tokens)

    return prompts


def test_a_line_is_a_users_message_or_the_beginning_of_a_text(read, tiny_model):
    tokenizer = Tokenizer.load(tiny_model)
    lines = ["the cat sees", "ねこ は"]
    for chat in (True, False):
        found = read("\n".join(lines) + "\n\n", chat=chat)
        assert [prompt.text for prompt in found] == lines
        expected = [
            encode_prompt(tokenizer, [{"role": "user", "content": line}])
            if chat
            else [tokenizer.bos_id, *tokenizer.encode(line)]
            for line in lines
        ]
        assert [prompt.ids for prompt in found] == expected


def test_json_lines_have_prompts_or_messages(read, tiny_model):
    tokenizer = Tokenizer.load(tiny_model)
    talk = [
        {"role": "system", "content": "a dog"},
        {"role": "user", "content": "the cat\nruns"},
    ]
    found = read([{"prompt": "the cat"}, {"messages": talk}, {"prompt": talk[1:]}], "prompts.jsonl")
    assert [prompt.text for prompt in found] == ["the cat", "system: a dog\nuser: the cat\nruns", "the cat\nruns"]
    assert [prompt.ids for prompt in found] == [
        encode_prompt(tokenizer, messages) for messages in ([{"role": "user", "content": "the cat"}], talk, talk[1:])
    ]


@pytest.mark.parametrize(
    ("content", "name", "chat", "said"),
    [
        (None, "prompts.txt", True, r"evaluate.prompts = .*prompts.txt: no such file"),
        ("the cat\n", "prompts.csv", True, r"must be .txt \(a prompt a line\) or JSON Lines"),
        ("\n\n", "prompts.txt", True, r"prompts.txt: empty: no record in it"),
        (
            "the cat\n\n" + "the cat " * 40,
            "prompts.txt",
            True,
            r"prompts.txt:3: a prompt of \d+ tokens and an answer of",
        ),
        ('{"prompt": "a"}\n{"prompt', "prompts.jsonl", True, r"prompts.jsonl:2: broken JSON"),
        ([{"prompt": "a"}, {"prompt": " "}], "prompts.jsonl", True, r"prompts.jsonl:2: the prompt is empty"),
        ([{"question": "a"}], "prompts.jsonl", True, r'prompts.jsonl:1: a record needs either "prompt"'),
        (
            [{"messages": [{"role": "assistant", "content": "a"}]}],
            "prompts.jsonl",
            True,
            r"prompts.jsonl:1: message 1 has",
        ),
        ([{"messages": []}], "prompts.jsonl", True, r"prompts.jsonl:1: the conversation is empty"),
        ([{"messages": [{"role": "user", "content": "a"}]}], "prompts.jsonl", False, r"pre-training continues plain text"),
    ],
    ids=lambda value: None if isinstance(value, (list, bool)) else str(value)[:20],
)
def test_a_prompt_that_cannot_be_answered_is_named_with_its_line(read, content, name, chat, said):
    with pytest.raises((ValueError, FileNotFoundError), match=said) as refused:
        read(content, name, chat)
    assert "\n" not in str(refused.value)
