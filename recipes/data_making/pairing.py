"""Preference pairs: the prompt of a record, what speaks against a pair, and what its lengths would teach."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from engine.data.records import QUESTIONS, ROLES, Unusable, decoded_json, listed_field, read_conversation, read_pair
from model.vocabulary.chat import Message
from recipes.evaluation.leakage.detector import detect

# Fewer pairs have no meaningful spread.
_FEW = 20
# A median absolute deviation times this is a normal distribution's standard deviation.
_MAD = 1.4826
# Lengths that differ by less than this factor are never outliers, however alike all the others are.
_LEAST_SPREAD = math.log(1.25)


@dataclass(frozen=True)
class Prompt:
    """messages: end with the user's. chosen, rejected: the record's own answers, where it has them."""

    messages: list[Message]
    chosen: str | None = None
    rejected: str | None = None


def read_prompt(value: Any) -> Prompt:
    """The prompt of a preference pair, of a conversation (all before its last answer), or of a record without an answer.

    Raises: Unusable.
    """
    if isinstance(value, Mapping) and value.get("chosen") is not None and value.get("rejected") is not None:
        pair = read_pair(value)
        return Prompt(pair.prompt, pair.chosen, pair.rejected)
    answered = _with_answer(value)
    *before, last = read_conversation(value if answered is None else answered)
    if last["role"] != "assistant":
        raise Unusable("no answer at the end", f"the last of {len(before) + 1} messages is the {last['role']}'s")
    messages = [Message(role=turn["role"], content=turn["content"]) for turn in before]
    return Prompt(messages, None if answered is not None else last["content"])


def _with_answer(value: Any) -> dict[str, Any] | None:
    """A record that ends with a question, with an answer for the reader of conversations; None for other records."""
    if not isinstance(value, Mapping):
        return None
    listed = listed_field(value)
    if listed is not None:
        turns = decoded_json(value[listed])
        last = turns[-1] if isinstance(turns, list) and turns and isinstance(turns[-1], Mapping) else {}
        name = last.get("role") or last.get("from")
        asks = isinstance(name, str) and ROLES.get(name.lower()) == "user"
        return {**value, listed: [*turns, {"role": "assistant", "content": "-"}]} if asks else None
    for question, answers in QUESTIONS.items():
        if value.get(question) is not None:
            return None if any(value.get(name) is not None for name in answers) else {**value, answers[0]: "-"}
    return None


def objections(prompt: Sequence[Message], chosen: str, rejected: str, *, most_similar: float) -> Iterator[str]:
    """What speaks against a pair of answers, each as "reason: detail"."""
    if not chosen.strip() or not rejected.strip():
        yield f"empty answer: {'chosen' if not chosen.strip() else 'rejected'}"
        return
    if chosen.strip() == rejected.strip():
        yield f"equal answers: {chosen.strip()[:60]!r}"
    elif (alike := similarity(chosen, rejected)) >= most_similar:
        yield f"nearly equal answers: {alike:.0%} alike"
    verdict = detect(prompt, chosen)
    if verdict.leak:
        said = [chosen[start:end] for start, end in verdict.spans]
        whole = sum(map(len, said)) >= len(chosen.strip())
        yield f"{'wrong language' if whole else 'chosen answer leaks'}: {said[0][:60]!r} in {verdict.language}"


def similarity(one: str, other: str) -> float:
    """How alike two texts are, 0 to 1: 1 less the share of characters to insert and delete."""
    from rapidfuzz.distance import Indel

    return Indel.normalized_similarity(one.strip(), other.strip())


def log_ratio(chosen: int, rejected: int) -> float:
    """The logarithm of the ratio of two lengths in characters, above 0 where the chosen answer is longer."""
    return math.log((1 + chosen) / (1 + rejected))


@dataclass(frozen=True)
class Bounds:
    """Log ratios outside are outliers."""

    low: float
    high: float

    def hold(self, ratio: float) -> bool:
        return self.low <= ratio <= self.high


def length_bounds(ratios: Sequence[float], deviations: float) -> Bounds:
    """Bounds so many robust standard deviations around the median; none for 0 deviations, or for few pairs."""
    if not deviations or len(ratios) < _FEW:
        return Bounds(-math.inf, math.inf)
    middle = statistics.median(ratios)
    spread = max(_MAD * statistics.median(abs(ratio - middle) for ratio in ratios), _LEAST_SPREAD)
    return Bounds(middle - deviations * spread, middle + deviations * spread)


def describe_lengths(lengths: Sequence[tuple[int, int]]) -> str:
    """One line on the lengths (chosen, rejected) in characters: preference tuning learns length where they differ."""
    longer = sum(chosen > rejected for chosen, rejected in lengths) / len(lengths)
    ratio = math.exp(statistics.median(log_ratio(*pair) for pair in lengths))
    means = [statistics.mean(side) for side in zip(*lengths, strict=True)]
    return (
        f"characters an answer: {means[0]:,.0f} chosen, {means[1]:,.0f} rejected; the chosen answer is the longer one in "
        f"{longer:.0%} of the pairs, and {ratio:.2f} times as long in the middle"
    )
