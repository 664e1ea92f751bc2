"""The files of an evaluation: the harness's results.json and samples, report.md and its drawing.

The same evaluation writes the same bytes, whether or not it was interrupted: no file holds a time or a machine.
"""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from model.folder import write_file
from recipes.drawing import new_figure, save_figure
from recipes.evaluation.comparison import Compared, Row, samples_file

DRAWING = "report.svg"


def write_samples(folder: Path, samples: Mapping[str, Sequence[Mapping[str, Any]]]) -> None:
    """A line of JSON for each item of each task, in the harness's form without the prompts, which are long."""
    for task, own in samples.items():
        lines = [
            json.dumps({key: value for key, value in sample.items() if key != "arguments"}, ensure_ascii=False, default=_plain)
            for sample in own
        ]
        write_file(folder / samples_file(task), ("\n".join(lines) + "\n").encode("utf-8", "backslashreplace"))


def write_results(folder: Path, results: Mapping[str, Any]) -> None:
    text = json.dumps(_finite(results), ensure_ascii=False, indent=2, default=_plain) + "\n"
    write_file(folder / "results.json", text.encode("utf-8", "backslashreplace"))


def _finite(value: Any) -> Any:
    """The value with null for numbers that JSON cannot say, such as the bounds of an interval that is the whole line."""
    if isinstance(value, Mapping):
        return {key: _finite(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _plain(value: Any) -> Any:
    """What JSON lacks: numbers of numpy, functions and classes by name."""
    if hasattr(value, "item") and getattr(value, "ndim", 1) == 0:
        return value.item()
    if isinstance(value, set | frozenset | tuple):
        return sorted(value, key=str) if isinstance(value, set | frozenset) else list(value)
    if callable(value):
        return f"{value.__module__}.{getattr(value, '__qualname__', type(value).__qualname__)}"
    return str(value)


def write_report(
    folder: Path,
    *,
    model: str,
    rows: Sequence[Row],
    remarks: Sequence[str],
    other: str | None = None,
    comparisons: Sequence[Compared] = (),
    left_out: Sequence[str] = (),  # tasks that could not be compared
) -> str:
    """Write report.md and, with matplotlib, its drawing. Returns: the text."""
    drawn = draw(folder / DRAWING, rows, comparisons)
    lines = [f"# Evaluation of {model}", "", *[f"- {remark}" for remark in remarks], ""]
    lines += _table(
        ("task", "shots", "metric", "score", "95 % interval", "interval by", "items", "clusters"),
        [
            (
                f"**{row.name}**" if row.primary else row.name,
                "" if row.shots is None else str(row.shots),
                row.metric if row.filter == "none" else f"{row.metric} ({row.filter})",
                _number(row.score),
                _interval(row.interval.low, row.interval.high),
                row.method,
                f"{row.items:,}",
                "" if row.clusters is None else f"{row.clusters:,}",
            )
            for row in rows
        ],
        right=(1, 3, 6, 7),
    )
    if other is not None:
        lines += ["", f"## Compared with {other}", ""]
        lines += [
            "Both models on the same items; differences are this model's score minus the other's. p-values are adjusted over "
        ]
        lines[-1] += (
            "the tasks by Holm. The last column is the smallest true difference that would have been found four times in five."
        )
        lines += [""]
        lines += _table(
            ("task", "metric", "this", "other", "difference", "95 % interval", "test", "p", "p, adjusted", "could be seen"),
            [
                (
                    found.name,
                    found.metric,
                    _number(found.ours),
                    _number(found.other),
                    f"{found.difference:+.4f}",
                    _interval(found.interval.low, found.interval.high),
                    found.test,
                    _p(found.p_value),
                    _p(found.adjusted),
                    "none" if math.isinf(found.smallest) else _number(found.smallest),
                )
                for found in comparisons
            ],
            right=(2, 3, 4, 7, 8, 9),
        )
        if left_out:
            lines += ["", f"Not compared, as the other evaluation lacks them or has other items: {', '.join(left_out)}."]
    if drawn:
        lines += ["", f"![Scores with their intervals]({DRAWING})"]
    text = "\n".join(lines) + "\n"
    write_file(folder / "report.md", text)
    return text


def draw(path: Path, rows: Sequence[Row], comparisons: Sequence[Compared]) -> bool:
    """Scores between 0 and 1 with their intervals, beside the models' differences. Without matplotlib: False."""
    scores = [row for row in rows if row.primary and 0 <= row.score <= 1 and math.isfinite(row.interval.low)]
    panels: list[tuple[str, list[tuple[str, float, float, float]]]] = []
    if scores:
        panels.append(
            (
                "score, with its 95 % interval",
                [(f"{row.name} {row.metric}", row.score, row.interval.low, row.interval.high) for row in scores],
            )
        )
    if comparisons:
        entries = [(f"{found.name}", found.difference, found.interval.low, found.interval.high) for found in comparisons]
        panels.append(("difference, with its 95 % interval", entries))
    if not panels:
        return False
    figure = new_figure(5.5 * len(panels), 1.2 + 0.32 * max(len(entries) for _, entries in panels))
    if figure is None:
        return False
    for number, (title, entries) in enumerate(panels, 1):
        axes = figure.add_subplot(1, len(panels), number)
        places = list(range(len(entries)))[::-1]
        for place, (_, value, low, high) in zip(places, entries, strict=True):
            axes.plot([low, high], [place, place], color="tab:blue", linewidth=2)
            axes.plot([value], [place], "o", color="tab:blue")
        axes.set_yticks(places, [name for name, *_ in entries])
        axes.set_ylim(-0.6, len(entries) - 0.4)
        axes.set_xlabel(title)
        axes.grid(axis="x", alpha=0.3)
        if title.startswith("difference"):
            axes.axvline(0, color="black", linewidth=0.8)
    save_figure(figure, path)
    return True


def _table(head: Sequence[str], rows: Sequence[Sequence[str]], *, right: Sequence[int]) -> list[str]:
    marks = ["---:" if column in right else "---" for column in range(len(head))]
    return ["| " + " | ".join(line) + " |" for line in (head, marks, *rows)]


def _number(value: float) -> str:
    return f"{value:.4f}" if abs(value) < 10_000 else f"{value:.4g}"


def _interval(low: float, high: float) -> str:
    return f"{_number(low)} to {_number(high)}" if math.isfinite(low) and math.isfinite(high) else "unknown: one cluster"


def _p(value: float) -> str:
    return "<0.0001" if value < 0.0001 else f"{value:.4f}"
