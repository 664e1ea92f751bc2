"""Settings that make a run fit its device, found with the memory plan.

Each proposal says less memory for more time or coarser numbers. One setting is tried before two, two before three; of as many,
those that cost the least come first.
"""

import itertools
from bisect import bisect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import get_args

import torch

from engine.estimate.account import MemoryPlan
from engine.estimate.memory import plan
from engine.estimate.sizes import Training
from kernels import TILE
from kernels.recompute import Recompute

# Proposals that a message can hold.
_MOST = 3
# Micro-batches of a run whose memory is planned again: of all of a run's, those that take the most.
_TRIED = 3
PACK = "pack_tokens"


@dataclass(frozen=True)
class Fitting:
    """Settings under which a run fits."""

    settings: dict[str, str]  # by dotted name
    peak: int  # bytes, planned

    def __str__(self) -> str:
        return " with ".join(f"{name} = {value}" for name, value in self.settings.items())


def fitting_settings(
    trainings: Sequence[Training],  # the run's micro-batches
    fits: Callable[[MemoryPlan], bool],  # whether the device holds a plan
    *,
    least: int,  # tokens of the smallest possible micro-batch: the longest document or pair
    fresh: bool,  # no step is done yet: a run that goes on keeps its optimizer's settings
) -> list[Fitting]:
    """Up to three proposals whose plans fit; none where no setting is lean enough."""
    worst = sorted(trainings, key=lambda training: -plan(training).peak)[:_TRIED]
    choices = list(_choices(worst[0], least, fresh))
    for count in range(1, len({name for name, *_ in choices}) + 1):
        found = []
        for chosen in itertools.combinations(choices, count):
            if len({name for name, _ in chosen}) == count and (fitting := _fitting(worst, dict(chosen), fits, least, fresh)):
                found.append(fitting)
        if found:
            return found[:_MOST]
    return []


def _choices(training: Training, least: int, fresh: bool) -> Iterator[tuple[str, str]]:
    """(setting, leaner value) of each change that the run allows, the cheapest first."""
    if training.shards > 1 and not training.reshard:
        yield "parallel.reshard", "true"
    if training.shards > 1 and training.reduce_once:
        yield "parallel.reduce_once", "false"
    if training.fp8_layers and training.keep_codes:
        yield "fp8.keep_weights", "false"
    if training.tokens - TILE >= least:
        yield PACK, ""
    if training.shards == 1 and training.kernels and training.optimizer.offload == "none":
        yield "optimizer.offload", '"moments"'
    if fresh and training.optimizer.moments == "float32":
        yield "optimizer.moments", '"bfloat16"'
    modes = get_args(Recompute)
    for mode in modes[modes.index(training.recompute) + 1 :]:
        yield "recompute", f'"{mode}"'
    if fresh and training.optimizer.gradients == "float32" and training.dtype == torch.bfloat16 and training.shards == 1:
        yield "optimizer.gradients", '"parameter"'


def _fitting(
    trainings: Sequence[Training],
    settings: dict[str, str],
    fits: Callable[[MemoryPlan], bool],
    least: int,
    fresh: bool,
) -> Fitting | None:
    """The settings with their peak, where they fit. The micro-batch is then the largest possible."""

    def worst(tokens: int | None) -> MemoryPlan:
        plans = (plan(_changed(training, settings, tokens, fresh)) for training in trainings)
        return max(plans, key=lambda found: found.peak)

    tokens = None
    if PACK in settings:
        sizes = range(-(-least // TILE) * TILE, max(training.tokens for training in trainings), TILE)
        count = bisect(sizes, False, key=lambda size: not fits(worst(size)))
        if not count:
            return None
        tokens = sizes[count - 1]
        settings = {**settings, PACK: str(tokens)}
    found = worst(tokens)
    return Fitting(settings, found.peak) if fits(found) else None


def _changed(training: Training, settings: dict[str, str], tokens: int | None, fresh: bool) -> Training:
    """The training under these settings, with micro-batches of at most `tokens`, None: as they are."""
    values = {name: value.strip('"') for name, value in settings.items()}
    optimizer = {name.removeprefix("optimizer."): value for name, value in values.items() if name.startswith("optimizer.")}
    changed = replace(
        training,
        optimizer=replace(training.optimizer, **optimizer),  # type: ignore[arg-type]
        recompute=values.get("recompute", training.recompute),  # type: ignore[arg-type]
        reshard=training.reshard or "parallel.reshard" in values,
        reduce_once=training.reduce_once and "parallel.reduce_once" not in values,
        keep_codes=training.keep_codes and "fp8.keep_weights" not in values,
    )
    if tokens is None or tokens >= training.tokens:
        return changed
    if fresh and "gradients" not in optimizer and training.dtype == torch.bfloat16 and training.shards == 1:
        # Smaller micro-batches are more of them, whose gradients "auto" sums in float32.
        changed = replace(changed, optimizer=replace(changed.optimizer, gradients="float32"))
    rows = -(-tokens * training.rows // training.tokens)
    return replace(changed, tokens=tokens, rows=rows, accumulates=True, documents=None)
