"""What the commands that ask models for data share: settings, a journal beside the result, and the result's two files.

data/ja.jsonl.gz            what passed
data/ja.dropped.jsonl.gz    what did not, each with the reasons; no recipe takes these records for data
data/ja.journal             every request and answer: the same command again goes on from it
"""

from __future__ import annotations

import hashlib
import json
import random
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from engine.data.records import Unusable
from engine.data.sources import RECORD_SUFFIXES, Record, find_sources
from engine.inference.asking import Answer, Asker, Responder
from engine.inference.endpoint import EndpointSettings, open_responder
from engine.settings.toml import PathName, to_table
from recipes.data_making.rows import beside, check_name, row_writer

CUT = "cut off"
# Never Parquet: records of several forms have no common type.
DROPPED = "dropped.jsonl.gz"
_THOUGHTS = re.compile(r"\A\s*<think>.*?</think>\s*", re.DOTALL)
# Settings that change what a run costs or how fast it is, and no byte of its result.
NO_EFFECT = frozenset(
    {
        *("url", "max_cost", "max_requests", "price_in", "price_out", "concurrency", "timeout", "key_variable", "device"),
        *("overwrite", "dry_run"),
    }
)


@dataclass(frozen=True, kw_only=True)
class ModelSettings(EndpointSettings):
    """A model that writes: an OpenAI-compatible endpoint, or a folder."""

    temperature: float | None = None
    """Default: the endpoint's own."""
    top_p: float | None = None
    """Default: the endpoint's own."""
    max_tokens: int = 2048
    """Longest answer in tokens; a longer one is cut off, and does not pass."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.max_tokens < 1:
            raise ValueError(f"max_tokens = {self.max_tokens}: must be at least 1")
        if self.temperature is not None and not 0 <= self.temperature < 100:
            raise ValueError(f"temperature = {self.temperature}: must be at least 0")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ValueError(f"top_p = {self.top_p}: must be above 0 and at most 1")

    def parameters(self) -> dict[str, Any]:
        """As a request sends them."""
        named = {"temperature": self.temperature, "top_p": self.top_p, "max_tokens": self.max_tokens}
        return {name: value for name, value in named.items() if value is not None}


@dataclass(frozen=True, kw_only=True)
class SampleSettings:
    """Which records are read."""

    paths: tuple[PathName, ...]
    """Files (.jsonl, .json, each also .gz; .parquet), folders, patterns, or a hub data set (recipes/README.md)."""
    sample: int | None = None
    """So many of the usable records, drawn at random; default: all."""
    seed: int = 0
    """Seed of the draw."""

    def __post_init__(self) -> None:
        if self.sample is not None and self.sample < 1:
            raise ValueError(f"sample = {self.sample}: must be at least 1")


@dataclass(frozen=True, kw_only=True)
class MakingSettings:
    """Where the result goes, and what it may cost."""

    out: PathName
    """File to write: .jsonl, .jsonl.gz or .parquet."""
    max_cost: float | None = None
    """Stop before more money than this could be spent, over all runs with this `out`."""
    max_requests: int | None = None
    """Stop before more requests than this are sent, tries included, over all runs with this `out`."""
    overwrite: bool = False
    """Replace a file in `out` that was made with other settings."""

    def __post_init__(self) -> None:
        for name in ("max_cost", "max_requests"):
            value = getattr(self, name)
            if value is not None and not value >= 0:
                raise ValueError(f"{name} = {value}: must be at least 0")

    def check_prices(self, models: Mapping[str, EndpointSettings]) -> None:
        """Raises: ValueError where money is limited and a model's prices are not known."""
        for name, model in models.items():
            if self.max_cost is not None and model.url and model.price_in is None:
                raise ValueError(f"max_cost needs the prices of a million tokens: give {name}.price_in and {name}.price_out")


def end_fault(answer: Answer) -> str:
    """What the end of an answer says against it; empty where it ended by itself."""
    if answer.finish_reason == "stop":
        return ""
    return CUT if answer.finish_reason == "length" else f"ended by {answer.finish_reason}"


def without_thoughts(answer: str) -> str:
    """An answer without the reasoning that some models write in front of it."""
    return _THOUGHTS.sub("", answer)


class Responders:
    """The models of a run; settings of the same model share one."""

    def __init__(self) -> None:
        self._open: dict[EndpointSettings, Responder] = {}

    def of(self, settings: EndpointSettings) -> Responder:
        """Raises: as `open_responder` does."""
        key = EndpointSettings(**{field.name: getattr(settings, field.name) for field in fields(EndpointSettings)})
        if key not in self._open:
            self._open[key] = open_responder(key)
        return self._open[key]


class Tally:
    """Counts by reason, each with its first example."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self._first: dict[str, str] = {}

    def add(self, reason: str, example: str) -> None:
        self.counts[reason] += 1
        self._first.setdefault(reason, " ".join(example.split())[:160])

    def lines(self, what: str) -> Iterator[str]:
        """A line a reason, the most frequent first."""
        for reason, count in sorted(self.counts.items(), key=lambda item: (-item[1], item[0])):
            yield f"{what} {count:,}: {reason}; first: {self._first[reason]}"


@dataclass(frozen=True)
class Result:
    """The open files of a run."""

    keep: Callable[[Mapping[str, Any]], None]
    """Adds a record to `out`."""
    drop: Callable[[Mapping[str, Any]], None]
    """Adds an object to the file of dropped records."""


@contextmanager
def opened_asker(settings: MakingSettings) -> Iterator[Asker]:
    """The asker with the journal of `out`, which keeps a second run of the same command out.

    Raises: FileExistsError where `out` was made with other settings; ValueError for its name; BlockingIOError, OSError.
    """
    out = Path(settings.out)
    check_name(out)
    made = fingerprint(settings)
    with Asker(beside(out, "journal"), max_cost=settings.max_cost, max_requests=settings.max_requests) as asker:
        if out.exists() and not settings.overwrite and asker.facts.get("made") != made:
            raise FileExistsError(f"{out}: exists already, made with other settings; name another file, or give --overwrite")
        # The journal's lock is held: nobody else writes these files, and what a killed run left is removed.
        for name in (out.name, beside(out, DROPPED).name):
            for left in out.parent.glob(f".{name}.*.partial"):
                left.unlink(missing_ok=True)
        if asker.facts.get("made") != made:
            asker.note("made", made)
        yield asker


@contextmanager
def opened_result(settings: MakingSettings) -> Iterator[Result]:
    """The two files to write; they appear at the end."""
    with ExitStack() as stack:
        drop = stack.enter_context(row_writer(beside(settings.out, DROPPED)))
        yield Result(stack.enter_context(row_writer(settings.out)), drop)


def fingerprint(settings: Any) -> str:
    """Equal for settings with the same result."""

    def without(table: Any) -> Any:
        if isinstance(table, dict):
            return {name: without(value) for name, value in table.items() if name not in NO_EFFECT}
        return [without(value) for value in table] if isinstance(table, (list, tuple)) else table

    text = json.dumps(without(to_table(settings)), sort_keys=True, ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()


@dataclass(frozen=True)
class Records:
    """The records of some sources that a command can use."""

    paths: Sequence[str]
    read: Callable[[Any], Any]
    """What a record holds; raises Unusable."""
    places: frozenset[int] | None
    """Numbers of the chosen ones among the usable ones, from 0; None: all."""
    total: int
    """How many are chosen."""
    skipped: Tally

    def __iter__(self) -> Iterator[tuple[Record, Any]]:
        """The chosen records, in order, each with what `read` made of it."""
        for number, found in enumerate(_usable(self.paths, self.read, Tally())):
            if self.places is None or number in self.places:
                yield found


def find_records(
    paths: Sequence[str],
    read: Callable[[Any], Any],  # raises Unusable
    *,
    sample: int | None,
    seed: int,
) -> Records:
    """Read all sources once, before anything is paid for, and draw a sample of the usable records if one is asked for.

    Raises: ValueError, FileNotFoundError naming file and line of what cannot be read, or where no record can be used.
    """
    skipped = Tally()
    count = sum(1 for _ in _usable(paths, read, skipped))
    if not count:
        raise ValueError(f"{', '.join(paths)}: no record can be used: {'; '.join(skipped.lines('skipped'))}")
    drawn = sample is not None and sample < count
    places = frozenset(random.Random(seed).sample(range(count), sample or 0)) if drawn else None
    return Records(paths, read, places, len(places) if places is not None else count, skipped)


def _usable(paths: Sequence[str], read: Callable[[Any], Any], skipped: Tally) -> Iterator[tuple[Record, Any]]:
    for source in find_sources(paths, RECORD_SUFFIXES):
        for record in source.records("blank"):
            try:
                yield record, read(record.value)
            except Unusable as unusable:
                skipped.add(unusable.reason, f"{record.place}: {unusable.detail}")
