"""A result's rows: which fields say what was measured, which are measurements, and how each reads.

Everything here is a function of the committed JSON alone, so that a table is the same wherever it is made.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

_NEEDED = {"benchmark": str, "command": str, "when": str, "commit": str, "machine": dict, "settings": dict, "rows": list}
# The fields that tell a benchmark's rows apart; of one that is not listed, all that are neither floats nor spreads.
KEYS: dict[str, tuple[str, ...]] = {
    "train": (
        "task", "objective", "preset", "layers", "sequence", "micro_batch", "accumulate", "documents", "dtype", "recompute",
        "backend", "moments", "offload", "ranks", "name",
    ),
    "finetune": ("task", "stage", "name"),
    "kernels": ("operator", "direction", "shape", "dtype", "provider"),
    "data": (
        "task", "part", "what", "provider", "tokenizer", "source", "lengths", "packer", "capacity", "kind", "pack_tokens",
        "step_seconds", "documents",
    ),
    "checkpoint": ("task", "operation", "provider"),
    "resize": ("after", "method"),
    "streaming": ("operation",),
    "tune": ("kernel", "direction", "candidate"),
    "environment": ("what",),
}  # fmt: skip
_UNITS = {"gib": "GiB", "mib": "MiB", "tflops": "TFLOP/s", "mhz": "MHz"}
_SHARES = ("mfu", "hfu", "of_ceiling", "floor_fraction", "utilisation", "waiting_share")


def read_result(path: str | Path) -> dict[str, Any]:
    """A result file. Raises: FileNotFoundError; ValueError naming the file and what is wrong with it."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such result file")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: not valid JSON: {error}") from None
    for name, kind in _NEEDED.items():
        if not isinstance(content, dict) or not isinstance(content.get(name), kind):
            raise ValueError(f"{path}: '{name}' is not there or no {kind.__name__}; --out of a benchmark gives a result file")
    return content


def flat(row: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """A row without nesting: {"memory": {"plan": 1}} is {"memory plan": 1}; spreads and missing values stay, lists are text."""
    values: dict[str, Any] = {}
    for name, value in row.items():
        if isinstance(value, Mapping) and not is_spread(value) and why_missing(value) is None:
            values.update(flat(value, f"{prefix}{name} "))
        elif isinstance(value, list):
            values[prefix + name] = "; ".join(map(str, value)) or None
        else:
            values[prefix + name] = value
    return values


def is_spread(value: Any) -> bool:
    """Whether a value is a median with its 20th and 80th percentile."""
    return isinstance(value, Mapping) and "median" in value


def why_missing(value: Any) -> str | None:
    """Why a field's value could not be measured; None where it was, or where nothing is said."""
    return str(value["missing"]) if isinstance(value, Mapping) and "missing" in value else None


def identity(benchmark: str, row: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a flat row that say what was measured."""
    names = KEYS.get(benchmark)
    if names is None:
        return {name: value for name, value in row.items() if isinstance(value, (str, bool, int)) and name != "missing"}
    return {name: row[name] for name in names if row.get(name) not in (None, "")}


def label(values: Mapping[str, Any]) -> str:
    """Some fields of a row in one line: text as it is, other values with their names."""
    return ", ".join(
        str(value) if isinstance(value, str) else f"{words(name)} {number(value)}" for name, value in values.items()
    )


def words(name: str) -> str:
    """A field's name for people."""
    return name.replace("gb_per_second", "GB/s").replace("_", " ")


def number(value: Any, unit: float = 1.0) -> str:
    """A value with four digits; `unit` divides it."""
    if value is None:
        return "-"
    if why_missing(value) is not None:
        return "missing"
    if is_spread(value):
        low, high = number(value["low"], unit), number(value["high"], unit)
        median = number(value["median"], unit)
        return median if value.get("samples") == 1 else f"{median} ({low} to {high})"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int) and unit == 1:
        return f"{value:,}" if abs(value) >= 10_000 else str(value)
    if isinstance(value, (int, float)):
        value /= unit
        if value and not 1e-3 <= abs(value) < 1e12:
            return f"{value:.3e}"
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
    return str(value)


def unit_of(name: str, values: Iterable[Any]) -> tuple[float, str]:
    """What to divide a column's values by and the unit then: shares are in %, times in what fits, others as the name says."""
    if name in _SHARES or name.startswith("breakdown "):
        return 0.01, "%"
    last = name.split()[-1].rpartition("_")[2]
    if last != "seconds":
        return 1.0, _UNITS.get(last, "")
    times = [value["median"] if is_spread(value) else value for value in values]
    largest = max((abs(time) for time in times if isinstance(time, (int, float)) and not isinstance(time, bool)), default=1.0)
    return next(((unit, text) for unit, text in ((1.0, "s"), (1e-3, "ms")) if largest >= unit), (1e-6, "µs"))


def head(name: str, values: Iterable[Any]) -> str:
    """A column's name for people, its unit in parentheses instead of at the name's end."""
    unit = unit_of(name, values)[1]
    if unit and unit != "%":
        name = name.removesuffix(name.split()[-1].rpartition("_")[2]).rstrip("_ ") or (
            "size" if unit.endswith("iB") else "time"
        )
    return words(name) + (f" ({unit})" if unit else "")


def columns_of(rows: Sequence[Mapping[str, Any]], first: Sequence[str] = ()) -> list[str]:
    """The names of all fields, those of `first` before the others, each where it first appears; "missing" is not one."""
    seen = dict.fromkeys(name for row in rows for name in row if name != "missing")
    return [*(name for name in first if name in seen), *(name for name in seen if name not in first)]
