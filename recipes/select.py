"""Select rows of a scored preference set: by score, by margin, the best of each source, each prompt once.

python -m recipes.select pairs.jsonl --where "score_chosen >= 9" --out data/best.jsonl.gz
"""

from __future__ import annotations

import hashlib
import operator
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tqdm import tqdm

from engine.data.records import Unusable, read_pair
from engine.data.sources import RECORD_SUFFIXES, Record, find_sources
from engine.settings.toml import PathName
from recipes.command import command, with_name
from recipes.data_making.near_duplicates import NearDuplicates
from recipes.data_making.rows import check_name, row_writer

_OPERATORS: dict[str, Callable[[float, float], bool]] = {
    ">=": operator.ge,
    "<=": operator.le,
    "==": operator.eq,
    "!=": operator.ne,
    ">": operator.gt,
    "<": operator.lt,
}
_CONDITION = re.compile(r"\s*([\w.]+)\s*(>=|<=|==|!=|>|<)\s*(-?\d+(?:\.\d+)?)\s*")


@dataclass(frozen=True, kw_only=True)
class SelectSettings:
    """Rows of a scored preference set, written as they are. A row that any rule leaves out is counted, with the first place."""

    file: tuple[PathName, ...]
    """Preference pairs (.jsonl, .json, each also .gz; .parquet), folders, patterns, or hub:owner/name[:split]. One file may be
    given without the option's name."""
    out: PathName
    """File to write: .jsonl, .jsonl.gz or .parquet."""
    where: tuple[str, ...] = ()
    """Conditions on numbers, which must all hold: "score_chosen >= 9". A dot goes into an object."""
    score: str = "score_chosen"
    """Field that orders rows for `top`, and that a margin is measured from."""
    other_score: str = "score_rejected"
    """Field that a margin is measured to."""
    least_margin: float | None = None
    """Leave out rows with a smaller difference of score and other_score."""
    top: int | None = None
    """Keep so many rows of each source, the best; of equal ones the first."""
    source_field: str = "source"
    """Field that names a row's source, for `top`; rows without it are one source."""
    repeated: bool = False
    """Keep rows whose prompt was there before; otherwise the best of them stays, of equal ones the first."""
    near_duplicates: bool = False
    """Also leave out rows whose prompt and chosen answer nearly repeat an earlier row's (needs the extra `data`)."""

    def __post_init__(self) -> None:
        check_name(self.out)
        for condition in self.where:
            _condition(condition)
        if self.top is not None and self.top < 1:
            raise ValueError(f"top = {self.top}: must be at least 1")


@dataclass(frozen=True)
class _Row:
    number: int
    score: float
    source: str
    prompt: bytes


def run(settings: SelectSettings) -> Counter[str]:
    """Read the rows twice: to choose, and to write the chosen ones in their order. Returns: how many were left out, by reason.

    Raises: ValueError naming a wrong condition, a file, or that no row is left.
    """
    skipped: Counter[str] = Counter()
    first: dict[str, str] = {}

    def skip(reason: str, place: str) -> None:
        skipped[reason] += 1
        first.setdefault(reason, place)

    kept = {row.number for row in _chosen(settings, skip)}
    total = sum(skipped.values()) + len(kept)
    if not kept:
        reasons = "; ".join(f"{count:,} {reason} (first {first[reason]})" for reason, count in skipped.most_common())
        raise ValueError(f"{', '.join(settings.file)}: no row is left of {total:,}: {reasons}")
    with row_writer(settings.out) as add:
        for number, record in enumerate(_records(settings.file)):
            if number in kept:
                add(record.value)
    print(f"{settings.out}: {len(kept):,} of {total:,} rows")
    for reason, count in skipped.most_common():
        print(f"  left out {count:,}: {reason}; first at {first[reason]}")
    return skipped


def _records(paths: Sequence[str]) -> Iterator[Record]:
    for source in find_sources(paths, RECORD_SUFFIXES):
        yield from source.records("line")


def _chosen(settings: SelectSettings, skip: Callable[[str, str], None]) -> list[_Row]:
    conditions = [_condition(condition) for condition in settings.where]
    near = NearDuplicates() if settings.near_duplicates else None
    rows: list[_Row] = []
    places: list[str] = []
    with tqdm(_records(settings.file), desc="choosing", unit=" rows", disable=None) as progress:
        for number, record in enumerate(progress):
            places.append(record.place)
            try:
                pair = read_pair(record.value)
                _check(record.value, conditions, settings)
            except Unusable as unusable:
                skip(unusable.reason, record.place)
                continue
            prompt = "\0".join(f"{turn['role']}\1{turn['content'].strip()}" for turn in pair.prompt)
            if near is not None and near.seen(f"{prompt}\n{pair.chosen}", str(number)):
                skip("nearly repeats an earlier row", record.place)
                continue
            score = _number(record.value, settings.score) if settings.top or not settings.repeated else 0.0
            source = str(_looked_up(record.value, settings.source_field))
            rows.append(_Row(number, score, source, hashlib.blake2b(prompt.encode(), digest_size=16).digest()))
    # The best first; sorting keeps the order of equal rows.
    rows.sort(key=lambda row: -row.score)
    seen: set[bytes] = set()
    counts: Counter[str] = Counter()
    chosen = []
    for row in rows:
        if not settings.repeated and row.prompt in seen:
            skip("repeated prompt", places[row.number])
        elif settings.top is not None and counts[row.source] >= settings.top:
            skip(f"below the best {settings.top:,} of its source", places[row.number])
        else:
            counts[row.source] += 1
            seen.add(row.prompt)
            chosen.append(row)
    return chosen


def _check(value: Any, conditions: Sequence[tuple[str, str, float]], settings: SelectSettings) -> None:
    """Raises: Unusable for a row that a condition leaves out."""
    for name, sign, limit in conditions:
        if not _OPERATORS[sign](_number(value, name), limit):
            raise Unusable(f"not {name} {sign} {limit:g}", str(_looked_up(value, name)))
    if settings.least_margin is not None:
        margin = _number(value, settings.score) - _number(value, settings.other_score)
        if margin < settings.least_margin:
            raise Unusable(f"margin below {settings.least_margin:g}", f"{margin:g}")


def _condition(text: str) -> tuple[str, str, float]:
    match = _CONDITION.fullmatch(text)
    if match is None:
        signs = ", ".join(_OPERATORS)
        raise ValueError(f"where: {text!r} must be a field, one of {signs}, and a number, as in 'score_chosen >= 9'")
    return match[1], match[2], float(match[3])


def _looked_up(value: Any, name: str) -> Any:
    if isinstance(value, Mapping) and name in value:
        return value[name]
    for part in name.split("."):
        value = value.get(part) if isinstance(value, Mapping) else None
    return value


def _number(value: Any, name: str) -> float:
    """Raises: Unusable where the field holds no number."""
    found = _looked_up(value, name)
    if isinstance(found, bool) or not isinstance(found, int | float) or found != found:
        raise Unusable(f"no number in '{name}'", repr(found)[:60])
    return float(found)


def main(argv: Sequence[str] | None = None) -> None:
    arguments = list(sys.argv[1:] if argv is None else argv)
    command(SelectSettings, run, with_name(["", *arguments], {"": "file"})[1:], "python -m recipes.select")


if __name__ == "__main__":
    main()
