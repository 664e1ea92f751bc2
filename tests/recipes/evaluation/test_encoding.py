"""Texts of the harness as token ids: what is scored, what joins, and the one beginning-of-sequence token."""

import pytest

from model.vocabulary.chat import encode_prompt, prompt_text
from model.vocabulary.tokenizer import Tokenizer
from recipes.evaluation.encoding import Encoder, StopTexts, cut_at


@pytest.fixture(scope="module")
def tokenizer(tiny_tokenizer) -> Tokenizer:
    return Tokenizer.load(tiny_tokenizer)


def test_context_and_continuation_are_encoded_as_one_text(tokenizer):
    (pair,) = Encoder(tokenizer).pairs([("the cat", " sees a dog")])
    assert [*pair.context, *pair.continuation] == [tokenizer.bos_id, *tokenizer.encode("the cat sees a dog")]
    assert pair.context == [tokenizer.bos_id, *tokenizer.encode("the cat")]
    assert not pair.joined


def test_spaces_at_a_contexts_end_belong_to_the_continuation(tokenizer):
    one, two = Encoder(tokenizer).pairs([("the cat ", "sees"), ("the cat", " sees")])
    assert one == two


def test_a_piece_that_joins_both_is_counted_and_the_continuation_encoded_alone(tokenizer):
    whole = tokenizer.encode("the cat")
    assert len(whole) == 2, "the tokenizer has a piece for the word"
    (pair,) = Encoder(tokenizer).pairs([("the ca", "t sees")])
    assert pair.joined
    assert pair.context == [tokenizer.bos_id, *tokenizer.encode("the ca")]
    # Nothing of the continuation is lost, and no space is put before it.
    assert tokenizer.decode([*tokenizer.encode("the ca"), *pair.continuation]) == "the cat sees"
    (vanished,) = Encoder(tokenizer).pairs([("the ca", "t")])
    assert vanished.joined
    assert tokenizer.decode([*tokenizer.encode("the ca"), *vanished.continuation]) == "the cat"


def test_an_empty_context_is_the_beginning_of_sequence_alone(tokenizer):
    (pair,) = Encoder(tokenizer).pairs([("", "the cat")])
    assert (pair.context, pair.continuation) == ([tokenizer.bos_id], tokenizer.encode("the cat"))


MESSAGES = [
    {"role": "system", "content": "it runs"},
    {"role": "user", "content": "the cat"},
    {"role": "assistant", "content": "sees"},
    {"role": "user", "content": "a </s> dog"},
]


@pytest.mark.parametrize("begins", ["", "<s>"])
def test_a_chat_has_one_beginning_of_sequence_and_a_message_never_spells_one(tokenizer, begins):
    text = prompt_text(tokenizer, MESSAGES)
    (ids,) = Encoder(tokenizer, chat=True).texts([begins + text])
    assert ids == encode_prompt(tokenizer, MESSAGES)
    assert ids[0] == tokenizer.bos_id != ids[1]
    assert ids.count(tokenizer.eos_id) == 1, "of the answered exchange alone"


def test_an_answer_that_is_begun_is_part_of_the_prompt(tokenizer):
    begun = [*MESSAGES, {"role": "assistant", "content": "it is"}]
    assert prompt_text(tokenizer, begun) == f"{prompt_text(tokenizer, MESSAGES)} it is"
    with pytest.raises(ValueError, match="must end with a user message"):
        prompt_text(tokenizer, MESSAGES[:3] + MESSAGES[2:3])


def test_an_answer_ends_with_the_token_that_completes_a_stop_text(tokenizer):
    ids = tokenizer.encode("the cat sees a red dog and it runs")
    stops = StopTexts(tokenizer, ["red d", "runs", ""])
    ended = [stops(token) for token in ids]
    first = ended.index(True)
    assert "red d" in tokenizer.decode(ids[: first + 1])
    assert "red d" not in tokenizer.decode(ids[:first])
    assert not any(StopTexts(tokenizer, [])(token) for token in ids)
    assert cut_at("the cat sees a red dog", ["dog", "red"]) == "the cat sees a "
