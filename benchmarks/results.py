"""Result files: what a benchmark measured, where, with what, and by which command.

A result is one JSON file: {"benchmark", "command", "when", "commit", "machine", "settings", "complete", "rows"}. A row says
what was measured and what came out. A spread is {"median", "low", "high", "samples"} with the 20th and 80th percentile. A
value that could not be measured is {"missing": why}. The file is written anew after each row, and "complete" is false until
the last, so that a benchmark that is cut off leaves its rows.
"""

import json
import re
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from engine.environment import ROOT, commit, machine
from engine.settings.toml import to_table
from model.folder import write_file

RESULTS = ROOT / "benchmarks" / "results"
# The folders of an absolute path.
_FOLDERS = re.compile(r"(?<![\w./~])/(?:[^\s/'\"]+/)+")
_PEERS = ("transformers", "trl", "liger-kernel", "cut-cross-entropy", "flash-attn", "torchtitan")
_NEEDED = {"benchmark": str, "command": str, "when": str, "commit": str, "machine": dict, "settings": dict, "rows": list}
_DATA_AXES = ("objective", "sequence", "micro_batch", "accumulate", "documents")
TRAIN_AXES = ("preset", "layers", *_DATA_AXES, "dtype", "precision", "recompute", "backend", "moments", "offload", "ranks")
# The fields that tell the rows of a benchmark apart. Other benchmarks: all fields but floats, spreads and lists.
KEYS: dict[str, tuple[str, ...]] = {
    "train": ("task", *TRAIN_AXES, "name"),
    "kernels": ("operator", "direction", "shape", "dtype", "provider"),
    "checkpoint": ("provider", "operation"),
    "tune": ("kernel", "direction", "candidate"),
}


class Result:
    """A result that is being measured. Its file is `settings.out`; an empty name keeps it in memory."""

    def __init__(
        self,
        benchmark: str,
        command: str,  # makes the result again
        device: torch.device,
        settings: Any,  # dataclass with a field `out`
        resolved: Mapping[str, Any] | None = None,  # the values of settings that were left to the benchmark
        **more: Any,  # further fields of the result
    ) -> None:
        self._out = settings.out
        self.rows: list[dict[str, Any]] = []
        self._content = {
            "benchmark": benchmark,
            "command": command,
            "when": datetime.now(UTC).isoformat(timespec="seconds"),
            "commit": commit(),
            "machine": machine(device, _PEERS),
            "settings": to_table(settings) | dict(resolved or {}),
            **more,
        }

    def add(self, *rows: dict[str, Any]) -> None:
        self.rows += rows
        self._write(complete=False)

    def finish(self) -> dict[str, Any]:
        """Write the whole result; returns it."""
        return self._write(complete=True)

    def _write(self, *, complete: bool) -> dict[str, Any]:
        content = _without_folders(self._content | {"complete": complete, "rows": self.rows})
        if self._out:
            path = Path(self._out)
            path.parent.mkdir(parents=True, exist_ok=True)
            write_file(path, json.dumps(content, indent=1, ensure_ascii=False) + "\n")
        return content


def _without_folders(value: Any) -> Any:
    """The value with absolute paths cut to their last part: the rest says nothing outside the machine."""
    if isinstance(value, str):
        return _FOLDERS.sub("", value)
    if isinstance(value, Mapping):
        return {name: _without_folders(inner) for name, inner in value.items()}
    return [_without_folders(inner) for inner in value] if isinstance(value, (list, tuple)) else value


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
            raise ValueError(f"{path}: '{name}' is missing or no {kind.__name__}; name a file that --out of a benchmark wrote")
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
    return isinstance(value, Mapping) and "median" in value


def middle(value: Any) -> Any:
    """A spread's median; any other value unchanged."""
    return value["median"] if is_spread(value) else value


def why_missing(value: Any) -> str | None:
    """Why a field's value is missing; None where it is not."""
    return str(value["missing"]) if isinstance(value, Mapping) and "missing" in value else None


def identity(benchmark: str, row: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a flat row that say what was measured."""
    names = KEYS.get(benchmark)
    if names is None:
        return {name: value for name, value in row.items() if isinstance(value, (str, bool, int)) and name != "missing"}
    return {name: row[name] for name in names if row.get(name) not in (None, "")}


def label(values: Mapping[str, Any]) -> str:
    """Some fields of a row in one line: texts alone, other values with their names."""
    parts = (value if isinstance(value, str) else f"{name} {number(value)}" for name, value in values.items())
    return ", ".join(parts).replace("_", " ")


def number(value: Any, scale: float = 1.0) -> str:
    """A value times `scale` with four digits; a spread with its range in parentheses."""
    if value is None:
        return "-"
    if why_missing(value) is not None:
        return "missing"
    if is_spread(value):
        median, low, high = (number(value[name], scale) for name in ("median", "low", "high"))
        return median if value.get("samples") == 1 else f"{median} ({low} to {high})"
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return {True: "yes", False: "no"}.get(value, str(value)) if isinstance(value, bool) else str(value)
    if isinstance(value, int) and scale == 1:
        return f"{value:,}" if abs(value) >= 10_000 else str(value)
    value *= scale
    if value and not 1e-3 <= abs(value) < 1e12:
        return f"{value:.3e}"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def table(rows: Sequence[Mapping[str, Any]], columns: Sequence[str]) -> str:
    """Flat rows as text, without the columns that no row has."""
    columns = [column for column in columns if any(row.get(column) is not None for row in rows)]
    lines = [list(columns), *([number(row.get(column)) for column in columns] for row in rows)]
    widths = [max(len(line[place]) for line in lines) for place in range(len(columns))]
    return "\n".join("  ".join(map(str.ljust, line, widths)).rstrip() for line in lines)
