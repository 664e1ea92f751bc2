"""The chat template against the text of the model card and against `apply_chat_template` of the written folder."""

import jinja2
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from model.vocabulary.chat import check_messages, encode_chat, encode_prompt, render
from model.vocabulary.template import CHAT_TEMPLATE

SPECIALS = ("<s>", "</s>", "<unk>")


def conversation(*contents: str, system: str | None = None) -> list[dict[str, str]]:
    first = [] if system is None else [{"role": "system", "content": system}]
    return first + [{"role": ("user", "assistant")[n % 2], "content": text} for n, text in enumerate(contents)]


ALPHABET = st.one_of(st.sampled_from(" \n\tab1日本語。[]/INST<>s"), st.characters(exclude_categories=["Cs"]))
CONTENT = st.text(ALPHABET, min_size=1, max_size=20).filter(
    lambda text: text.strip() and not any(special in text for special in SPECIALS)
)
CONVERSATIONS = st.builds(
    lambda system, contents: conversation(*contents, system=system),
    st.one_of(st.none(), st.just(""), CONTENT),
    st.lists(CONTENT, min_size=1, max_size=5),
)


@pytest.fixture(scope="module")
def loaded(extended):
    return AutoTokenizer.from_pretrained(extended.folder)


def test_renders_the_form_of_the_model_card():
    assert render(conversation("Q1", "A1", "Q2", "A2", system="S")) == (
        "<s>[INST] <<SYS>>\nS\n<</SYS>>\n\nQ1 [/INST] A1 </s><s>[INST] Q2 [/INST] A2 </s>"
    )
    assert render(conversation("Q1", "A1", "Q2")) == "<s>[INST] Q1 [/INST] A1 </s><s>[INST] Q2 [/INST]"


def test_equals_the_published_template_after_the_first_token():
    published = (
        "{% for message in messages %}{% if message['role'] == 'system' %}"
        "{{ '[INST] <<SYS>>\\n' + message['content'] + '\\n<</SYS>>\\n\\n' }}"
        "{% elif message['role'] == 'user' and loop.index0 <= 1 %}{{ message['content'] + ' [/INST]' }}"
        "{% elif message['role'] == 'user' %}{{ bos_token + '[INST] ' + message['content'] + ' [/INST]' }}"
        "{% else %}{{ ' ' + message['content'] + ' ' + eos_token }}{% endif %}{% endfor %}"
    )
    messages = conversation(" Q1\n", "A1", "Q2", "A2", "Q3", system="\nS ")
    expected = jinja2.Template(published).render(messages=messages, bos_token="<s>", eos_token="</s>")
    assert render(messages) == "<s>" + expected


@settings(deadline=None, derandomize=True)
@given(messages=CONVERSATIONS)
def test_text_and_ids_equal_transformers(extended, loaded, messages):
    for prompt in (False, True):
        options = {"add_generation_prompt": prompt}
        assert render(messages, **options) == loaded.apply_chat_template(messages, tokenize=False, **options)
        ids = loaded.apply_chat_template(messages, tokenize=True, return_dict=True, **options)["input_ids"]
        assert encode_chat(extended.tokenizer, messages).ids == ids
        if messages[-1]["role"] == "user":
            assert encode_prompt(extended.tokenizer, messages) == ids


@settings(deadline=None, derandomize=True)
@given(messages=CONVERSATIONS)
def test_trained_tokens_equal_the_assistant_mask_of_transformers(extended, loaded, messages):
    answer = "{{- ' ' + message['content'] + ' ' + eos_token -}}"
    assert CHAT_TEMPLATE.count(answer) == 1
    marked = CHAT_TEMPLATE.replace(answer, "{% generation %}" + answer + "{% endgeneration %}")
    mask = loaded.apply_chat_template(messages, chat_template=marked, return_dict=True, return_assistant_tokens_mask=True)
    assert encode_chat(extended.tokenizer, messages).trained == [bool(entry) for entry in mask["assistant_masks"]]


@settings(deadline=None, derandomize=True)
@given(messages=CONVERSATIONS.filter(lambda messages: messages[-1]["role"] == "assistant"))
def test_the_prompt_is_a_prefix_and_the_rest_is_trained(extended, messages):
    tokenizer = extended.tokenizer
    prompt = encode_prompt(tokenizer, messages[:-1])
    encoded = encode_chat(tokenizer, messages)
    assert encoded.ids[: len(prompt)] == prompt
    assert all(encoded.trained[len(prompt) :])
    assert encoded.ids[-1] == tokenizer.eos_id
    assert tokenizer.decode(encoded.ids[len(prompt) :]) == (messages[-1]["content"] + " ").replace("\u2581", " ")
    answers = [message["content"] for message in messages if message["role"] == "assistant"]
    trained_ids = [id for id, trained in zip(encoded.ids, encoded.trained, strict=True) if trained]
    assert trained_ids.count(tokenizer.eos_id) == len(answers)


def test_spelled_specials_stay_plain_text(extended):
    tokenizer = extended.tokenizer
    messages = conversation("a</s><s>b", "c <unk> </s>", "d", system="<s>[INST] x </s>")
    expected = [1, *tokenizer.encode("[INST] <<SYS>>\n<s>[INST] x </s>\n<</SYS>>\n\na</s><s>b [/INST] c <unk> </s> "), 2]
    expected += [1, *tokenizer.encode("[INST] d [/INST]")]
    encoded = encode_chat(tokenizer, messages)
    assert encoded.ids == expected
    assert (encoded.ids.count(1), encoded.ids.count(2), encoded.ids.count(0)) == (2, 1, 0)
    assert sum(encoded.trained) == len(tokenizer.encode("c <unk> </s> ")) + 1


def test_a_token_across_the_boundary_is_not_trained(extended):
    class Joining:
        """A tokenizer with one token for the end of [/INST] and the beginning of the answer."""

        bos_id, eos_id, template = 1, 2, None

        def encode_with_offsets(self, text, *, first):
            cut = text.index("[/INST]") + 5
            return [7, 8, 9], [(0, cut), (cut, cut + 4), (cut + 4, len(text))]

    encoded = encode_chat(Joining(), conversation("Q", "Answer"))
    assert encoded.ids == [1, 7, 8, 9, 2]
    assert encoded.trained == [False, False, False, True, True]


REFUSED = [
    ([], "empty"),
    ([{"role": "system", "content": "S"}], "no user message"),
    ([{"role": "human", "content": "Q"}], "message 1 has the unknown role 'human'"),
    ([*conversation("Q"), {"role": "gpt", "content": "A"}], "message 2 has the unknown role 'gpt'"),
    ([*conversation("Q", "A"), {"role": "system", "content": "S"}], "message 3 is a system message"),
    ([{"role": "assistant", "content": "A"}], "message 1 has role 'assistant' at the beginning, where 'user' must stand"),
    ([*conversation("Q", system="S")[:1], {"role": "assistant", "content": "A"}], "message 2 has role 'assistant' after"),
    (conversation("Q") * 2, "message 2 has role 'user' after a message of role 'user', where 'assistant' must stand"),
    ([*conversation("Q", "A", "Q2", "A2"), {"role": "assistant", "content": "A"}], "message 5 has role 'assistant' after"),
    (conversation("Q", " \n"), r"message 2 \(assistant\) is empty"),
    (conversation("\t", "A"), r"message 1 \(user\) is empty"),
    ([{"role": "user", "content": None}], r"message 1 \(user\): its content must be text, not NoneType"),
    ([{"role": "user", "content": ["Q"]}], r"message 1 \(user\): its content must be text, not list"),
]


@pytest.mark.parametrize(("messages", "message"), REFUSED, ids=lambda value: value if isinstance(value, str) else "")
def test_inexpressible_conversations_are_refused_here_and_by_the_template(mistral, messages, message):
    for refuse in (check_messages, render, lambda messages: encode_chat(mistral, messages)):
        with pytest.raises(ValueError, match=message):
            refuse(messages)
    environment = jinja2.Environment()

    def raise_exception(text):
        raise jinja2.TemplateError(text)

    with pytest.raises(jinja2.TemplateError):
        environment.from_string(CHAT_TEMPLATE, globals={"raise_exception": raise_exception}).render(
            messages=messages, bos_token="<s>", eos_token="</s>"
        )


@pytest.mark.parametrize("message", ["text", {"role": "user"}, {"from": "human", "value": "Q"}])
def test_a_message_of_another_form_is_shown(message):
    with pytest.raises(ValueError, match="message 2 must be an object with 'role' and 'content'"):
        check_messages([*conversation("Q"), message])


def test_a_prompt_must_end_with_the_user(mistral):
    with pytest.raises(ValueError, match="must end with a user message, not with one of role 'assistant'"):
        encode_prompt(mistral, conversation("Q", "A"))
