"""What a training run has written so far: metrics, spikes, samples, settings.

A running run may be read at any time, an older one lacks newer fields, and a kill may have cut a line short: what cannot be
read is noted and left out.
"""

from __future__ import annotations

import json
import math
from array import array
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import repeat
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engine.settings.toml import read_table

METRICS, SPIKES, SETTINGS = "metrics.jsonl", "spikes.jsonl", "config.toml"
Floats = NDArray[np.float64]


@dataclass(eq=False)
class Columns:
    """A table that grows by rows, each with its own names; a missing value is NaN."""

    rows: int = 0
    _columns: dict[str, array[float]] = field(default_factory=dict)

    def add(self, line: Mapping[str, Any]) -> None:
        """Append a row: the line's numbers. A null stands for a number that was not finite."""
        for name, value in line.items():
            if value is None or (isinstance(value, int | float) and not isinstance(value, bool)):
                column = self._columns.setdefault(name, array("d"))
                column.extend(repeat(math.nan, self.rows - len(column)))
                column.append(math.nan if value is None else value)
        self.rows += 1

    def by_step(self) -> dict[str, Floats]:
        """Name -> (rows,), in the order of the steps; of lines with the same step the last one counts."""
        table = {}
        for name, column in self._columns.items():
            column.extend(repeat(math.nan, self.rows - len(column)))
            table[name] = np.array(column)
        if not self.rows:
            return {}
        _, last = np.unique(table["step"][::-1], return_index=True)
        return {name: column[self.rows - 1 - last] for name, column in table.items()}


@dataclass(frozen=True, eq=False)
class RunRecord:
    """One run, read.

    steps, evaluations: name -> a value for each line, "step" among them; empty without lines.
    samples: step -> [{"prompt": ..., "answer": ...}]. spikes: the lines of spikes.jsonl.
    settings: dotted name -> value. notes: what could not be read, in words.
    """

    folder: Path
    steps: dict[str, Floats]
    evaluations: dict[str, Floats]
    samples: dict[int, list[dict[str, str]]]
    spikes: list[dict[str, Any]]
    settings: dict[str, Any]
    notes: list[str]


def read_run(folder: Path) -> RunRecord:
    """Read a run folder.

    Raises: FileNotFoundError or NotADirectoryError naming a folder that is missing or no folder; ValueError for a folder that
        holds no run.
    """
    if not folder.exists():
        raise FileNotFoundError(f"{folder}: no such run folder; name the folder that the run's `out` names")
    if not folder.is_dir():
        raise NotADirectoryError(f"{folder}: is a file; name a run folder, the run's `out`")
    if not any((folder / name).is_file() for name in (METRICS, SETTINGS)):
        parent = folder.resolve().parent
        nearer = (
            f"; its run folder is {parent}" if (parent / METRICS).is_file() else "; name the folder that a run's `out` names"
        )
        raise ValueError(f"{folder}: holds neither {METRICS} nor {SETTINGS}, so it is no run folder{nearer}")
    notes: list[str] = []
    steps, evaluations, samples = Columns(), Columns(), {}
    for line in _lines(folder / METRICS, notes):
        if isinstance(line.get("samples"), list):
            samples[line["step"]] = [_sample(given) for given in line["samples"] if isinstance(given, dict)]
        elif "loss" in line:
            steps.add(line)
        else:
            evaluations.add(line)
    if not steps.rows:
        notes.append(f"{METRICS} holds no training step yet" if (folder / METRICS).is_file() else f"{METRICS} is missing")
    return RunRecord(
        folder=folder,
        steps=steps.by_step(),
        evaluations=evaluations.by_step(),
        samples=dict(sorted(samples.items())),
        spikes=list(_lines(folder / SPIKES, notes)),
        settings=_settings(folder / SETTINGS, notes),
        notes=notes,
    )


def _lines(file: Path, notes: list[str]) -> Iterator[dict[str, Any]]:
    """The lines of a file that are JSON objects with a step. A missing file has none."""
    if not file.is_file():
        return
    broken = []
    with file.open("rb") as lines:
        for number, text in enumerate(lines, 1):
            try:
                line = json.loads(text)
            except (ValueError, RecursionError):
                line = None
            if isinstance(line, dict) and isinstance(line.get("step"), int):
                yield line
            elif text.strip():
                broken.append(number)
    if broken:
        shown = ", ".join(map(str, broken[:5])) + (f" and {len(broken) - 5:,} more" if len(broken) > 5 else "")
        notes.append(
            f"{file.name}: line {shown} could not be read and is left out (the last line of a running or killed run may be cut)"
        )


def _sample(given: Mapping[str, Any]) -> dict[str, str]:
    return {
        name: value if isinstance(value := given.get(name, ""), str) else json.dumps(value) for name in ("prompt", "answer")
    }


def _settings(file: Path, notes: list[str]) -> dict[str, Any]:
    try:
        return dict(_flat(read_table(file), ""))
    except FileNotFoundError:
        notes.append(f"{SETTINGS} is missing: no settings are shown")
    except ValueError as error:
        notes.append(f"no settings are shown: {error}")
    return {}


def _flat(value: Any, name: str) -> Iterator[tuple[str, Any]]:
    """The leaves of a table, each with its dotted name."""
    if isinstance(value, dict) and value:
        for key, inner in value.items():
            yield from _flat(inner, f"{name}.{key}" if name else key)
    elif isinstance(value, list) and any(isinstance(inner, dict) for inner in value):
        for number, inner in enumerate(value):
            yield from _flat(inner, f"{name}.{number}")
    else:
        yield name, value
