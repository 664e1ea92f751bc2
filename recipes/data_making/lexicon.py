"""Which Japanese words stand for an English word, learnt from parallel text: evidence that one text translates another.

Each English word w has a few pieces of Japanese (kanji, katakana, short hiragana). The model is a noisy or: a translation of w
brings one of its pieces with probability `rate`, and any Japanese text brings one by chance, by a Poisson process of `chance` a
character. So a word without any of its pieces multiplies the odds of "translated" by 1 - rate, and a word with one by p / p0,
where p0 = 1 - exp(-chance * characters) and p = 1 - (1 - rate) (1 - p0).
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path

import numpy as np

FILE = Path(__file__).with_name("lexicon_en_ja.tsv")
_WORD = re.compile(r"[A-Za-z]+(?:'[a-z]+)?")
_SUFFIXES = re.compile(r"(?:ingly|edly|ings|ing|ed|ly|ies|es|s|e|y|'s|n't)$")
# Runs of one kind, in which pieces lie: kanji, katakana, hiragana, Latin words.
_RUN = re.compile("[\u3005\u4e00-\u9fff]+|[\u30a1-\u30ff]+|[\u3041-\u3096]+|[A-Za-z]{2,}")
_MOST_PIECES = 8
_LEAST_RATE = 0.25
_LEAST_CHANCE = 1e-6  # a character
_MOST_ODDS = 2.5  # nats: no one word decides


@dataclass(frozen=True)
class Entry:
    """rate: how often a translation brings one of the pieces. chance: how often, a character, any text does."""

    pieces: frozenset[str]
    rate: float
    chance: float

    @cached_property
    def without(self) -> float:
        """Evidence of a text without a piece."""
        return max(-_MOST_ODDS, math.log1p(-self.rate))

    def log_odds(self, characters: int) -> tuple[float, float]:
        """Evidence, in nats, that the word was translated: from a text of so many characters with a piece, and without."""
        by_chance = -math.expm1(-self.chance * max(1, characters))
        hit = math.log((1 - (1 - self.rate) * (1 - by_chance)) / by_chance)
        return min(_MOST_ODDS, hit), self.without


@lru_cache(maxsize=100_000)
def stem(word: str) -> str:
    """A crude stem, in lower case: enough that the forms of one word meet."""
    word = word.lower()
    short = _SUFFIXES.sub("", word)
    if len(short) < 3:
        return word
    return short[:-1] if len(short) > 3 and short[-1] == short[-2] and short[-1] not in "ls" else short


def english_words(text: str) -> list[str]:
    """The stems of a text's words, in order."""
    return [stem(word) for word in _WORD.findall(text)]


def japanese_pieces(text: str) -> set[str]:
    """The pieces of a text: 1 or 2 kanji, 3 katakana, 2 or 3 hiragana (shorter runs whole), and stems of Latin words."""
    return set().union(*map(_pieces_of_run, set(_RUN.findall(text))))


@lru_cache(maxsize=50_000)
def _pieces_of_run(run: str) -> frozenset[str]:
    if run[0].isascii():
        return frozenset((stem(run),))
    kanji = not "\u3041" <= run[0] <= "\u30ff"
    if len(run) <= 2:
        sizes = range(1 if kanji else 2, 3)
    else:
        sizes = range(1, 3) if kanji else range(3, 4) if run[0] >= "\u30a1" else range(2, 4)
    return frozenset(run[start : start + size] for size in sizes for start in range(len(run) - size + 1))


@lru_cache(maxsize=1)
def lexicon() -> dict[str, Entry]:
    """The committed lexicon: stem -> entry."""
    found = {}
    for line in FILE.read_text(encoding="utf-8").splitlines():
        if not line.startswith("#"):
            word, rate, chance, pieces = line.split("\t")
            found[word] = Entry(frozenset(pieces.split()), float(rate), float(chance))
    return found


def learn(pairs: Sequence[tuple[str, str]], *, least: int = 8) -> dict[str, Entry]:
    """The lexicon of pairs (English text, Japanese text); words in fewer than `least` pairs are left out.

    A word's rate is measured on the half of its pairs that its pieces were not chosen from.
    """
    words = _numbered([set(english_words(source)) for source, _ in pairs], least)
    pieces = _numbered([japanese_pieces(target) for _, target in pairs], least)
    rows = [np.array(sorted(row), np.int64) for row in pieces.rows]
    share = np.bincount(np.concatenate(rows), minlength=len(pieces.names)) / len(pairs)
    holders = [np.array(sorted(row)) for row in pieces.holders()]
    mean = sum(len(target) for _, target in pairs) / len(pairs)
    found = {}
    for number, places in enumerate(words.holders()):
        chosen = _choose(places, rows, share)
        if not chosen:
            continue
        hits = total = 0
        for half in (0, 1):
            own = set(_choose(places[half::2], rows, share))
            rest = places[1 - half :: 2]
            hits += sum(not own.isdisjoint(pieces.rows[place]) for place in rest)
            total += len(rest)
        having = np.unique(np.concatenate([holders[piece] for piece in chosen]))
        outside = len(np.setdiff1d(having, places, assume_unique=True)) / max(1, len(pairs) - len(places))
        hit = (hits + 0.5) / (total + 1)
        rate = (hit - outside) / (1 - outside)
        if rate >= _LEAST_RATE:
            chance = max(-math.log1p(-outside) / mean, _LEAST_CHANCE)
            found[words.names[number]] = Entry(frozenset(pieces.names[piece] for piece in chosen), min(rate, 0.98), chance)
    return found


def lines(found: dict[str, Entry]) -> Iterable[str]:
    """A lexicon as lines of its file: word, rate, chance, pieces."""
    for word, entry in sorted(found.items()):
        yield f"{word}\t{entry.rate:.2f}\t{entry.chance:.2g}\t{' '.join(sorted(entry.pieces))}"


@dataclass(frozen=True)
class _Numbered:
    """names: what occurs often enough. rows: the numbers of names, for each pair."""

    names: list[str]
    rows: list[set[int]]

    def holders(self) -> list[list[int]]:
        """The pairs of each name."""
        found: list[list[int]] = [[] for _ in self.names]
        for place, row in enumerate(self.rows):
            for number in row:
                found[number].append(place)
        return found


def _numbered(rows: Sequence[set[str]], least: int) -> _Numbered:
    counts: dict[str, int] = {}
    for row in rows:
        for name in row:
            counts[name] = counts.get(name, 0) + 1
    names = sorted(name for name, count in counts.items() if count >= least)
    number = {name: place for place, name in enumerate(names)}
    return _Numbered(names, [{number[name] for name in row if name in number} for row in rows])


def _choose(places: Sequence[int], rows: Sequence[np.ndarray], share: np.ndarray) -> list[int]:
    """Pieces that cover the pairs of a word: one at a time, the piece with the most evidence in the pairs left."""
    left = list(places)
    chosen: list[int] = []
    while len(left) > 1 and len(chosen) < _MOST_PIECES:
        counts = np.bincount(np.concatenate([rows[place] for place in left]), minlength=len(share))
        lift = counts / len(left) / share
        gains = counts * np.log(np.maximum(lift, 1e-9))
        gains[(lift < 1.7) | (gains < 4) | (counts < max(2, 0.04 * len(places)))] = 0
        best = int(np.argmax(gains))
        if gains[best] <= 0:
            break
        chosen.append(best)
        left = [place for place in left if best not in rows[place]]
    return chosen
