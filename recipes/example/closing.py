"""The end of the quickstart: answers of the exported model, report.md, report.json and losses.png, and the targets.

The last stage of recipes/tiny/pipeline.toml.
"""

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from engine.settings.toml import PathName
from recipes.command import command
from recipes.example import report
from recipes.example.scores import read_scores
from recipes.example.text import ExampleSettings, make_example


@dataclass(frozen=True, kw_only=True)
class ClosingSettings:
    """The report of a quickstart."""

    scores: tuple[PathName, ...]
    """Files of recipes.example.scores, in the order of the training."""
    runs: tuple[PathName, ...]
    """Run folders, whose losses are drawn."""
    vocabulary: PathName
    """Tokenizer folder with its vocabulary.json."""
    exported: PathName
    """The exported model, which answers questions."""
    out: PathName
    """The report to write: report.md; report.json and losses.png go beside it."""
    times: str = ""
    """Folder of the chain's markers, which know the seconds of each stage."""
    targets: bool = True
    """Fail where the chat model misses its targets, which hold for the full example alone."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: CUDA if there is a GPU."""
    example: ExampleSettings = field(default_factory=ExampleSettings)
    """Size and seed of the example."""


def run(settings: ClosingSettings) -> dict[str, Any]:
    """Write and print the report. Returns: report.json. Raises: ValueError naming each missed target."""
    from engine.environment import choose_device

    start = time.perf_counter()
    device, example, out = choose_device(settings.device), make_example(settings.example), Path(settings.out)
    exported = Path(settings.exported)
    answers = report.sample_answers(exported, example, device)
    seconds = stage_seconds(Path(settings.times)) if settings.times else {}
    seconds["evaluation"] = seconds.get("evaluation", 0.0) + time.perf_counter() - start
    table = report.collect(
        example,
        [read_scores(path) for path in settings.scores],
        runs=[Path(path) for path in settings.runs],
        vocabulary=json.loads((Path(settings.vocabulary) / "vocabulary.json").read_text(encoding="utf-8")),
        seconds=seconds,
        answers=answers,
        exported=exported,
        device=device,
        full=settings.targets,
    )
    report.write(out.parent, table)
    print("\n" + out.read_text(encoding="utf-8"))
    check_targets(table, out)
    return table


def stage_seconds(markers: Path) -> dict[str, float]:
    """The seconds of each finished stage in the order of their ends; the scoring of all models together as `evaluation`."""
    seconds: dict[str, float] = {}
    for path in sorted(markers.glob("*.json"), key=lambda path: path.stat().st_mtime_ns):
        marker = json.loads(path.read_text(encoding="utf-8"))
        if marker["state"] == "done":
            name = "evaluation" if path.stem.startswith("scores_") else path.stem
            seconds[name] = seconds.get(name, 0.0) + marker["seconds"]
    return seconds


def check_targets(table: dict[str, Any], report_file: Path) -> None:
    """Raises: ValueError naming each missed target of a full run."""
    if table["full"] and table["missed"]:
        raise ValueError(f"quickstart missed its targets: {'; '.join(table['missed'])} (see {report_file})")


def main(argv: Sequence[str] | None = None) -> None:
    command(ClosingSettings, run, argv, "python -m recipes.example.closing")


if __name__ == "__main__":
    main()
