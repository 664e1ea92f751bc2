"""Ask a model of the quickstart the example's held-out and unseen questions, and write its scores.

python -m recipes.example.scores --model runs/quickstart/sft1 --shown-as "SFT 1" --chat --out runs/quickstart/scores/sft1.json
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from engine.settings.toml import PathName
from model.folder import write_file
from recipes.command import command
from recipes.example import report
from recipes.example.text import ExampleSettings, make_example


@dataclass(frozen=True, kw_only=True)
class ScoresSettings:
    """Scores of a model on the example's questions."""

    model: PathName
    """Run folder (its newest checkpoint) or Hugging Face folder."""
    shown_as: str
    """The model's name in the report."""
    out: PathName
    """File to write (.json)."""
    chat: bool = False
    """Ask through the chat template; otherwise as plain text to continue."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: CUDA if there is a GPU."""
    example: ExampleSettings = field(default_factory=ExampleSettings)
    """Size and seed of the example."""


def run(settings: ScoresSettings) -> dict[str, Any]:
    """Ask, write the file, print a line. Returns: the file's content, as `read_scores` gives it."""
    from engine.environment import choose_device
    from engine.inference.opening import open_model
    from recipes.example.evaluate import ask, score

    example = make_example(settings.example)
    folder, tokenizer, model = open_model(settings.model, choose_device(settings.device), "float32")
    table: dict[str, Any] = {"model": settings.shown_as, "folder": str(folder), "chat": settings.chat}
    for name, questions in (("held_out", example.held_out), ("unseen", example.unseen)):
        scores = score(ask(model, tokenizer, questions, chat=settings.chat))
        table[name] = {f"{language} {kind}": asdict(found) for (language, kind), found in scores.items()}
    out = Path(settings.out)
    out.parent.mkdir(parents=True, exist_ok=True)
    write_file(out, json.dumps(table, indent=1) + "\n")
    entry = read_scores(out)
    print(report.row(entry))
    return entry


def read_scores(path: str | Path) -> dict[str, Any]:
    """A file that `run` wrote, with `held_out` and `unseen` as (language, kind) -> Score."""
    from recipes.example.evaluate import Score

    table = json.loads(Path(path).read_text(encoding="utf-8"))
    for name in ("held_out", "unseen"):
        cells = {cell: Score(**values) for cell, values in table[name].items()}
        table[name] = {tuple(cell.split(" ")): found for cell, found in cells.items()}
    return table


def main(argv: Sequence[str] | None = None) -> None:
    command(ScoresSettings, run, argv, "python -m recipes.example.scores")


if __name__ == "__main__":
    main()
