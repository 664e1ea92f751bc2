"""Checks the records of a file as translations, many at once in several processes, in the order of the file."""

from __future__ import annotations

import hashlib
from collections import Counter, deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass, field
from itertools import islice, zip_longest
from multiprocessing import get_context
from typing import Any

from engine.data.records import CONVERSATIONS, Unusable, decoded_json, read_conversation
from engine.data.sources import RECORD_SUFFIXES, Record, SourceFile, find_sources
from recipes.data_making.evidence import JAPANESE
from recipes.data_making.rules import Finding, check

CHUNK = 100  # records of one task
_SAMPLE = 50  # records that decide a field's language
# Shorter texts may well have equal translations: "Yes." and "Yes!".
_LEAST_REPEATED = 20


@dataclass(frozen=True)
class Pair:
    """A record before and after translation: its texts, aligned. fault: why it has none."""

    number: int
    place: str
    texts: list[tuple[str, str]]
    finish_reason: str | None = None
    fault: Finding | None = None


@dataclass(frozen=True)
class Checked:
    """What was found in a record. findings: with the number of the text, from 1."""

    pair: Pair
    findings: list[tuple[int, Finding]]

    @property
    def reasons(self) -> list[str]:
        return list(dict.fromkeys(finding.reason for _, finding in self.findings if finding.certain))


@dataclass
class Summary:
    """Counts of a file. examples: the first records of each reason. doubtful: records for a person to look at."""

    records: int = 0
    texts: int = 0
    failed: int = 0
    reasons: Counter[str] = field(default_factory=Counter)
    examples: dict[str, list[tuple[Pair, int, Finding]]] = field(default_factory=dict)
    doubtful: list[tuple[Pair, int, Finding]] = field(default_factory=list)

    def add(self, checked: Checked, show: int) -> None:
        self.records += 1
        self.texts += len(checked.pair.texts)
        self.failed += bool(checked.reasons)
        self.reasons.update(checked.reasons)
        for place, finding in checked.findings:
            row = (checked.pair, place, finding)
            if finding.certain:
                examples = self.examples.setdefault(finding.reason, [])
                if len(examples) < show and (not examples or examples[-1][0] is not checked.pair):
                    examples.append(row)
            elif len(self.doubtful) < 10 * show:
                self.doubtful.append(row)


def read_pairs(path: str, after: str | None, fields: tuple[str, str], finish_field: str) -> Iterator[Pair]:
    """The records of a file, each with its texts before and after translation.

    fields: of the source and of the target; dots go into objects. A field holds a text, or a conversation in any form that
    `recipes.prepare` reads; an empty name stands for the whole record. after: a second file, whose records hold the targets,
    one for each record of the first.
    Raises: ValueError naming the place where the two files differ in their number of records.
    """
    first = _records(path)
    second = _records(after) if after is not None else None
    rows = zip_longest(first, second) if second is not None else ((record, record) for record in first)
    for number, (record, other) in enumerate(rows, 1):
        if record is None or other is None:
            longer, shorter = (after, path) if record is None else (path, after)
            place = other.place if record is None else record.place
            raise ValueError(f"{place}: {longer} has more records than {shorter}: both must hold the same records, in order")
        reason = _looked_up(other.value, finish_field) if isinstance(other.value, Mapping) else None
        pair = Pair(number, record.place, [], reason if isinstance(reason, str) else None)
        try:
            sides = [_texts(part.value, name) for part, name in zip((record, other), fields, strict=True)]
            yield Pair(number, record.place, _aligned(*sides), pair.finish_reason)
        except Unusable as unusable:
            yield Pair(number, record.place, [], None, Finding("unreadable", str(unusable)))


def _records(path: str) -> Iterator[Record]:
    for source in find_sources((path,), RECORD_SUFFIXES):
        assert isinstance(source, SourceFile)
        yield from source.records("line")


def _looked_up(value: Any, name: str) -> Any:
    if isinstance(value, Mapping) and name in value:
        return value[name]
    for part in name.split("."):
        if not isinstance(value, Mapping) or part not in value:
            return None
        value = value[part]
    return value


def _texts(value: Any, name: str) -> list[tuple[str, str]]:
    """(role, text) of a field. Raises: Unusable."""
    found = _looked_up(value, name) if name else value
    if found is None:
        known = ", ".join(map(repr, value)) if isinstance(value, Mapping) else type(value).__name__
        raise Unusable("missing field", f"no '{name}' among the fields {known}"[:200])
    opened = decoded_json(found, turns=True)
    if isinstance(opened, str):
        return [("", opened)]
    turns = read_conversation(opened if isinstance(opened, Mapping) else {CONVERSATIONS[0]: opened})
    return [(turn["role"], turn["content"]) for turn in turns]


def _aligned(source: list[tuple[str, str]], target: list[tuple[str, str]]) -> list[tuple[str, str]]:
    roles = [[role for role, _ in side] for side in (source, target)]
    if roles[0] != roles[1]:
        raise Unusable("other turns", f"{', '.join(roles[0]) or 'a text'} became {', '.join(roles[1]) or 'a text'}")
    return [(one, other) for (_, one), (_, other) in zip(source, target, strict=True)]


def languages_of(pairs: Sequence[Pair], given: tuple[str | None, str | None]) -> tuple[str, str]:
    """The languages of sources and targets: as given, else by the script of most sources, and the other one of en and ja."""
    texts = [source for pair in pairs for source, _ in pair.texts if source.strip()]
    japanese = sum(len(JAPANESE.findall(text)) > 0.1 * len(text) for text in texts)
    source = given[0] or ("ja" if 2 * japanese > len(texts) else "en")
    return source, given[1] or ("en" if source == "ja" else "ja")


def check_pairs(pairs: Iterator[Pair], languages: tuple[str | None, str | None], processes: int) -> Iterator[Checked]:
    """Every pair, checked, in order. A language that is None is found from the first pairs."""
    first = list(islice(pairs, _SAMPLE))
    known = languages_of(first, languages)
    duplicates = Duplicates()
    chunks = _chunks(first, pairs)
    if processes <= 1 or len(first) < _SAMPLE:
        done: Iterator[list[Checked]] = (_check_chunk(chunk, known) for chunk in chunks)
    else:
        done = _in_processes(chunks, known, processes)
    for chunk in done:
        for checked in chunk:
            repeated = duplicates.seen(checked.pair)
            yield Checked(checked.pair, [*checked.findings, (1, repeated)]) if repeated else checked


def _chunks(first: list[Pair], rest: Iterator[Pair]) -> Iterator[list[Pair]]:
    yield first
    while chunk := list(islice(rest, CHUNK)):
        yield chunk


def _in_processes(chunks: Iterator[list[Pair]], languages: tuple[str, str], processes: int) -> Iterator[list[Checked]]:
    """Few chunks wait at any time, so that memory does not grow with the file."""
    # Forked processes would inherit the threads' locks of torch.
    with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
        waiting: deque[Future[list[Checked]]] = deque()
        for chunk in chunks:
            waiting.append(pool.submit(_check_chunk, chunk, languages))
            if len(waiting) > 4 * processes:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def _check_chunk(chunk: list[Pair], languages: tuple[str, str]) -> list[Checked]:
    return [check_pair(pair, languages) for pair in chunk]


def check_pair(pair: Pair, languages: tuple[str, str]) -> Checked:
    """What is wrong with a record, text by text; the finish reason is that of its last text."""
    if pair.fault is not None:
        return Checked(pair, [(0, pair.fault)])
    findings = []
    for number, (source, target) in enumerate(pair.texts, 1):
        reason = pair.finish_reason if number == len(pair.texts) else None
        findings += [(number, finding) for finding in check(source, target, languages=languages, finish_reason=reason)]
    return Checked(pair, findings)


class Duplicates:
    """Records that were there before, and long targets that were there for another source."""

    def __init__(self) -> None:
        self._pairs: dict[bytes, int] = {}
        self._targets: dict[bytes, int] = {}

    def seen(self, pair: Pair) -> Finding | None:
        """What this record repeats; it counts as seen from now on."""
        if not pair.texts:
            return None
        targets = "\0".join(target.strip() for _, target in pair.texts)
        sources = "\0".join(source.strip() for source, _ in pair.texts)
        whole, target = (
            hashlib.blake2b(text.encode(), digest_size=12).digest() for text in (sources + "\1" + targets, targets)
        )
        earlier = self._pairs.setdefault(whole, pair.number)
        same = self._targets.setdefault(target, pair.number)
        if earlier != pair.number:
            return Finding("duplicate", f"of record {earlier}")
        if same != pair.number and len(targets) >= _LEAST_REPEATED:
            return Finding("duplicate", f"the target of record {same}, for another source")
        return None
