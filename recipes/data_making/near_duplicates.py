"""Texts that nearly repeat an earlier one, and texts that hold a benchmark's item.

Near-duplicates: MinHash with banding (datasketch) proposes earlier texts whose shingles have a Jaccard similarity of about 0.5
or more (Broder, "On the resemblance and containment of documents", 1997). An exact alignment of the words then decides: at most
6 % of the words may differ, and as if by chance. The alternatives are likelihood ratios against words changed at random:

- a sentence is another one: another question about the same passage, another answer to the same question;
- the text is a template filled anew: its numbers, names and negations differ, and little else.

Contamination: a text that shares 13 words in a row with an item of a benchmark, as in GPT-3's report (appendix C). In Japanese
and Chinese, where 13 characters make some six words, 26 characters are asked. A shorter item must stand there whole. Runs that
stand in many items of one benchmark are its form, and tell nothing.
"""

from __future__ import annotations

import math
import re
import unicodedata
import zlib
from array import array
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any

from engine.data.sources import RECORD_SUFFIXES, find_sources

WORDS, CHARACTERS = 13, 26
# Fields of benchmarks' records that hold the item; the others hold choices, answers and names.
FIELDS = (
    *("question", "instruction", "prompt", "query", "problem", "ctx", "context", "passage", "goal"),
    *("sentence", "sentence1", "sentence2", "premise", "hypothesis", "input", "turns"),
)
_HAN_KANA = "\u3041-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
_TOKEN = re.compile(f"[{_HAN_KANA}]|[^\\W_{_HAN_KANA}]+")
# Shorter items must be a whole sentence or line of the text.
_LEAST_WORDS, _LEAST_CHARACTERS = 5, 10
_BANDS, _ROWS = 32, 4  # 1 - (1 - J^4)^32: 0.998 at J = 0.65, 0.23 at 0.3
_PASSAGE = re.compile(r"(?<=[.!?。！？])\s*|\n+")
_NEGATION = re.compile(
    r"\b(?:not|no|never|none|nothing|nobody|without|cannot|neither|nor)\b|n['’]t\b|な[いくかけ]|ませ[んぬ]|ずに|[不非未無]",
    re.IGNORECASE,
)
# Of the words, and half a word: 5 % of a text, rounded, are always fewer.
_MOST_CHANGED = 0.06
# Of fewer words, one is more than 5 %: a short request with one other word is another request.
_LEAST_LENGTH = 20
_LEAST_WORD = 1 / 3  # that a token is
# The share of words that differ: in a near-duplicate, and in a sentence that is another one.
_BY_CHANCE, _ANOTHER = 0.06, 0.6
# The last sentence or line is the answer, and often another one.
_LAST_IS_ANOTHER = 0.3
# The share of telling words among those that differ in a template filled anew.
_TEMPLATE = 0.7
_MOST_EVIDENCE = 1.0  # nats for another text; 2 to 4 % of texts with words changed at random have more


def tokens(text: str) -> list[str]:
    """The words of a text in lower case; of Japanese and Chinese, the characters."""
    return _TOKEN.findall(unicodedata.normalize("NFKC", text).lower())


def _is_japanese(token: str) -> bool:
    """Whether a token is one character of a text without spaces."""
    return "\u3041" <= token[0] <= "\ufaff"


def _is_spaced(found: Sequence[str]) -> bool:
    return 2 * sum(map(_is_japanese, found)) <= len(found)


def _joined(found: Sequence[str], size: int) -> Iterator[str]:
    return (" ".join(found[start : start + size]) for start in range(len(found) - size + 1))


class NearDuplicates:
    """The texts so far. Needs datasketch and rapidfuzz (extra `data`)."""

    def __init__(self) -> None:
        try:
            import rapidfuzz  # noqa: F401
            from datasketch import MinHash, MinHashLSH
        except ImportError as error:
            raise ValueError(
                f"near-duplicates need {error.name}: pip install 'komainu[data]', or make ... EXTRAS=data"
            ) from None
        self._empty = MinHash(num_perm=_BANDS * _ROWS, hashfunc=zlib.crc32)
        self._bands = MinHashLSH(num_perm=_BANDS * _ROWS, params=(_BANDS, _ROWS))
        self._names: list[str] = []
        self._texts: list[_Text] = []
        self._numbers: dict[str, int] = {}

    def seen(self, text: str, name: str) -> str | None:
        """The name of the first earlier text that this one nearly repeats; else None, and the text counts as seen under its
        name. Lines, such as question and answer, are compared each by itself, too."""
        own = _Text.of(text, self._numbers)
        sketch = self._empty.copy()
        sketch.update_batch([shingle.encode() for shingle in _shingles(tokens(text))] or [b""])
        for other in sorted(self._bands.query(sketch)):
            if own.nearly_repeats(self._texts[other]):
                return self._names[other]
        self._bands.insert(len(self._texts), sketch)
        self._names.append(name)
        self._texts.append(own)
        return None


def _shingles(found: Sequence[str]) -> list[str]:
    # Of Japanese words about two characters are changed at once.
    return list(_joined(found, min(len(found), 2 if _is_spaced(found) else 4)))


@dataclass(frozen=True)
class _Text:
    """tokens: as numbers. words: how many words each of them is. telling: places of numbers, names and negations. parts:
    [start, end) of the sentences and lines."""

    tokens: array[int]
    words: array[float]
    telling: frozenset[int]
    parts: list[tuple[int, int]]
    length: float

    @classmethod
    def of(cls, text: str, numbers: dict[str, int]) -> _Text:
        found, words = array("L"), array("f")
        telling: set[int] = set()
        parts = []
        for part in _PASSAGE.split(unicodedata.normalize("NFKC", text)):
            start = len(found)
            denied = [match.span() for match in _NEGATION.finditer(part)]
            for match in _TOKEN.finditer(part):
                token = match[0]
                if (
                    any(map(str.isdigit, token))
                    or (len(found) > start and len(token) > 1 and token[0].isupper())
                    or any(first <= match.start() < last for first, last in denied)
                ):
                    telling.add(len(found))
                words.append(_words(token))
                found.append(numbers.setdefault(token.lower(), len(numbers)))
            if len(found) > start:
                parts.append((start, len(found)))
        return cls(found, words, frozenset(telling), parts, sum(words))

    def nearly_repeats(self, other: _Text) -> bool:
        """Whether a few words differ, as if changed at random."""
        from rapidfuzz.distance import Levenshtein

        if self.tokens == other.tokens:
            return True
        length = max(self.length, other.length)
        if length < _LEAST_LENGTH:
            return False
        most = _MOST_CHANGED * length + 0.5
        if Levenshtein.distance(self.tokens, other.tokens, score_cutoff=(furthest := int(most / _LEAST_WORD))) > furthest:
            return False
        total = 0.0
        mine: list[int] = []
        theirs: list[int] = []
        start = first = 0
        for block in Levenshtein.opcodes(self.tokens, other.tokens).as_matching_blocks():
            total += max(sum(self.words[start : block.a]), sum(other.words[first : block.b]))
            mine += range(start, block.a)
            theirs += range(first, block.b)
            start, first = block.a + block.size, block.b + block.size
        return total <= most and max(self._evidence(mine), other._evidence(theirs)) <= _MOST_EVIDENCE

    def _evidence(self, changed: Sequence[int]) -> float:
        """Nats for another text, against words changed at random. changed: the places of the tokens that differ."""
        return max(self._another_sentence(changed), self._filled_anew(changed))

    def _another_sentence(self, changed: Sequence[int]) -> float:
        # Either each part has words changed at random, or one or a few are others.
        different, evidence = set(changed), 0.0
        gain, loss = math.log(_ANOTHER / _BY_CHANCE), math.log((1 - _ANOTHER) / (1 - _BY_CHANCE))
        for start, end in self.parts:
            if count := sum(self.words[place] for place in range(start, end) if place in different):
                own = count * gain + (sum(self.words[start:end]) - count) * loss
                share = max(1 / (len(self.parts) + 1), _LAST_IS_ANOTHER if (start, end) == self.parts[-1] else 0)
                evidence += math.log(1 - share + share * math.exp(own))
        return evidence

    def _filled_anew(self, changed: Sequence[int]) -> float:
        share = (sum(self.words[place] for place in self.telling) + 0.5) / (self.length + 1)
        gain, loss = math.log(_TEMPLATE / share), math.log((1 - _TEMPLATE) / (1 - share))
        return sum(self.words[place] * (gain if place in self.telling else loss) for place in changed)


def _words(token: str) -> float:
    """How many words a token is, about: a Japanese word has two characters, in katakana three."""
    if not _is_japanese(token):
        return 1.0
    return _LEAST_WORD if "\u30a1" <= token <= "\u30ff" else 0.5


class Benchmarks:
    """Runs of tokens of benchmarks' items, to find in texts."""

    def __init__(self) -> None:
        self._runs: dict[int, dict[bytes, str]] = {}  # tokens of a run -> hash -> the item's place
        self._lines: dict[str, str] = {}

    def add(self, paths: Sequence[str], fields: Sequence[str] = FIELDS) -> int:
        """Add the items of files, folders or patterns; returns how many. Raises: ValueError for a file without an item."""
        count = 0
        for source in find_sources(paths, RECORD_SUFFIXES):
            records = source.records("line")
            items = [(record.place, text) for record in records for text in _item_texts(record.value, fields)]
            if not items:
                raise ValueError(
                    f"{source.name}: no text in any of the fields {', '.join(fields)}: name the fields of its items"
                )
            self.add_items(items)
            count += len({place for place, _ in items})
        return count

    def add_items(self, items: Sequence[tuple[str, str]]) -> None:
        """Add (place, text) of one benchmark's items."""
        read = [(place, tokens(text)) for place, text in items]
        runs = [(place, size, set(map(_hash, _joined(found, size)))) for place, found in read if (size := _size(found))]
        common = Counter(run for _, _, own in runs for run in own)
        most = max(10, len(read) // 100)
        for place, size, own in runs:
            telling = [run for run in own if common[run] <= most]
            self._runs.setdefault(size, {}).update((run, place) for run in telling or own)
        for place, found in read:
            if found and not _size(found):
                self._lines[" ".join(found)] = place

    def find(self, text: str) -> str | None:
        """The place of a benchmark's item that the text holds, or None."""
        found = tokens(text)
        for size, runs in self._runs.items():
            for run in _joined(found, size):
                if place := runs.get(_hash(run)):
                    return place
        if self._lines:
            for line in _PASSAGE.split(text):
                if place := self._lines.get(" ".join(tokens(line))):
                    return place
        return None


def _size(found: Sequence[str]) -> int:
    """Tokens of an item's runs: all of a short item, none of one that is too short to tell."""
    least, most = (_LEAST_WORDS, WORDS) if _is_spaced(found) else (_LEAST_CHARACTERS, CHARACTERS)
    return min(most, len(found)) if len(found) >= least else 0


def _hash(run: str) -> bytes:
    return blake2b(run.encode(), digest_size=8).digest()


def _item_texts(value: Any, fields: Sequence[str]) -> Iterator[str]:
    if not isinstance(value, Mapping):
        return
    for name in fields:
        given = value.get(name)
        for text in given if isinstance(given, list) else [given]:
            if isinstance(text, str) and text.strip():
                yield text
