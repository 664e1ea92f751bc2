"""Texts that nearly repeat an earlier one, and texts that hold a benchmark's item.

Near-duplicates: MinHash with banding (datasketch) proposes earlier texts whose shingles have a Jaccard similarity of about 0.6
or more; the tokens themselves then decide. Source: Broder, "On the resemblance and containment of documents", 1997.

Contamination: a text that shares 13 words in a row with an item of a benchmark, as in GPT-3's report (appendix C). In Japanese
and Chinese, where 13 characters make some six words, 26 characters are asked. A shorter item must stand there whole. Runs that
stand in many items of one benchmark are its form, and tell nothing.
"""

from __future__ import annotations

import re
import unicodedata
import zlib
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
_LEAST_SHARED = 0.88  # of the tokens, twice the common ones to all
_PASSAGE = re.compile(r"(?<=[.!?。！？])\s*|\n+")
_LEAST_PASSAGE = 8  # words
_LEAST_HELD = 0.2  # of a passage's shingles
_LEAST_JACCARD = 0.55  # of the shingles: the same words in another order are another text


def tokens(text: str) -> list[str]:
    """The words of a text in lower case; of Japanese and Chinese, the characters."""
    return _TOKEN.findall(unicodedata.normalize("NFKC", text).lower())


def _is_spaced(found: Sequence[str]) -> bool:
    return 2 * sum("\u3041" <= token[0] <= "\ufaff" for token in found) <= len(found)


def _joined(found: Sequence[str], size: int) -> Iterator[str]:
    return (" ".join(found[start : start + size]) for start in range(len(found) - size + 1))


class NearDuplicates:
    """The texts so far. Needs datasketch (extra `data`)."""

    def __init__(self) -> None:
        try:
            from datasketch import MinHash, MinHashLSH
        except ImportError:
            raise ValueError("near-duplicates need datasketch: pip install 'komainu[data]', or make ... EXTRAS=data") from None
        self._minhash = MinHash
        self._bands = MinHashLSH(num_perm=_BANDS * _ROWS, params=(_BANDS, _ROWS))
        self._texts: dict[str, _Shingled] = {}

    def seen(self, text: str, name: str) -> str | None:
        """The name of an earlier text that this one nearly repeats; else None, and the text counts as seen under its name."""
        sketch = self._minhash(num_perm=_BANDS * _ROWS, hashfunc=zlib.crc32)
        sketch.update_batch([shingle.encode() for shingle in _shingles(tokens(text))] or [b""])
        own = _Shingled.of(text)
        for other in sorted(self._bands.query(sketch)):
            if own.nearly_repeats(self._texts[other]):
                return other
        self._bands.insert(name, sketch)
        self._texts[name] = own
        return None


def _shingles(found: Sequence[str]) -> list[str]:
    # Of Japanese words about two characters are changed at once.
    return list(_joined(found, min(len(found), 2 if _is_spaced(found) else 4)))


@dataclass(frozen=True)
class _Shingled:
    """tokens: counted. shingles: of the whole. parts: of each passage, some sentences or lines long."""

    tokens: Counter[str]
    shingles: frozenset[int]
    parts: list[frozenset[int]]

    @classmethod
    def of(cls, text: str) -> _Shingled:
        parts, waiting = [], []
        for passage in _PASSAGE.split(text):
            waiting += tokens(passage)
            if len(waiting) >= (_LEAST_PASSAGE if _is_spaced(waiting) else 2 * _LEAST_PASSAGE):
                parts.append(frozenset(zlib.crc32(shingle.encode()) for shingle in _shingles(waiting)))
                waiting = []
        found = tokens(text)
        return cls(Counter(found), frozenset(zlib.crc32(shingle.encode()) for shingle in _shingles(found)), parts)

    def nearly_repeats(self, other: _Shingled) -> bool:
        """Whether a few words differ, spread over the text. Another question about the same passage differs in one place."""
        if self.shingles == other.shingles:
            return True
        total = self.tokens.total() + other.tokens.total()
        common = len(self.shingles & other.shingles)
        if 2 * (self.tokens & other.tokens).total() < _LEAST_SHARED * total:
            return False
        if common < _LEAST_JACCARD * (len(self.shingles) + len(other.shingles) - common):
            return False
        return self._is_held_by(other) and other._is_held_by(self)

    def _is_held_by(self, other: _Shingled) -> bool:
        return all(len(part & other.shingles) >= _LEAST_HELD * len(part) for part in self.parts)


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
