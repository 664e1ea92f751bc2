"""Scores of predicted answers against gold answers, as llm-jp-eval version 1 computes them.

char_f1 is fuzzywuzzy's `token_sort_ratio`: its value depends on whether python-Levenshtein was installed when a log was made.
Sources: llm-jp-eval 1 (https://github.com/llm-jp/llm-jp-eval), fuzzywuzzy 0.18 (https://github.com/seatgeek/fuzzywuzzy).
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Sequence
from statistics import mean
from typing import Literal

import numpy as np

Ratio = Literal["levenshtein", "difflib"]

UNREADABLE = -2.0  # llm-jp-eval's number for an answer that holds no number

# fuzzywuzzy drops Latin-1's upper half ("é", "°"), and makes spaces of all that is neither letter, digit nor underscore.
_LATIN_1 = dict.fromkeys(range(128, 256))
_OTHER = re.compile(r"\W")


def exact_match(predictions: Sequence[str], golds: Sequence[str]) -> float:
    """Share of the predictions that equal their gold answer."""
    return mean(float(prediction == gold) for prediction, gold in zip(predictions, golds, strict=True))


def char_f1(predictions: Sequence[str], golds: Sequence[str], ratio: Ratio = "levenshtein") -> float:
    """Mean similarity in [0, 1]; each item's similarity is rounded to a whole per cent, as fuzzywuzzy does.

    Raises: ValueError where the ratio is levenshtein and rapidfuzz is not installed.
    """
    similarity = _similarity(ratio)
    # The exact mean of the items' floats, as there: a sum would round ties at the fourth digit otherwise.
    return mean(_per_cent(*pair, similarity) / 100 for pair in zip(predictions, golds, strict=True))


def pearson(predictions: Sequence[str], golds: Sequence[str]) -> float:
    """Pearson's correlation of the numbers in predictions and golds; 0 where it is not defined."""
    return _correlation(_numbers(predictions), _numbers(golds))


def spearman(predictions: Sequence[str], golds: Sequence[str]) -> float:
    """Spearman's correlation: Pearson's of the ranks, equal numbers sharing their mean rank; 0 where it is not defined."""
    return _correlation(_ranks(_numbers(predictions)), _ranks(_numbers(golds)))


def number(answer: str) -> float:
    """The number in an answer: its digits and points alone, so that "-1." is 1.0 and "6, 6" is 66.0; else `UNREADABLE`."""
    try:
        return float(re.sub(r"[^0-9.]", "", answer))
    except ValueError:
        return UNREADABLE


def _similarity(ratio: Ratio) -> Callable[[str, str], float]:
    """A function of two texts, at least one of them not empty, that gives 2 * matches / (both lengths)."""
    if ratio == "difflib":
        return lambda first, second: difflib.SequenceMatcher(None, first, second).ratio()
    try:
        from rapidfuzz.distance import LCSseq
    except ImportError:
        raise ValueError(
            "the ratio levenshtein needs rapidfuzz, which is not installed: pip install 'komainu[eval]', or --ratio difflib"
        ) from None
    # python-Levenshtein's ratio counts a substitution as two edits, so the longest common subsequence decides.
    return lambda first, second: 2 * LCSseq.similarity(first, second) / (len(first) + len(second))


def _per_cent(prediction: str, gold: str, similarity: Callable[[str, str], float]) -> int:
    first, second = _sorted_words(prediction), _sorted_words(gold)
    if first == second:
        return 100
    return round(100 * similarity(first, second)) if first and second else 0


def _sorted_words(text: str) -> str:
    return " ".join(sorted(_OTHER.sub(" ", text.translate(_LATIN_1)).lower().split()))


def _numbers(answers: Sequence[str]) -> np.ndarray:
    return np.array([number(answer) for answer in answers])


def _ranks(values: np.ndarray) -> np.ndarray:
    _, place, count = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(count) - (count - 1) / 2)[place]


def _correlation(first: np.ndarray, second: np.ndarray) -> float:
    if len(first) < 2 or np.ptp(first) == 0 or np.ptp(second) == 0:
        return 0.0
    with np.errstate(invalid="ignore"):  # an answer of 400 digits is infinite
        first, second = first - first.mean(), second - second.mean()
        found = float(first @ second / np.sqrt((first @ first) * (second @ second)))
    return found if np.isfinite(found) else 0.0
