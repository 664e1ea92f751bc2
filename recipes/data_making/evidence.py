"""How strongly a text speaks for being the translation of another, of all of it: the lexicon, lengths and sentences, added up.

All evidence is in nats of log-odds. The parts are not independent, so the sum is a score, and the limits in `rules` are set on
parallel text.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import pairwise
from pathlib import Path

from recipes.data_making.lexicon import english_words, japanese_pieces, lexicon

LENGTHS = Path(__file__).with_name("lengths_en_ja.json")
JAPANESE = re.compile("[\u3041-\u30ff\u3400-\u4dbf\u4e00-\u9fff]")
# Sentence ends of English (not after an abbreviation or initial), of Japanese, and of blocks.
_ABBREVIATED = re.compile(r"(?:\b(?:e\.g|i\.e|etc|vs|cf|Mr|Mrs|Ms|Dr|St|No|Fig|Jr|Sr|Inc|Ltd|approx|[A-Z])\.)\Z")
_END = re.compile(r"[.!?]+[\"'”’)\]*]*(?=\s)|[。！？]+[」』）)”]*|:\s*\n|\n\s*\n|\n(?=[ \t]*(?:[-*+•・]|\d{1,3}[.)])\s)")
_CLAUSE = re.compile(
    r"(?<=[,;:)])\s+|\s+(?=[(]|--|and\b|but\b|or\b|which\b|that\b|because\b|when\b|if\b|so\b|to\b|with\b|for\b|from\b|by\b|in\b)"
)
# Nats: less evidence than this for an omission is not worked out.
LIKELY_SENTENCE, LIKELY_PART = 1.6, 4.8
_MOST_BY_LENGTH = 4.0
_BETWEEN_CLASSES = 0.4  # a shorter text falls into another class of lengths
_BEYOND = 0.1  # of the logarithm, past the quantile
_MOST_CLAUSES = 7  # beyond, runs begin or end with the sentence
_ANCHOR = re.compile(r"[A-Za-z0-9_]+(?:[./:-][A-Za-z0-9_]+)*")
_MARKED = re.compile(r"(?<=[`*])[~!]?([A-Za-z][\w.]*)(?=[`*])")
_ANCHORED = re.compile(r"\d|_|[a-z][A-Z]|[A-Z]{2}|[./:]")


@dataclass(frozen=True)
class Lengths:
    """What the length of a Japanese text says, given the English: the log of characters to characters.

    edges: upper ends of the classes of English length. centre, spread: of each class. quantiles: 0.1 %, 99.9 % of each class.
    fewer: the log-probability that a translation has k sentences fewer (k = 0, 1, 2), the last holding all above.
    """

    edges: list[int]
    centre: list[float]
    spread: list[float]
    quantiles: list[tuple[float, float]]
    fewer: list[float]

    def class_of(self, english: int) -> int:
        return next((number for number, edge in enumerate(self.edges) if english <= edge), len(self.edges) - 1)

    def log_density(self, english: int, japanese: int) -> float:
        number = self.class_of(english)
        away = (math.log(max(japanese, 1) / max(english, 1)) - self.centre[number]) / self.spread[number]
        # Student's t of 4 degrees: real lengths have long tails.
        return -2.5 * math.log1p(away * away / 4) - math.log(self.spread[number])

    def outside(self, english: int, japanese: int) -> int:
        """-1: shorter than nearly all translations; 1: longer; 0: neither."""
        low, high = self.quantiles[self.class_of(english)]
        ratio = math.log(max(japanese, 1) / max(english, 1))
        return -1 if ratio < low - _BEYOND else 1 if ratio > high + _BEYOND else 0


@lru_cache(maxsize=1)
def lengths() -> Lengths:
    return Lengths(**json.loads(LENGTHS.read_text(encoding="utf-8")))


@lru_cache(maxsize=16)
def sentences(text: str) -> tuple[str, ...]:
    """The sentences of a text in English or Japanese; a list item, and a line before a blank line, is one too."""
    ends = [0]
    for match in _END.finditer(text):
        if match[0][0] != "." or not _ABBREVIATED.search(text, max(0, match.start() - 8), match.start() + 1):
            ends.append(match.end())
    ends.append(len(text))
    return tuple(part for start, end in pairwise(ends) if any(map(str.isalnum, part := text[start:end].strip())))


@lru_cache(maxsize=16)
def prose_length(text: str) -> int:
    """Characters of a text, white space as one."""
    return len(" ".join(text.split()))


def clauses(text: str) -> list[str]:
    """A sentence cut at commas, brackets and conjunctions; clauses of few words join their neighbour."""
    found: list[str] = []
    for part in _CLAUSE.split(text):
        if found and len(found[-1].split()) < 3:
            found[-1] += " " + part
        elif part.strip():
            found.append(part)
    if len(found) > 1 and len(found[-1].split()) < 3:
        last = found.pop()
        found[-1] += " " + last
    return found


@dataclass(frozen=True)
class Sentence:
    """A sentence of the English side. words: stems in the lexicon. anchors: names and numbers that stay as they are."""

    text: str
    words: frozenset[str]
    anchors: dict[str, int]


def sentence(text: str) -> Sentence:
    marked = _counts(_MARKED.findall(text)) if "`" in text or "*" in text else {}
    anchors = _counts(filter(_is_anchor, _ANCHOR.findall(text)))
    for name, count in marked.items():
        anchors[name] = max(count, anchors.get(name, 0))
    return Sentence(text, frozenset(lexicon().keys() & english_words(text)), anchors)


@lru_cache(maxsize=100_000)
def _is_anchor(name: str) -> bool:
    return _ANCHORED.search(name) is not None


def _counts(names: Iterable[str]) -> dict[str, int]:
    # A Counter costs more than the few names of a sentence.
    found: dict[str, int] = {}
    for name in names:
        found[name] = found.get(name, 0) + 1
    return found


@dataclass(frozen=True)
class Judged:
    """related: evidence that the Japanese text translates the English at all. omitted: the strongest evidence that one English
    sentence has no counterpart, and that sentence. part, clause: the same for a part of a sentence. expected: `related` of a
    typical translation of the same words."""

    related: float
    expected: float
    omitted: float
    sentence: str
    part: float
    clause: str


def judge(english: str, japanese: str, english_prose: str, japanese_prose: str) -> Judged:
    """The evidence of a pair of texts. prose: the texts without code and addresses, which both have."""
    pair = _Pair(english, japanese, prose_length(english_prose), prose_length(japanese_prose))
    related = sum(pair.odds.values())
    omitted = max(pair.omitted_sentences(), default=(-math.inf, ""))
    part = max(pair.omitted_parts(), default=(-math.inf, ""))
    return Judged(related, pair.expected, *omitted, *part)


class _Pair:
    """The words of a pair of texts, by sentence of the English one."""

    def __init__(self, english: str, japanese: str, long: int, short: int):
        known = lexicon()
        self.english, self.japanese = english, japanese
        self.parts = [sentence(part) for part in sentences(english)]
        self.pieces = japanese_pieces(japanese)
        self.long, self.short = long, short
        self.uses: dict[str, int] = {}  # word -> the number of sentences with it
        for part in self.parts:
            for word in part.words:
                self.uses[word] = self.uses.get(word, 0) + 1
        self.named: dict[str, int] = {}
        for part in self.parts:
            for name, count in part.anchors.items():
                self.named[name] = self.named.get(name, 0) + count
        self.hits: set[str] = set()
        self.odds: dict[str, float] = {}
        self.expected = 0.0
        size = len(japanese)
        for word in self.uses:
            entry = known[word]
            hit, miss = entry.log_odds(size)
            if word in self.pieces or not entry.pieces.isdisjoint(self.pieces):
                self.hits.add(word)
                self.odds[word] = hit
            else:
                self.odds[word] = miss
            self.expected += entry.rate * hit + (1 - entry.rate) * miss
        table = lengths()
        self.there = table.log_density(long, short)
        best = -math.log(table.spread[table.class_of(long)])
        self.most_by_length = min(_MOST_BY_LENGTH, best - self.there + _BETWEEN_CLASSES)

    @cached_property
    def explained(self) -> Counter[str]:
        """How many words explain a piece that is there."""
        known = lexicon()
        return Counter(piece for word in self.hits for piece in known[word].pieces if piece in self.pieces)

    def omitted_sentences(self) -> Iterator[tuple[float, str]]:
        """(evidence that it has no counterpart, the sentence), for each of several."""
        if len(self.parts) < 2:
            return
        table = lengths()
        fewer = len(self.parts) - len(sentences(self.japanese))
        counted = _of(table.fewer, fewer - 1) - _of(table.fewer, fewer)
        for part in self.parts:
            if counted + self._most(part) > LIKELY_SENTENCE:
                own = [word for word in part.words if self.uses[word] == 1]
                yield self._omitted(own, part.anchors, part.text) + counted, part.text

    def omitted_parts(self) -> Iterator[tuple[float, str]]:
        """The same for runs of clauses within a sentence."""
        for part in self.parts:
            if self._most(part) <= LIKELY_PART:
                continue
            inside = [sentence(clause) for clause in clauses(part.text)]
            uses = Counter(word for clause in inside for word in clause.words)
            count = len(inside)
            runs = {(start, end) for start in range(count) for end in range(start + 1, count + 1)} - {(0, count)}
            if count > _MOST_CLAUSES:
                runs = {(start, end) for start, end in runs if start == 0 or end == count or end == start + 1}
            most = [self._most(clause) - self.most_by_length for clause in inside]
            for start, end in runs:
                if sum(most[start:end]) + self.most_by_length <= LIKELY_PART:
                    continue
                words = Counter(word for clause in inside[start:end] for word in clause.words)
                own = [word for word, times in words.items() if self.uses.get(word) == 1 and times == uses[word]]
                anchors: dict[str, int] = {}
                for clause in inside[start:end]:
                    for name, times in clause.anchors.items():
                        anchors[name] = anchors.get(name, 0) + times
                text = " ".join(clause.text for clause in inside[start:end])
                yield self._omitted(own, anchors, text), text

    def _most(self, part: Sentence) -> float:
        """The most that the words and names of a part, and the length, can say for its omission."""
        missed = -sum(self.odds.get(word, 0.0) for word in part.words if word not in self.hits)
        gone = sum(self.japanese.count(name) < self.named[name] for name in part.anchors)
        return missed + 2.0 * gone + self.most_by_length

    def _omitted(self, own: list[str], anchors: dict[str, int], text: str) -> float:
        """Evidence of a part's own words, of names and of length that the part has no counterpart."""
        known, table = lexicon(), lengths()
        mine = Counter(piece for word in own if word in self.hits for piece in known[word].pieces if piece in self.pieces)
        score = 0.0
        for word in own:
            # A piece says nothing where other words explain it too.
            if (
                word not in self.hits
                or word in self.pieces
                or any(mine[piece] and mine[piece] == self.explained[piece] for piece in known[word].pieces)
            ):
                score -= self.odds[word]
        for name, here in anchors.items():
            there, total = self.japanese.count(name), self.named[name]
            if here >= total:
                score += -3.0 if there else 2.0
            elif there >= total:
                score -= 1.5
            elif there <= total - here:
                score += 1.0
        share = prose_length(text) / max(1, prose_length(self.english))
        gain = table.log_density(max(1, int(self.long * (1 - share))), self.short) - self.there
        return score + max(-_MOST_BY_LENGTH, min(_MOST_BY_LENGTH, gain))


def _of(table: list[float], place: int) -> float:
    return table[max(0, min(place, len(table) - 1))]
