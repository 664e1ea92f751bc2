"""The report of a validation: counts by reason with examples, a drawing, and the records that a person should look at."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from model.folder import write_file
from recipes.data_making.rows import row_writer
from recipes.data_making.rules import Finding
from recipes.data_making.validation import Pair, Summary
from recipes.drawing import new_figure, save_figure

DRAWING = "reasons.svg"
LOOK = "look.jsonl"
_SHOWN = 300  # characters of a text in the report


def describe(summary: Summary) -> Iterator[str]:
    """The counts in words, the most frequent reason first."""
    share = summary.failed / max(1, summary.records)
    yield f"{summary.records:,} records, {summary.texts:,} texts: {summary.failed:,} records ({share:.1%}) went wrong"
    for reason, count in summary.reasons.most_common():
        examples = summary.examples.get(reason)
        first = f"; first at {examples[0][0].place}: {examples[0][2].detail}" if examples else ""
        yield f"  {count:,} {reason}{first}"


def write_report(folder: Path, summary: Summary, name: str) -> None:
    """Write report.md, look.jsonl, and with matplotlib the drawing into a folder."""
    drawn = _draw(folder / DRAWING, summary)
    write_file(folder / "report.md", "\n".join(_markdown(summary, name, drawn)) + "\n")
    with row_writer(folder / LOOK) as add:
        for pair, number, finding in summary.doubtful:
            source, target = _texts(pair, number)
            row = {"number": pair.number, "text": number, "why": finding.reason, "detail": finding.detail}
            add({**row, "source": source, "target": target})


def _markdown(summary: Summary, name: str, drawn: bool) -> Iterator[str]:
    yield f"# Translations in {Path(name).name}"
    yield ""
    yield f"{summary.records:,} records, {summary.texts:,} texts. {summary.failed:,} records went wrong."
    yield ""
    if drawn:
        yield f"![records by reason]({DRAWING})"
        yield ""
    yield "| reason | records | share |"
    yield "|---|---:|---:|"
    for reason, count in summary.reasons.most_common():
        yield f"| {reason} | {count:,} | {count / summary.records:.2%} |"
    for reason, _ in summary.reasons.most_common():
        yield f"\n## {reason}\n"
        for example in summary.examples.get(reason, ()):
            yield from _example(*example)
    if summary.doubtful:
        yield f"\n## For a person to look at\n\n{LOOK} has these records; they count as right.\n"
        for example in summary.doubtful[:10]:
            yield from _example(*example)


def _example(pair: Pair, number: int, finding: Finding) -> Iterator[str]:
    source, target = _texts(pair, number)
    yield f"Record {pair.number}, text {number}: {finding.detail}\n"
    for text in (source, target):
        shown = text if len(text) <= _SHOWN else f"{text[: _SHOWN // 2]} … {text[-_SHOWN // 2 :]}"
        yield "\n".join(f"    {line}" for line in shown.splitlines()) + "\n"


def _texts(pair: Pair, number: int) -> tuple[str, str]:
    return pair.texts[number - 1] if 1 <= number <= len(pair.texts) else ("", "")


def _draw(path: Path, summary: Summary) -> bool:
    """Draw the number of records of each reason. Returns: whether there is a drawing."""
    counts = summary.reasons.most_common()[::-1]
    if not counts or (figure := new_figure(7, 0.9 + 0.3 * len(counts))) is None:
        return False
    axes = figure.add_subplot()
    bars = axes.barh([reason for reason, _ in counts], [count for _, count in counts], color="#4477aa")
    axes.bar_label(bars, padding=3, fmt="{:,.0f}")
    axes.set_xlabel(f"records of {summary.records:,}")
    axes.margins(x=0.12)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    save_figure(figure, path)
    return True
