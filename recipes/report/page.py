"""The report's page: the records of runs as JSON inside one HTML file with its own styles and scripts."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from model.folder import write_file
from recipes.report.curves import along, curves, with_progress
from recipes.report.reading import RunRecord, read_run
from recipes.report.summary import facts

REPORT = "report.html"
_ROOM = Path(__file__).parent
_SCRIPTS = ("axis.js", "chart.js", "parts.js", "page.js")
# Points over all curves of a page. With lowest and highest value a point takes up to 22 bytes: the page stays below 5 MB.
_POINTS = 150_000
_MOST_POINTS, _LEAST_POINTS = 5000, 250  # of a curve; a screen is some 2,000 dots wide
_SAMPLE_CHARACTERS = 400_000  # of all samples of a page; up to three bytes each
_SPIKES, _DOCUMENTS = 400, 20_000  # of a page


def write_report(
    folders: Sequence[Path],  # run folders
    out: Path,  # the page
) -> list[str]:
    """Write the page of one run, or of several runs compared. It appears when complete.

    Returns: the notes on what could not be read, one line each.
    Raises: as `read_run`; OSError naming `out` where it cannot be written.
    """
    runs = [read_run(folder) for folder in folders]
    write_file(out, page(runs))
    return [f"{run.folder}: {note}" for run in runs for note in run.notes]


def page(runs: Sequence[RunRecord]) -> bytes:
    """The HTML file, UTF-8."""
    names = _names([run.folder for run in runs])
    tables = [_table(run, name, _points(runs), 1 / len(runs)) for run, name in zip(runs, names, strict=True)]
    data = json.dumps({"runs": tables}, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    style = _read("page.css")
    script = "\n".join(map(_read, _SCRIPTS))
    texts = {
        "title": _escaped(", ".join(names)),
        "style-hash": _hash(style),
        "script-hash": _hash(script),
        "style": style,
        "script": script,
        "data": _escaped(data, in_script=True),
    }
    filled = re.sub("@([a-z-]+)@", lambda place: texts[place[1]], _read("page.html"))
    # A lone surrogate has no UTF-8 form; it stands only in strings of JSON, where \udc80 means the same.
    return filled.encode("utf-8", "backslashreplace")


def _points(runs: Sequence[RunRecord]) -> int:
    """The most points of a curve for which all curves together have at most _POINTS."""
    sizes = [len(column) for run in runs for table in (run.steps, run.evaluations) for column in table.values()]
    points = _MOST_POINTS
    while points > _LEAST_POINTS and sum(min(size, points) for size in sizes) > _POINTS:
        points = int(0.9 * points)
    return points


def _read(name: str) -> str:
    return (_ROOM / name).read_text(encoding="utf-8").strip("\n")


def _hash(text: str) -> str:
    """The source expression of the Content Security Policy that allows an inline element with this text alone."""
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def _escaped(text: str, *, in_script: bool = False) -> str:
    """Text that HTML cannot take for markup: as entities, or inside JSON strings of a script element as escapes."""
    for letter in "&<>":
        text = text.replace(letter, f"\\u{ord(letter):04x}" if in_script else f"&#{ord(letter)};")
    return text


def _names(folders: Sequence[Path]) -> list[str]:
    """Short names that tell the runs apart: the folders' names, or as much of the paths as it takes."""
    paths = [folder.resolve() for folder in folders]
    for parts in range(1, max(len(path.parts) for path in paths) + 1):
        names = ["/".join(path.parts[-parts:]) for path in paths]
        if len(set(names)) == len(set(paths)):
            break
    return names


def _table(run: RunRecord, name: str, points: int, share: float) -> dict[str, Any]:
    """A run as the page reads it. share: this run's part of the page's limits."""
    steps = with_progress(run.steps)
    notes = list(run.notes)
    table: dict[str, Any] = {
        "name": name,
        "folder": str(run.folder),
        "facts": facts(run, steps),
        "settings": {key: _text(value) for key, value in run.settings.items()},
        "steps": None,
        "evaluations": None,
        "samples": _samples(run.samples, int(_SAMPLE_CHARACTERS * share), notes),
        "spikes": _spikes(run, steps, share, notes),
        "gaps": [],
    }
    if steps:
        table["steps"] = curves(steps, along(steps, steps["step"]), points)
        lost = steps["step"][~np.isfinite(steps["loss"])]
        table["gaps"] = _places(steps, lost[:_SPIKES])
        if (group := table["steps"]["group"]) > 1:
            notes.append(
                f"{len(steps['step']):,} steps are drawn in groups of {group}: the line is each group's mean, the shade around "
                "it reaches from the lowest to the highest value"
            )
    if run.evaluations:
        table["evaluations"] = curves(run.evaluations, along(steps, run.evaluations["step"]), points)
    return table | {"notes": notes}


def _places(steps: Mapping[str, Any], at: Any) -> list[dict[str, float]]:
    """Each step's place on the x axes."""
    axes = along(steps, np.asarray(at, dtype=np.float64))
    return [dict(zip(axes, map(float, values), strict=True)) for values in zip(*axes.values(), strict=True)]


def _samples(samples: Mapping[int, list[dict[str, str]]], characters: int, notes: list[str]) -> list[dict[str, Any]]:
    """The samples by prompt: [{"prompt", "answers": [[step, answer], ...]}], prompts in the order in which they appear.

    Where they are too many, evaluations in between are left out, and then long texts are cut.
    """
    kept = list(samples)
    each = max((sum(len(sample["answer"]) for sample in given) for given in samples.values()), default=0)
    # The rest is for the prompts.
    most = max(2, int(0.8 * characters) // max(each, 1))
    if len(kept) > most:
        kept = [kept[place] for place in np.unique(np.linspace(0, len(kept) - 1, most).astype(int))]
        notes.append(f"samples of {len(kept):,} of {len(samples):,} evaluations are shown; metrics.jsonl has all of them")
    found: dict[str, list[tuple[int, str]]] = {}
    for step in kept:
        for sample in samples[step]:
            found.setdefault(sample["prompt"], []).append((step, sample["answer"]))
    sizes = [len(text) for prompt, answers in found.items() for text in (prompt, *(answer for _, answer in answers))]
    longest = max(sizes, default=0)
    if sum(sizes) > characters:
        longest = max(200, characters // len(sizes))
        notes.append(f"samples are cut after {longest:,} characters; metrics.jsonl has all of them")
    return [
        {"prompt": _cut(prompt, longest), "answers": [(step, _cut(answer, longest)) for step, answer in answers]}
        for prompt, answers in found.items()
    ]


def _cut(text: str, longest: int) -> str:
    return text if len(text) <= longest else text[:longest] + " …"


def _spikes(run: RunRecord, steps: Mapping[str, Any], share: float, notes: list[str]) -> list[dict[str, Any]]:
    """The spikes, each with its documents by source ({source: [[number, start, tokens], ...]}), and how many are left out."""
    spikes = run.spikes
    if len(spikes) > (most := max(20, int(_SPIKES * share))):
        # A loss that is not finite has no deviations, and is the worst.
        worst = sorted(spikes, key=lambda spike: -(_number(spike.get("deviations")) or np.inf))[:most]
        spikes = sorted(worst, key=lambda spike: spike["step"])
        notes.append(f"the {most:,} largest of {len(run.spikes):,} spikes are shown; spikes.jsonl has all of them")
    documents = max(10, int(_DOCUMENTS * share) // max(len(spikes), 1))
    table = []
    for spike, place in zip(spikes, _places(steps, [spike["step"] for spike in spikes]), strict=True):
        given = [document for document in spike.get("documents") or [] if isinstance(document, dict)]
        by_source: dict[str, list[list[Any]]] = {}
        for document in given[:documents]:
            row = [document.get("document", document.get("pair")), document.get("start"), document.get("tokens")]
            by_source.setdefault(str(document.get("source")), []).append(row)
        values = {name: _number(spike.get(name)) for name in ("loss", "median", "deviations", "gradient_norm")}
        table.append(
            {"at": place, **values, "documents": by_source, "count": len(given), "more": max(0, len(given) - documents)}
        )
    return table


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)


def _number(value: Any) -> float | None:
    return float(f"{value:.5g}") if isinstance(value, int | float) and np.isfinite(value) else None
