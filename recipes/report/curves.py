"""Columns of numbers for the page: grouped where there are more than a screen can show, rounded, and with null for a gap."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from recipes.report.reading import Floats

Table = Mapping[str, Floats]
# Values of the x axis, not curves of their own.
ALONG = {"step": "step", "tokens": "tokens_seen", "seconds": "wall_seconds"}
_ALSO_ALONG = frozenset({"epoch"})


def with_progress(steps: Table) -> dict[str, Floats]:
    """The steps with `tokens_seen` and `wall_seconds`. Where an older run lacks them: sums of each step's tokens and time."""
    whole = dict(steps)
    for name, part in (("tokens_seen", "tokens"), ("wall_seconds", "step_seconds")):
        if part in whole:
            summed = np.cumsum(np.nan_to_num(whole[part]))
            given = whole.get(name, np.full(len(summed), np.nan))
            whole[name] = np.maximum.accumulate(np.where(np.isfinite(given), given, summed))
    return whole


def along(steps: Table, at: Floats) -> dict[str, Floats]:
    """x axis -> its value at each step of `at`: that of the last logged step up to there, 0 before the first."""
    places = np.searchsorted(steps["step"], at, side="right") if steps else np.zeros(len(at), dtype=np.int64)
    found = {"step": at}
    for axis, name in ALONG.items():
        if axis != "step" and name in steps:
            found[axis] = np.concatenate(([0.0], steps[name]))[places]
    return found


def curves(table: Table, axes: Mapping[str, Floats], points: int) -> dict[str, Any]:
    """A table's curves of at most `points` points each.

    Each point stands for a group of neighbouring rows: their mean, lowest and highest value. Groups of one row have no lowest
    and highest value; a group without a finite value is a gap.
    Returns: {"group": rows of a group, "x": {axis: values at each group's last row}, "columns": {name: {"mean", "low",
        "high"}}}.
    """
    rows = len(axes["step"])
    group = max(1, -(-rows // points))
    starts = np.arange(0, rows, group)
    ends = np.minimum(starts + group, rows) - 1
    columns = {}
    for name, column in table.items():
        if name not in _ALSO_ALONG and name not in ALONG.values() and np.isfinite(column).any():
            columns[name] = _grouped(column, starts, group)
    return {
        "group": group,
        "x": {axis: _rounded(values[ends], 9) for axis, values in axes.items()},
        "columns": columns,
    }


def _grouped(column: Floats, starts: np.ndarray, group: int) -> dict[str, list[float | None]]:
    if group == 1:
        return {"mean": _rounded(column)}
    finite = np.isfinite(column)
    counts = np.add.reduceat(finite, starts, dtype=np.int64)
    sums = np.add.reduceat(np.where(finite, column, 0.0), starts)
    mean = np.divide(sums, counts, out=np.full(len(starts), np.nan), where=counts > 0)
    low = np.minimum.reduceat(np.where(finite, column, np.inf), starts)
    high = np.maximum.reduceat(np.where(finite, column, -np.inf), starts)
    found = {"mean": _rounded(mean)}
    if (low < high).any():
        found |= {"low": _rounded(low), "high": _rounded(high)}
    return found


def _rounded(values: Floats, digits: int = 5) -> list[float | None]:
    """Values with `digits` significant digits, whole ones without a fraction; null where not finite."""
    return [_short(value, digits) if finite else None for value, finite in zip(values, np.isfinite(values), strict=True)]


def _short(value: float, digits: int) -> float:
    rounded = float(f"{value:.{digits}g}")
    return int(rounded) if rounded.is_integer() and abs(rounded) < 1e15 else rounded
