"""The whole pipeline on the embedded example, in minutes: from text to a bilingual chat model and a report.

    python -m recipes.quickstart
    python -m recipes.quickstart --device cpu --out runs/quickstart

Each stage is the recipe itself with its configuration from recipes/tiny; the printed command runs the stage alone. The report
goes to report.md, report.json and losses.png. A full run fails where the chat model misses its targets.
"""

import dataclasses
import json
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from engine.settings.toml import PathName, read_toml
from engine.settings.training import TrainSettings
from model.folder import write_file
from model.vocabulary.tokenizer import Tokenizer
from recipes import dpo, export, prepare, pretrain, sft, vocabulary
from recipes.command import command
from recipes.example import report
from recipes.example.text import Example, ExampleSettings, make_example, write_example

if TYPE_CHECKING:
    import torch

CONFIGURATIONS = Path(__file__).parent / "tiny"
ROOT = "runs/quickstart"  # the paths in the configurations begin with this
MARKER = "quickstart.json"
MADE = ("example", "data", "base", "tokenizer", "resized", "cpt", "sft1", "sft2", "dpo", "export", *report.FILES, MARKER)


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
    """Print the stages and do nothing."""
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


@dataclass(frozen=True)
class Stage:
    """A recipe with a configuration of recipes/tiny."""

    name: str  # of the configuration
    settings_class: type
    recipe: Callable[[Any], Any]
    module: str
    model: str = ""  # the resulting model's name in the report, empty where no model results
    chat: bool = False  # evaluate that model through the chat template


def _prepare(name: str) -> Stage:
    return Stage(f"prepare_{name}", prepare.PrepareSettings, prepare.run, "prepare")


STAGES = (
    _prepare("base"),
    _prepare("base_heldout"),
    Stage("base", pretrain.PretrainSettings, pretrain.run, "pretrain", "base"),
    Stage("vocabulary", vocabulary.VocabularySettings, vocabulary.run, "vocabulary", "resized"),
    _prepare("text"),
    _prepare("text_heldout"),
    _prepare("chat_en"),
    _prepare("chat_ja"),
    _prepare("chat_heldout"),
    _prepare("pairs"),
    _prepare("pairs_heldout"),
    Stage("cpt", pretrain.PretrainSettings, pretrain.run, "pretrain", "CPT"),
    Stage("sft1", sft.SftSettings, sft.run, "sft", "SFT 1", chat=True),
    Stage("sft2", sft.SftSettings, sft.run, "sft", "SFT 2", chat=True),
    Stage("dpo", dpo.DpoSettings, dpo.run, "dpo", "DPO", chat=True),
    Stage("export", export.ExportSettings, export.run, "export"),
)


def run(settings: QuickstartSettings) -> dict[str, Any]:
    """Run all stages; returns the report.

    Raises: FileExistsError where `out` holds other files; RuntimeError naming each missed target.
    """
    if settings.dry_run:
        print("\n".join(_plan(settings)))
        return {}
    from engine.environment import choose_device

    device = choose_device(settings.device)
    out = start_afresh(Path(settings.out))
    example = make_example(settings.example)
    print(f"quickstart on {report.machine(device)}; results go to {out}")
    seconds: dict[str, float] = {}
    models: list[dict[str, Any]] = []
    results: dict[str, Any] = {}
    with _timed(seconds, "example"):
        write_example(out / "example", example)
    model = ""
    for number, stage in enumerate(STAGES, 1):
        print(f"\n[{number}/{len(STAGES)}] {_shell_command(stage)}", flush=True)
        stage_settings = configure(stage, settings, model)
        with _timed(seconds, stage.name):
            results[stage.name] = stage.recipe(stage_settings)
        if stage.model:
            model = stage_settings.model_out if stage.name == "vocabulary" else str(results[stage.name])
            with _timed(seconds, "evaluation"):
                models.append(_evaluate(stage, model, example, device))
            print(report.row(models[-1]), flush=True)
    exported = Path(results["export"])
    with _timed(seconds, "evaluation"):
        answers = report.sample_answers(exported, example, device)
    table = report.collect(
        out,
        example,
        models,
        vocabulary=results["vocabulary"],
        seconds=seconds,
        answers=answers,
        exported=exported,
        device=device,
        full=settings.full,
    )
    report.write(out, table)
    print("\n" + (out / "report.md").read_text(encoding="utf-8"))
    check_targets(table, out)
    return table


def check_targets(table: dict[str, Any], out: Path) -> None:
    """Raises: RuntimeError naming each missed target of a full run."""
    if table["full"] and table["missed"]:
        raise RuntimeError(f"quickstart missed its targets: {'; '.join(table['missed'])} (see {out / 'report.md'})")


def configure(stage: Stage, settings: QuickstartSettings, model: str) -> Any:
    """A stage's configuration, with its paths under `out` and the command line's overrides.

    Args:
        model: the model to start from, made by the stages before; empty for the configuration's own.
    """
    loaded = _rooted(read_toml(stage.settings_class, CONFIGURATIONS / f"{stage.name}.toml"), settings.out)
    changes: dict[str, Any] = {}
    if isinstance(loaded, TrainSettings):
        changes["device"] = settings.device
        if settings.steps is not None:
            changes.update(steps=settings.steps, epochs=None)
            warmup = min(loaded.schedule.warmup_steps, settings.steps - 1)
            changes["schedule"] = dataclasses.replace(loaded.schedule, warmup_steps=warmup)
    elif stage.name == "vocabulary" and settings.new_pieces is not None:
        changes["new_pieces"] = settings.new_pieces
    if model and stage.model:
        changes["model"] = model
    return dataclasses.replace(loaded, **changes)


def _rooted(value: Any, out: str) -> Any:
    """The settings with every path under ROOT moved to `out`."""
    if isinstance(value, str):
        return out + value.removeprefix(ROOT) if value.startswith(ROOT + "/") else value
    if isinstance(value, tuple):
        return tuple(_rooted(inner, out) for inner in value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.replace(value, **{f.name: _rooted(getattr(value, f.name), out) for f in dataclasses.fields(value)})
    return value


def _plan(settings: QuickstartSettings) -> list[str]:
    lines = [f"the stages; each command runs alone, with its paths under {ROOT}:", "  python -m recipes.example"]
    for stage in STAGES:
        configured = configure(stage, settings, "")
        length = ""
        if isinstance(configured, TrainSettings):
            length = f"   {configured.steps} steps" if configured.steps else f"   {configured.epochs:g} epoch"
        lines.append(f"  {_shell_command(stage)}{length}")
    return [*lines, f"dry run: nothing was done; results would go to {settings.out}"]


def _shell_command(stage: Stage) -> str:
    return f"python -m recipes.{stage.module} recipes/tiny/{stage.name}.toml"


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


def _evaluate(stage: Stage, folder: str, example: Example, device: "torch.device") -> dict[str, Any]:
    import torch

    from model.weights import load_model
    from recipes.example.evaluate import ask, score

    tokenizer = Tokenizer.load(folder)
    model = load_model(folder, dtype=torch.float32, device=device)
    sets = {"held_out": example.held_out, "unseen": example.unseen}
    scores = {name: score(ask(model, tokenizer, questions, chat=stage.chat)) for name, questions in sets.items()}
    return {"model": stage.model, "stage": stage.name, "folder": folder, "chat": stage.chat, **scores}


@contextmanager
def _timed(seconds: dict[str, float], name: str) -> Iterator[None]:
    """Add the seconds of a block to a stage's."""
    start = time.perf_counter()
    yield
    seconds[name] = seconds.get(name, 0.0) + time.perf_counter() - start


def main(argv: Sequence[str] | None = None) -> None:
    command(QuickstartSettings, run, argv, "python -m recipes.quickstart")


if __name__ == "__main__":
    main()
