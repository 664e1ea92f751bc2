"""Reads metrics.jsonl, the log of a run.

A line is a table by name, of one step: a training step's values, an evaluation's values (`eval/...`, `scores/...`), or an
evaluation's answers, {"step": N, "samples": [{"prompt": ..., "answer": ...}, ...]}. A kill may have cut the last line short.
"""

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from model.folder import write_file

Line = dict[str, Any]  # a line of metrics.jsonl: name -> value
SAMPLES = "samples"
# Beginnings of the names of an evaluation's values.
_VALUES = ("eval/", "scores/")


def logged_steps(file: Path) -> Iterator[Line]:
    """The training steps in a metrics.jsonl, without evaluations."""
    return (line for line in _lines(file) if "loss" in line)


def evaluation_lines(file: Path) -> Iterator[Line]:
    """The validation values and scores in a metrics.jsonl."""
    return (line for line in _lines(file) if any(name.startswith(_VALUES) for name in line))


def done_before(file: Path) -> tuple[float, int]:
    """(seconds, tokens) of the steps in a metrics.jsonl. An older version's lines say no seconds and no sum of tokens."""
    seconds, tokens = 0.0, 0
    for line in logged_steps(file):
        seconds = line.get("wall_seconds", seconds)
        tokens = line.get("tokens_seen", tokens + line.get("tokens", 0))
    return seconds, tokens


def was_evaluated(file: Path, step: int) -> bool:
    """Whether a metrics.jsonl holds an evaluation of a step, or no longer holds the step itself."""
    mine = [line for line in _lines(file) if line["step"] == step]
    return not mine or any(name.startswith((*_VALUES, SAMPLES)) for line in mine for name in line)


def drop_lines_after(file: Path, step: int) -> None:
    """Remove the lines of later steps, and a line that a kill has cut short."""
    if not file.is_file():
        return
    kept = []
    for line in file.read_text(encoding="utf-8").splitlines(keepends=True):
        with contextlib.suppress(json.JSONDecodeError, KeyError, TypeError):
            if json.loads(line)["step"] <= step:
                kept.append(line)
    write_file(file, "".join(kept))


def _lines(file: Path) -> Iterator[Line]:
    for text in file.read_text(encoding="utf-8").splitlines() if file.is_file() else []:
        with contextlib.suppress(json.JSONDecodeError):
            yield json.loads(text)
