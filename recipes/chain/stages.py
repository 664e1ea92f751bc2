"""A chain of recipes: which recipe each stage runs, with which settings, what it reads and what it writes.

Inputs and outputs follow from the settings: a setting of the type `PathName` names something to read, unless it is one of the
few that name a result.
"""

import contextlib
import difflib
import fnmatch
import importlib
import io
import os
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from engine.data.sources import HUB
from engine.settings.toml import PathName, defaults, named, parse
from engine.settings.training import FREE_ON_RESUME
from model.config import PRESET
from model.hub import hub_repository
from model.vocabulary.chat import TEMPLATES
from recipes.data_making.making import NO_EFFECT
from recipes.data_making.rows import beside

# The names of these settings say where a result goes; all other paths are read.
_OUTPUTS = ("out", "model_out")
_GLOB = frozenset("*?[")


@dataclass(frozen=True)
class Recipe:
    """A command that can be a stage."""

    module: str
    settings: str  # the name of its settings' class
    trains: bool = False  # on all ranks, and goes on by itself where it was stopped; other recipes run on rank 0 alone
    free: frozenset[str] = frozenset()  # settings that change no result
    beside: tuple[str, ...] = ()  # names of further files beside a result that is a file
    extra: str = ""  # a package of the extra `eval` that it needs

    def settings_class(self) -> type:
        return getattr(importlib.import_module(self.module), self.settings)

    def run(self, settings: Any) -> Any:
        """Run the recipe, as its command does."""
        return importlib.import_module(self.module).run(settings)


_DATA = frozenset({"overwrite", "preview", "show"})
_MAKING = {"free": NO_EFFECT, "beside": ("journal", "dropped.jsonl.gz")}
RECIPES = {
    "example": Recipe("recipes.example.__main__", "WriteSettings", free=_DATA),
    "select": Recipe("recipes.select", "SelectSettings"),
    "translate": Recipe("recipes.translate", "TranslateSettings", **_MAKING),  # type: ignore[arg-type]
    "generate": Recipe("recipes.generate", "GenerateSettings", **_MAKING),  # type: ignore[arg-type]
    "pairs": Recipe("recipes.pairs", "PairsSettings", **_MAKING),  # type: ignore[arg-type]
    "split": Recipe("recipes.shisa.split_languages", "SplitSettings", free=_DATA),
    "vocabulary": Recipe("recipes.vocabulary", "VocabularySettings", free=_DATA),
    "prepare": Recipe("recipes.prepare", "PrepareSettings", free=_DATA),
    "pretrain": Recipe("recipes.pretrain", "PretrainSettings", trains=True, free=FREE_ON_RESUME),
    "sft": Recipe("recipes.sft", "SftSettings", trains=True, free=FREE_ON_RESUME),
    "dpo": Recipe("recipes.dpo", "DpoSettings", trains=True, free=FREE_ON_RESUME),
    "evaluate": Recipe("recipes.evaluate", "EvaluateSettings", extra="lm_eval"),
    "export": Recipe("recipes.export", "ExportSettings", free=_DATA),
    "example_scores": Recipe("recipes.example.scores", "ScoresSettings", free=frozenset({"device"})),
    "example_report": Recipe("recipes.example.closing", "ClosingSettings", free=frozenset({"device"})),
}


@dataclass(frozen=True, kw_only=True)
class StageSettings:
    """A stage of a chain."""

    recipe: str
    """Which command: vocabulary, prepare, pretrain, sft, dpo, evaluate, export, split, select, translate, generate, pairs."""
    file: PathName = ""
    """Its settings file, as on its own command line."""
    name: str = ""
    """Name of the stage; default: the file's name without .toml."""
    options: tuple[str, ...] = ()
    """Options of its command line, such as ["--pack-tokens", "8192"]; they override the file."""


@dataclass(frozen=True)
class Stage:
    """A stage whose settings are read. moved: the folder in which the settings' paths begin, and where they begin now."""

    name: str
    recipe: Recipe
    settings: Any
    command: str  # that runs this stage alone
    moved: tuple[str, str]

    @property
    def trains(self) -> bool:
        return self.recipe.trains

    @cached_property
    def outputs(self) -> dict[str, str]:
        """The paths of the stage's results, by the setting that names them."""
        found = {name: value for name, value, _ in named(self.settings) if name in _OUTPUTS}
        if getattr(self.settings, "heldout", 0) and isinstance(self.settings.heldout, float):
            found["heldout"] = f"{found['out']}-heldout"
        return found

    @property
    def written(self) -> list[Path]:
        """Everything that the stage writes: its results, and files beside them."""
        paths = [Path(path) for path in self.outputs.values()]
        return paths + [beside(path, name) for name in self.recipe.beside for path in self.outputs.values()]

    @cached_property
    def inputs(self) -> dict[str, str]:
        """What the stage reads, by setting: paths, hub repositories, presets."""
        values = {name: value for name, value, _ in named(self.settings)}
        found = {}
        for name, value, is_path in named(self.settings):
            at_endpoint = name.endswith("model") and values.get(f"{name.removesuffix('model')}url")
            if is_path and value and name not in (*_OUTPUTS, "reference_cache") and not at_endpoint:
                found[name] = value
        return found

    @property
    def identity(self) -> dict[str, Any]:
        """The settings that its result depends on, apart from what it reads and where it writes."""
        paths = self.inputs.keys() | self.outputs.keys() - {"heldout"}
        return {name: value for name, value, _ in named(self.settings) if name not in paths and not self.is_free(name)}

    def is_free(self, name: str) -> bool:
        """Whether a setting, by its dotted name, changes no result."""
        return bool({name, name.partition(".")[0], name.rpartition(".")[2]} & self.recipe.free)

    def default(self, name: str) -> Any:
        """A setting's default, by its dotted name; None where it has none."""
        value: Any = defaults(type(self.settings))
        for part in name.split("."):
            value = value.get(part) if isinstance(value, dict) else None
        return value

    def as_written(self, path: str) -> str:
        """A path as the settings file has it, wherever the chain's folder lies now."""
        root, out = self.moved
        return _rebased(path, out, root)

    def as_now(self, path: str) -> str:
        """A path of the settings file where it lies now."""
        return _rebased(path, *self.moved)

    def reads_from(self, other: "Stage") -> bool:
        """Whether a result of the other stage is among the inputs."""
        return any(makes(output, path) for output in other.outputs.values() for path in self.inputs.values())


def makes(output: str, path: str) -> bool:
    """Whether an input's path means a result, a part of it, or a folder or pattern that holds it."""
    output, path = os.path.abspath(output), os.path.abspath(path)
    if is_pattern(path):
        return fnmatch.fnmatch(output, path) or fnmatch.fnmatch(output, f"{path}/*") or _is_in(_fixed_part(path), output)
    return output == path or _is_in(path, output) or _is_in(output, path)


def is_pattern(path: str) -> bool:
    """Whether a path is a pattern of names."""
    return bool(_GLOB & set(path))


def _fixed_part(pattern: str) -> str:
    """The folder of a pattern up to its first wildcard."""
    parts = Path(pattern).parts
    first = next(number for number, part in enumerate(parts) if is_pattern(part))
    return str(Path(*parts[:first]))


def _is_in(path: str, folder: str) -> bool:
    return path.startswith(folder.rstrip("/") + "/")


@dataclass(frozen=True)
class Chain:
    """The stages in their order, and the folder that holds the chain's markers."""

    stages: tuple[Stage, ...]
    folder: Path

    def makers(self, stage: Stage) -> list[Stage]:
        """The earlier stages whose results a stage reads."""
        return [other for other in self.stages[: self.stages.index(stage)] if stage.reads_from(other)]

    def maker(self, stage: Stage, path: str) -> Stage | None:
        """The last earlier stage that makes an input's path."""
        earlier = self.stages[: self.stages.index(stage)]
        return next((other for other in reversed(earlier) if any(makes(out, path) for out in other.outputs.values())), None)

    def depending(self, names: Sequence[str]) -> list[Stage]:
        """The stages of these names, and every stage that reads their results or results made from them."""
        found: list[Stage] = []
        for stage in self.stages:
            if stage.name in names or any(maker in found for maker in self.makers(stage)):
                found.append(stage)
        return found

    def needed(self, stages: Sequence[Stage]) -> list[Stage]:
        """These stages, and every earlier stage from whose results they are made."""
        found: list[Stage] = []
        for stage in reversed(self.stages):
            if stage in stages or any(stage in self.makers(other) for other in found):
                found.append(stage)
        return found

    def is_remote(self, setting: str, value: str) -> bool:
        """Whether an input is a preset, a template's name, or on the hub, and no path of this machine."""
        last = setting.rpartition(".")[2]
        if value.startswith((PRESET, HUB)) or (last == "template" and value in TEMPLATES):
            return True
        ours = makes(str(self.folder.parent), value) or any(
            makes(out, value) for each in self.stages for out in each.outputs.values()
        )
        return not ours and last in ("model", "tokenizer") and hub_repository(value) is not None

    def called(self, names: Sequence[str], option: str) -> list[Stage]:
        """The stages of these names. Raises: ValueError naming the option and the nearest name."""
        known = {stage.name: stage for stage in self.stages}
        for name in names:
            if name not in known:
                raise ValueError(f"{option}: {_unknown(name, 'stage', known)}")
        return [stage for stage in self.stages if stage.name in names]


def read_chain(
    stages: Sequence[StageSettings],
    *,
    root: str,  # the folder in which the settings' paths begin
    out: str,  # the folder to use in its place
    options: Mapping[str, Sequence[str]],  # stage -> further options of its command line
) -> tuple[Chain, list[str]]:
    """The chain of these stages, and every mistake in it: one line each. A stage with a mistake is left out of the chain."""
    found: list[Stage] = []
    mistakes: list[str] = []
    names = [settings.name or Path(settings.file).stem for settings in stages]
    for number, (name, settings) in enumerate(zip(names, stages, strict=True), 1):
        where = f"stage {name or number}"
        try:
            if not name:
                raise ValueError("has neither a file nor a name")
            if names.count(name) > 1:
                raise ValueError("two stages have this name: give one of them another (name = ...)")
            if settings.recipe not in RECIPES:
                raise ValueError(_unknown(settings.recipe, "recipe", RECIPES))
            given = [*settings.options, *options.get(name, ())]
            found.append(_read_stage(name, settings, given, moved=(root, out)))
        except (ValueError, OSError) as error:
            mistakes.append(f"{where}: {error}")
    mistakes += [
        f"{_unknown(name, 'stage', names)} (in --{name}.{option[0].lstrip('-')})"
        for name, option in options.items()
        if name not in names
    ]
    return Chain(tuple(found), Path(out) / "pipeline"), mistakes


def _unknown(name: str, what: str, known: Any) -> str:
    nearest = difflib.get_close_matches(name, [*known], n=1, cutoff=0.0)
    return f"{name!r} is no {what}; the nearest one is {nearest[0]!r}" if nearest else f"{name!r} is no {what}"


def _read_stage(name: str, settings: StageSettings, options: Sequence[str], *, moved: tuple[str, str]) -> Stage:
    recipe = RECIPES[settings.recipe]
    alone = f"python -m {recipe.module.removesuffix('.__main__')}"
    arguments = [*([settings.file] if settings.file else []), *options]
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said), contextlib.redirect_stdout(said):
            read: Any = parse(recipe.settings_class(), arguments, prog=alone)
    except SystemExit as ended:
        # A mistake in an option is explained in a box, which has borders; help is no mistake elsewhere.
        text = str(ended.code).removeprefix("error: ") if isinstance(ended.code, str) else said.getvalue()
        raise ValueError(" ".join(text.replace("│", " ").split())) from None
    for setting in ("dry_run", "replay"):
        if getattr(read, setting, False):
            raise ValueError(f"{setting} has no place in a chain: leave it out")
    return Stage(name, recipe, _moved(read, *moved), f"{alone} {shlex.join(arguments)}".rstrip(), moved)


def _moved(value: Any, root: str, out: str) -> Any:
    """The settings with every path that lies in `root` moved to `out`."""
    if isinstance(value, str):
        return _rebased(value, root, out)
    if isinstance(value, tuple):
        return tuple(_moved(inner, root, out) for inner in value)
    if is_dataclass(value) and not isinstance(value, type):
        return replace(value, **{each.name: _moved(getattr(value, each.name), root, out) for each in fields(value)})
    return value


def _rebased(path: str, root: str, out: str) -> str:
    inside = path == root or path.startswith(root.rstrip("/") + "/")
    return out.rstrip("/") + path.removeprefix(root.rstrip("/")) if inside else path
