"""What a run goes on from: its own newest checkpoint (resumed, with another length where that changes no step done), or, as a
branch, a checkpoint of another run.

A run remembers what its checkpoints were made with: settings, fingerprints of data, tokenizer and starting model, its parent.
Here these are compared with what the run is told now.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine.checkpoint.state import STATE, TrainingState, fingerprint_of, newest_checkpoint, read_state
from engine.data.plan import Plan
from engine.distributed.agreement import seen
from engine.distributed.ranks import Ranks
from engine.distributed.run_lock import run_lock
from engine.optim.schedule import learning_rate
from engine.settings.toml import defaults
from engine.settings.training import FREE_ON_RESUME, TrainSettings

# A run of at most so many steps is a trial: a longer run that cannot continue it takes its folder, and the trial moves aside.
TRIAL_STEPS = 20
# Folder of a reference's log-probabilities in a run folder.
REFERENCE = "reference"
# Paths that may change on resuming: the plan's fingerprint covers the content of data and tokenizer.
_CONTENT_COUNTS = re.compile(r"tokenizer|sources\.\d+\.path")
# Settings that `_check_length` judges.
_LENGTH = ("steps", "epochs")
# What older runs, which did not know a setting, did otherwise than its default says.
_EARLIER = {"optimizer.gradients": "parameter"}


@dataclass(frozen=True)
class Past:
    """A checkpoint that a run goes on from, and what it remembers."""

    checkpoint: Path
    state: TrainingState

    def settings_of(self, settings_class: type) -> dict[str, Any]:
        """The settings that the checkpoint was made with, by dotted names.

        A setting that an older version did not know had the effect of its default.
        """
        return dict(named(defaults(settings_class))) | _EARLIER | dict(named(self.state.settings))

    @property
    def is_trial(self) -> bool:
        """Whether its run was asked for a few steps only."""
        return 0 < self.state.settings.get("steps", 0) <= TRIAL_STEPS


def named(value: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Each value of nested tables and lists, with its dotted name."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from named(inner, f"{prefix}{key}.")
    elif isinstance(value, (list, tuple)):
        for index, inner in enumerate(value):
            yield from named(inner, f"{prefix}{index}.")
    else:
        yield prefix.removesuffix("."), value


def check_own_folder(settings: TrainSettings) -> None:
    """Raises: ValueError for a branch that would write into its parent's folder."""
    parent = Path(settings.from_).resolve()
    if settings.from_ and Path(settings.out).resolve() in (parent, parent.parent):
        raise ValueError(f"from = {settings.from_} lies in out = {settings.out}: a branch needs its own folder; change out")


def parent_of(settings: TrainSettings, ranks: Ranks) -> Past:
    """The checkpoint that `from` names. Raises: FileNotFoundError where there is none."""
    checkpoint = seen(Path(ranks.decided(lambda: str(_checkpoint(settings.from_)))), ranks)
    return Past(checkpoint, read_state(checkpoint))


def _checkpoint(name: str) -> Path:
    folder = newest_checkpoint(name) or Path(name)
    if not (folder / STATE).is_file():
        found = "no such folder" if not folder.is_dir() else "neither a checkpoint nor a run folder that holds one"
        raise FileNotFoundError(f"from = {name}: {found}; a model without training state is named as model")
    return folder


def branch_model(settings: TrainSettings, parent: Past) -> str:
    """The `model` of a branch that names none: the parent's, which is the reference of preference tuning; the checkpoint, where
    preference tuning branches off another kind of run."""
    begins = hasattr(settings, "preference") and "preference" not in parent.state.settings
    return str(parent.checkpoint) if begins else parent.state.settings["model"]


def check_branch(settings: TrainSettings, now: TrainingState, plan: Plan, parent: Past) -> str:
    """Whether a branch can go on from its parent's checkpoint. Returns: a note about the data, or nothing.

    Raises: ValueError where the branch asks for what the checkpoint does not have, with the remedy.
    """
    before, asked, began = parent.state, dict(named(now.settings)), parent.settings_of(type(settings))
    if settings.from_optimizer:
        for name in ("dtype", "optimizer.moments"):
            if asked[name] != began[name]:
                raise ValueError(
                    f"{name} = {asked[name]!r}, and {parent.checkpoint} holds an optimizer's state of {name} = "
                    f"{began[name]!r}; set {name} to that, or from_optimizer = false"
                )
    if not settings.from_data:
        return ""
    if not plan.continues(before.plan):
        differing = (name for name in asked if re.fullmatch(r"seed|context_length|step_size|sources\..*(share|passes)", name))
        changed = next((name for name in differing if asked[name] != began.get(name)), None)
        what = _told(changed, asked, began) if changed else f"{_changed(now, before)} is other data than its own"
        raise ValueError(
            f"from = {settings.from_}: its data order cannot go on, as {what}; restore it, or set from_data = false to begin "
            "at step 0 of this data"
        )
    if plan.steps <= before.step:
        raise ValueError(
            f"from = {settings.from_}: has done {before.step} steps, and the settings ask for {plan.steps} in all; raise steps "
            "or epochs, or set from_data = false to begin at step 0"
        )
    return _seam(plan, before)


def check_same_run(
    settings: TrainSettings,
    now: TrainingState,  # as the settings make it
    plan: Plan,
    past: Past,  # the run's own newest checkpoint
) -> str:
    """Whether a run can be resumed with these settings. Returns: a note about a new length, or nothing.

    Raises: ValueError naming the setting or the content that changed.
    """
    before, asked, began = past.state, dict(named(now.settings)), past.settings_of(type(settings))
    for name in sorted({*asked, *began}):
        if asked.get(name) == began.get(name) or {name, name.split(".")[0]} & FREE_ON_RESUME or name in _LENGTH:
            continue
        if name in asked and name in began and _CONTENT_COUNTS.fullmatch(name):
            continue
        if name == "model" and before.model is not None and before.model == now.model:
            # The same weights, moved or copied.
            continue
        if name == "from" and _is_parent(asked[name], before):
            continue
        others = ", which has other weights" if name == "model" and None not in (before.model, now.model) else ""
        raise ValueError(
            f"{settings.out}: holds a run with {_told(name, asked, began)}{others}; choose another out, or restore the "
            "settings that the run began with"
        )
    if not plan.continues(before.plan):
        raise ValueError(
            f"{settings.out}: {_changed(now, before)} changed since this run began; restore it or choose another out"
        )
    old = tuple(before.settings.get(name) for name in _LENGTH)
    return "" if old == (settings.steps, settings.epochs) else _check_length(settings, plan, before)


def _told(name: str, asked: dict[str, Any], began: dict[str, Any]) -> str:
    return f"{name} = {began.get(name)!r}, the settings now say {asked.get(name)!r}"


def _is_parent(name: str, before: TrainingState) -> bool:
    """Whether a path names the checkpoint that a branch began from, moved or copied."""
    return before.parent is not None and bool(name) and fingerprint_of(_checkpoint(name)) == before.parent.fingerprint


def _changed(now: TrainingState, before: TrainingState) -> str:
    """The content that is not what it was, in words."""
    asked = dict(named(now.settings))
    for name, fingerprint in (now.contents or {}).items():
        if before.contents is not None and before.contents.get(name) != fingerprint:
            return "the tokenizer" if name == "tokenizer" else f"the prepared data in {asked[name]}"
    return "the prepared data"


def _check_length(settings: TrainSettings, plan: Plan, before: TrainingState) -> str:
    """Judge another number of steps than the run began with. Returns: a note."""
    done, schedule = before.step, settings.schedule
    old = plan.of_length(*(before.settings.get(name) for name in _LENGTH)).steps
    if plan.steps < done:
        raise ValueError(
            f"{settings.out}: has done {done} steps, and the settings now ask for {plan.steps} in all; raise steps or epochs, "
            "or choose another out"
        )
    for step in range(before.parent.step if before.parent and settings.from_data else 0, done):
        was, now = (learning_rate(schedule, step, steps) for steps in (old, plan.steps))
        if was != now:
            raise ValueError(
                f"{settings.out}: holds a run of {old} steps, the settings now ask for {plan.steps}; its {schedule.kind} "
                f"schedule ends with the run, so step {step + 1} would have had the learning rate {now:.4g} and not {was:.4g}. "
                f"Only a constant schedule, or a run within its warm-up, can change its length. Branch instead: another out, "
                f"from = {settings.out}, and schedule.start = {done} for a schedule of the steps to come"
            )
    note = f"the run has {plan.steps} steps now, and had {old}"
    return "; ".join(filter(None, (note, _seam(plan, before))))


def _seam(plan: Plan, before: TrainingState) -> str:
    """What a plan passes over or repeats where it goes on behind a run that had come to its end, in words.

    The last step of a run by epochs takes what is left, less or more than a step.
    """
    if before.settings.get("epochs") is None or before.step == plan.steps:
        return ""
    ended = plan.of_length(*(before.settings.get(name) for name in _LENGTH))
    if before.step != ended.steps:
        return ""
    over, again = ended.seam(plan)
    unit = "pairs" if plan.paired else "tokens"
    return "; ".join(
        f"{count:,} {unit} {what} where the earlier end was"
        for count, what in ((over, "are left out"), (again, "are seen once more"))
        if count
    )


def set_aside(out: Path) -> Path:
    """Move a trial's folder to a free name beside it. Returns: that name.

    A reference's log-probabilities stay: they are named after all that they depend on, and cost hours to compute.
    Raises: BlockingIOError where a process writes the folder.
    """
    names = (f"{out.name}-trial", *(f"{out.name}-trial-{number}" for number in range(2, 1000)))
    target = next(path for path in map(out.with_name, names) if not path.exists())
    with run_lock(out):
        pass
    out.rename(target)
    if (target / REFERENCE).is_dir():
        out.mkdir()
        (target / REFERENCE).rename(out / REFERENCE)
    return target
