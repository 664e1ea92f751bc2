"""Chat templates by name against transformers: text, ids and trained tokens; and on 1,000 real conversations in every form."""

import gzip
import json
from itertools import groupby, islice

import pytest
from transformers import AutoTokenizer

from engine.data.records import Unusable, read_conversation
from model.vocabulary.chat import encode_chat, encode_prompt, end_id, template_name, with_named_template
from model.vocabulary.export import write_tokenizer_folder
from model.vocabulary.tokenizer import CHATML, Tokenizer
from model.vocabulary.tokenizer_folder import AddedToken, with_pieces

# Another maker's form, without generation blocks: the answers are found by rendering.
ZEPHYR = (
    "{{ bos_token }}{% for message in messages %}\n"
    "{{ '<|' + message['role'] + '|>\n' + message['content'] + eos_token + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)
# name -> what stands behind an answer
ENDS = {"shisa": "</s>", "chatml": "<|im_end|>", "zephyr": "</s>"}

SPOKEN = [
    ("Be brief. 短く。", "東京🗼の天気は？", "晴れ☀️です。\n\n- 20℃", "Are you sure [INST]?", "はい [/INST] <<SYS>>。"),
    (None, "```python\nprint('<|user|>')\n```", " leading and trailing "),
    (None, "a", "b", "c", "👩‍👩‍👧‍👦 family", "e", "  f\n"),
]


def turns(system, *contents):
    head = [] if system is None else [{"role": "system", "content": system}]
    return head + [{"role": ("user", "assistant")[n % 2], "content": text} for n, text in enumerate(contents)]


@pytest.fixture(scope="module")
def tokenizer(mistral) -> Tokenizer:
    """Mistral's with ChatML's two tokens."""
    added = [AddedToken(mistral.vocab_size + n, token, True, ()) for n, token in enumerate(CHATML)]
    return Tokenizer(with_pieces(mistral.model_bytes, added))


@pytest.fixture(scope="module", params=ENDS)
def both(request, tokenizer, tmp_path_factory):
    """(name, ours, transformers' from the folder that ours writes)."""
    folder = tmp_path_factory.mktemp(request.param)
    (folder / "zephyr.jinja").write_text(ZEPHYR)
    named = str(folder / "zephyr.jinja") if request.param == "zephyr" else request.param
    ours = with_named_template(tokenizer, named)
    write_tokenizer_folder(folder / "written", ours)
    return request.param, ours, AutoTokenizer.from_pretrained(folder / "written")


def check(name, ours, theirs, messages):
    """Text and ids equal transformers', and the trained spans are the answers with their end."""
    encoded = encode_chat(ours, messages)
    assert encoded.ids == theirs.apply_chat_template(messages, return_dict=True)["input_ids"]
    if name != "zephyr":
        mask = theirs.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)["assistant_masks"]
        assert encoded.trained == [bool(entry) for entry in mask]
    pairs = groupby(zip(encoded.ids, encoded.trained, strict=True), key=lambda pair: pair[1])
    spans = [ours.spell([id for id, _ in run]) for trained, run in pairs if trained]
    answers = [message["content"] for message in messages if message["role"] == "assistant"]
    # shisa's answers stand between spaces, and a section's first piece has one of its own in all templates.
    assert [span.strip(" ") for span in spans] == [
        (said + ("", " ")[name == "shisa"]).lstrip(" ") + ENDS[name] for said in answers
    ]
    question = messages[: max(n for n, message in enumerate(messages) if message["role"] == "user") + 1]
    prompt = theirs.apply_chat_template(question, add_generation_prompt=True, return_dict=True)["input_ids"]
    assert encode_prompt(ours, question) == prompt


@pytest.mark.parametrize("spoken", SPOKEN)
def test_text_ids_and_trained_tokens_equal_transformers(both, spoken):
    name, ours, theirs = both
    check(name, ours, theirs, turns(*spoken))
    assert ours.special_ids[ENDS[name]] == end_id(ours)


def test_a_written_folder_carries_the_template(both, tmp_path):
    _, ours, _ = both
    write_tokenizer_folder(tmp_path, ours)
    again = Tokenizer.load(tmp_path)
    assert template_name(again) == template_name(ours)
    assert encode_chat(again, turns(*SPOKEN[0])) == encode_chat(ours, turns(*SPOKEN[0]))


def test_chatml_begins_with_one_beginning_token_and_is_the_usual_text(tokenizer):
    ours = with_named_template(tokenizer, "chatml")
    assert ours.template.render(turns("S", "Q", "A", "R"), add_generation_prompt=True) == (
        "<s><|im_start|>system\nS<|im_end|>\n<|im_start|>user\nQ<|im_end|>\n<|im_start|>assistant\nA<|im_end|>\n"
        "<|im_start|>user\nR<|im_end|>\n<|im_start|>assistant\n"
    )


def test_a_template_by_name_replaces_the_folders_own(tokenizer):
    chatml = with_named_template(tokenizer, "chatml")
    assert encode_chat(with_named_template(chatml, "shisa"), turns(None, "a", "b")) == encode_chat(
        tokenizer, turns(None, "a", "b")
    )


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("chatlm", "template = 'chatlm': neither shisa nor chatml, nor a file"),
        ("bad.jinja", r"bad.jinja': the folder's own chat template, line 1"),
        ("chatml", r"the tokenizer has no token <\|im_start\|>; recipes.vocabulary adds it"),
    ],
)
def test_a_template_that_cannot_be_used_is_refused(mistral, tmp_path, monkeypatch, name, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bad.jinja").write_text("{% for %}")
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        with_named_template(mistral, name)


def forms(messages):
    """One conversation in the forms that people keep conversations in."""
    names = {"system": "system", "user": "human", "assistant": "gpt"}
    yield {"messages": messages}
    yield {"conversations": [{"from": names[turn["role"]], "value": turn["content"]} for turn in messages]}
    yield {"messages": [{**turn, "content": [{"type": "text", "text": turn["content"]}]} for turn in messages]}
    system = {"system": messages[0]["content"]} if messages[0]["role"] == "system" else {}
    said = [turn["content"] for turn in messages[len(system) :]]
    if len(said) % 2 == 0:
        history = [said[n : n + 2] for n in range(0, len(said) - 2, 2)]
        yield {"instruction": said[-2], "output": said[-1], "history": history, **system}
        yield {"prompt": messages[:-1], "completion": said[-1]}


@pytest.mark.slow
def test_1000_real_conversations_in_every_form(both, shared_data):
    name, ours, theirs = both
    seen = 0
    for file in sorted((shared_data / "sft").glob("*.jsonl.gz")):
        with gzip.open(file, "rt", encoding="utf-8") as lines:
            for line in islice(lines, 0, None, 10):
                try:
                    messages = read_conversation(json.loads(line))
                except Unusable:
                    continue
                if any(special in turn["content"] for turn in messages for special in ours.special_ids):
                    continue
                assert all(read_conversation(form) == messages for form in forms(messages))
                check(name, ours, theirs, messages)
                seen += 1
                if seen % 220 == 0:
                    break
    assert seen >= 1000
