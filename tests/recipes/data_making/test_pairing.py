"""Prompts of records, what speaks against a pair, and the bounds of lengths."""

import math

import numpy as np
import pytest

from engine.data.records import Unusable
from recipes.data_making.pairing import describe_lengths, length_bounds, log_ratio, objections, read_prompt, similarity

pytest.importorskip("rapidfuzz", reason="rapidfuzz comes with the extra eval")

QUESTION = {"role": "user", "content": "Where is it?"}
ANSWER = {"role": "assistant", "content": "Here."}
JA = [{"role": "user", "content": "日本の首都はどこですか。"}]


@pytest.mark.parametrize(
    ("record", "chosen", "rejected"),
    [
        ({"prompt": "Where is it?", "chosen": "Here.", "rejected": "There."}, "Here.", "There."),
        ({"messages": [QUESTION, ANSWER]}, "Here.", None),
        ({"prompt": "Where is it?", "completion": "Here."}, "Here.", None),
        ({"messages": [QUESTION]}, None, None),
        ({"conversations": '[{"from": "human", "value": "Where is it?"}]'}, None, None),
        ({"prompt": "Where is it?"}, None, None),
        ({"instruction": "Where is", "input": "it?", "output": None}, None, None),
        ({"prompt": [QUESTION]}, None, None),
    ],
)
def test_the_prompt_of_a_record_is_all_before_its_last_answer(record, chosen, rejected):
    prompt = read_prompt(record)
    assert " ".join(prompt.messages[-1]["content"].split()) in ("Where is it?", "Where is it?")
    assert [message["role"] for message in prompt.messages] == ["user"]
    assert (prompt.chosen, prompt.rejected) == (chosen, rejected)


def test_a_conversation_that_ends_with_a_question_keeps_its_earlier_answers():
    prompt = read_prompt({"messages": [QUESTION, ANSWER, {"role": "user", "content": "And now?"}]})
    assert [message["content"] for message in prompt.messages] == ["Where is it?", "Here.", "And now?"]
    assert prompt.chosen is None


@pytest.mark.parametrize("record", [{"text": "a"}, {"messages": []}, 5, {"prompt": ""}])
def test_a_record_without_a_prompt_is_refused(record):
    with pytest.raises(Unusable):
        read_prompt(record)


@pytest.mark.parametrize(
    ("prompt", "chosen", "rejected", "reasons"),
    [
        ([QUESTION], "It is here.", "I cannot find the thing.", []),
        ([QUESTION], "It is here.", " It is here.\n", ["equal answers"]),
        ([QUESTION], "It is here, behind the old door.", "It is here, behind the old door!", ["nearly equal answers"]),
        ([QUESTION], " ", "It is here.", ["empty answer"]),
        (JA, "日本の首都は東京です。", "大阪かもしれません。", []),
        (JA, "日本の首都は東京 which is a very large city です。", "大阪かもしれません。", ["chosen answer leaks"]),
        (JA, "The capital of Japan is Tokyo, a very large city.", "大阪かもしれません。", ["wrong language"]),
        # A leak of the rejected answer is what the pair is to teach.
        (JA, "日本の首都は東京です。", "The capital of Japan is Osaka, I think.", []),
    ],
)
def test_pairs_that_would_teach_nothing_or_a_leak_are_objected_to(prompt, chosen, rejected, reasons):
    found = [*objections(prompt, chosen, rejected, most_similar=0.9)]
    assert [reason.partition(":")[0] for reason in found] == reasons


def test_similarity_is_the_share_of_characters_that_stay():
    # 4 of 4 and 4 of 6 characters: 2 * 4 / 10.
    assert similarity("abcd", "abxcdy") == pytest.approx(0.8)


def test_length_bounds_are_robust_and_wide_enough():
    rng = np.random.default_rng(0)
    ratios = rng.normal(0.3, 0.5, 2000).tolist()
    bounds = length_bounds([*ratios, *[9.0] * 100], 3.0)
    assert bounds.low == pytest.approx(0.3 - 1.5, abs=0.15)
    assert bounds.high == pytest.approx(0.3 + 1.5, abs=0.15)
    assert not bounds.hold(9.0)
    assert length_bounds(ratios, 0.0).hold(1e9)
    assert length_bounds(ratios[:10], 3.0).hold(1e9)
    # All alike: a factor of 1.25 in length is no outlier.
    assert length_bounds([0.0] * 100, 1.0).hold(math.log(1.24))


def test_lengths_are_described_as_preference_tuning_sees_them():
    said = describe_lengths([(199, 99), (99, 199), (399, 99)])
    assert "232 chosen, 132 rejected" in said
    assert "longer one in 67% of the pairs, and 2.00 times as long in the middle" in said
    assert log_ratio(199, 99) == pytest.approx(math.log(2))
