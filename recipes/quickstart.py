"""The whole pipeline on the embedded example, in minutes: from text to a bilingual chat model and a report.

    python -m recipes.quickstart
    python -m recipes.quickstart --device cpu --out runs/quickstart

This runs the chain of recipes/tiny/pipeline.toml from its beginning; with `python -m recipes.pipeline` the same chain goes on
where it was stopped. The report goes to report.md, report.json and losses.png. A full run fails where the chat model
misses its targets.
"""

import dataclasses
import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from engine.settings.toml import PathName, read_toml
from engine.settings.training import TrainSettings
from model.folder import write_file
from recipes.chain.stages import RECIPES
from recipes.command import command
from recipes.example import report
from recipes.example.text import ExampleSettings
from recipes.pipeline import PROG, PipelineSettings
from recipes.pipeline import run as run_pipeline

CHAIN = Path(__file__).parent / "tiny" / "pipeline.toml"
ROOT = "runs/quickstart"  # the chain's own
MARKER = "quickstart.json"
MADE = (
    *("example", "data", "base", "tokenizer", "resized", "cpt", "sft1", "sft2", "dpo", "export", "scores", "pipeline"),
    *(*report.FILES, MARKER),
)


@dataclass(frozen=True, kw_only=True)
class QuickstartSettings:
    """The whole pipeline on the embedded example."""

    out: PathName = ROOT
    """Folder for all results; an earlier quickstart in it is replaced."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: CUDA if there is a GPU."""
    steps: int | None = None
    """Steps of every training stage, for a trial whose targets are not checked; default: each configuration's."""
    new_pieces: int | None = None
    """Japanese pieces to add to the vocabulary; default: the configuration's."""
    dry_run: bool = False
    """Check and print the stages, and do nothing."""
    example: ExampleSettings = field(default_factory=ExampleSettings)
    """Size and seed of the example."""

    def __post_init__(self) -> None:
        for name in ("steps", "new_pieces"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} = {value}: must be at least 1")

    @property
    def full(self) -> bool:
        """Whether the targets apply: nothing was made smaller."""
        return self.steps is None and self.new_pieces is None and self.example == ExampleSettings()


def run(settings: QuickstartSettings) -> dict[str, Any]:
    """Run all stages; returns the report.

    Raises: FileExistsError where `out` holds other files; ValueError naming each missed target.
    """
    chain = dataclasses.replace(read_chain_file(), out=settings.out, dry_run=settings.dry_run)
    start = f"{PROG} recipes/tiny/pipeline.toml"
    if settings.dry_run:
        run_pipeline(chain, options_of(chain, settings), start)
        return {}
    from engine.environment import choose_device

    out = start_afresh(Path(settings.out))
    print(f"quickstart on {report.machine(choose_device(settings.device))}; results go to {out}")
    run_pipeline(chain, options_of(chain, settings), start)
    table: dict[str, Any] = json.loads((out / "report.json").read_text(encoding="utf-8"))
    return table


def read_chain_file() -> PipelineSettings:
    """The quickstart's chain, from any working folder: its files stand beside it."""
    chain = read_toml(PipelineSettings, CHAIN)
    if Path(chain.stages[1].file).is_file():
        return chain
    stages = (
        dataclasses.replace(stage, file=str(CHAIN.parent / Path(stage.file).name)) if stage.file else stage
        for stage in chain.stages
    )
    return dataclasses.replace(chain, stages=tuple(stages))


def options_of(chain: PipelineSettings, settings: QuickstartSettings) -> dict[str, list[str]]:
    """The options of each stage's command line that these settings mean."""
    changed = {name: value for name, value in vars(settings.example).items() if value != getattr(ExampleSettings(), name)}
    options: dict[str, list[str]] = {}
    for stage in chain.stages:
        settings_class = RECIPES[stage.recipe].settings_class()
        fields = {each.name for each in dataclasses.fields(settings_class)}
        found = options.setdefault(stage.name or Path(stage.file).stem, [])
        if "device" in fields:
            found += ["--device", settings.device]
        if "example" in fields:
            found += [part for name, value in changed.items() for part in (f"--example.{name.replace('_', '-')}", str(value))]
        if issubclass(settings_class, TrainSettings) and settings.steps is not None:
            warmup = read_toml(settings_class, stage.file).schedule.warmup_steps
            found += ["--steps", str(settings.steps), "--epochs", "None"]
            found += ["--schedule.warmup-steps", str(min(warmup, settings.steps - 1))]
        if "new_pieces" in fields and settings.new_pieces is not None:
            found += ["--new-pieces", str(settings.new_pieces)]
        if "targets" in fields and not settings.full:
            found.append("--no-targets")
    return options


def start_afresh(out: Path) -> Path:
    """Make the folder, or remove an earlier quickstart's results from it, and nothing else."""
    if out.exists() and not out.is_dir():
        raise NotADirectoryError(f"{out}: is a file; name a folder with --out")
    if out.is_dir() and any(out.iterdir()) and not (out / MARKER).is_file():
        raise FileExistsError(f"{out}: holds files that no quickstart made; choose another folder with --out")
    out.mkdir(parents=True, exist_ok=True)
    for name in MADE:
        path = out / name
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        elif name != MARKER:
            path.unlink(missing_ok=True)
    # Written first: an interrupted run can then start again.
    write_file(out / MARKER, json.dumps({"made": MADE}, indent=2) + "\n")
    return out


def main(argv: Sequence[str] | None = None) -> None:
    command(QuickstartSettings, run, argv, "python -m recipes.quickstart")


if __name__ == "__main__":
    main()
