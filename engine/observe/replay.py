"""Repeats one step of a run with the same data, and prints its loss by micro-batch and by document."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from engine.data.batch import Batch, Step
from engine.distributed.ranks import lost_ranks_named
from engine.distributed.sharding import reshard
from engine.loop import accumulate
from engine.observe.logged import logged_steps
from engine.optim.adamw import norm_of_gradients
from engine.run import Run
from model.mistral import Mistral

_WORST, _WORDS = 5, 24


class ReplayedObjective(Protocol):
    """An objective that can also give the loss of each document (or pair) of a micro-batch."""

    def __call__(self, model: Mistral, batch: Batch, step: Step) -> dict[str, Tensor]: ...

    def losses(self, model: Mistral, batch: Batch, step: Step) -> Tensor: ...


@dataclass(frozen=True)
class _Document:
    """A document (part); in preference tuning, the chosen side of a pair."""

    loss: float
    number: int  # counted over all sources
    start: int  # first token of the part in its document


@lost_ranks_named()
def replay(run: Run, model: Mistral, objective: ReplayedObjective) -> None:
    """Run step `settings.replay` forward and backward with the weights in `model`, and compare its values with the log.

    The values equal the log to the bit if the weights are from the step before and the number of ranks is the same.
    Prints each micro-batch's part of the loss and the documents with the largest losses. Writes nothing.
    """
    number, ranks = run.settings.replay, run.ranks
    step = run.step(number - 1)
    parts: list[Tensor] = []

    def recorded(model: Mistral, batch: Batch, step: Step) -> dict[str, Tensor]:
        values = objective(model, batch, step)
        parts.append(values["loss"].detach())
        return values

    values = ranks.sum(accumulate(model, recorded, step))
    values["gradient_norm"] = norm_of_gradients(list(model.parameters()))
    documents = [document for batch in step.batches for document in _documents(model, objective, batch, step)]
    reshard(model)
    batches = [
        f"micro-batch rank {ranks.rank}, {batch.tokens} tokens in {len(batch.document_B)} documents: adds {float(part):.6f}"
        for batch, part in zip(step.batches, parts, strict=True)
        if batch.tokens
    ]
    batches = ranks.gather(batches)
    worst = _worst(ranks.gather(documents))
    if ranks.main:
        lines = [_heading(run), *_compared(run, values), *batches, *(_described(run, document) for document in worst)]
        print("\n".join(lines))


@torch.no_grad()
def _documents(model: Mistral, objective: ReplayedObjective, batch: Batch, step: Step) -> list[_Document]:
    losses = objective.losses(model, batch.to(model.lm_head.weight.device), step).tolist()
    every = 1 if batch.pair_B is None else 2
    numbers, starts = batch.document_B[::every].tolist(), batch.document_start_B[::every].tolist()
    # Padding has a negative number.
    return [_Document(*found) for found in zip(losses, numbers, starts, strict=True) if found[1] >= 0]


def _worst(documents: Sequence[_Document]) -> list[_Document]:
    """The documents with the largest losses, NaN before any number."""
    return sorted(documents, key=lambda document: (not math.isnan(document.loss), -document.loss))[:_WORST]


def _heading(run: Run) -> str:
    number, older = run.settings.replay, run.settings.replay - 1 - run.start
    where = run.continued or f"{run.settings.model}, as the run began"
    remark = f"; they are {older} steps older than the step's own, so its loss differs" if older else ""
    return f"replay     step {number} with the weights of {where}{remark}"


def _compared(run: Run, values: dict[str, Tensor]) -> list[str]:
    """The step's values, each beside the value that the run logged."""
    logged: dict[str, float] = {}
    for line in logged_steps(run.out / "metrics.jsonl"):
        if line["step"] == run.settings.replay:
            logged = line
    lines = []
    for name, value in values.items():
        now, then = float(value), logged.get(name)
        if then is None:
            beside = "not logged"
        else:
            beside = f"logged {then!r}, " + ("the same" if now == then else f"{now - then:+.3g}")
        lines.append(f"{name:<10} {now!r} ({beside})")
    return lines


def _described(run: Run, found: _Document) -> str:
    source = max(index for index, first in enumerate(run.plan.document_offsets) if first <= found.number)
    document = found.number - run.plan.document_offsets[source]
    what = f"pair {document // 2}" if run.plan.paired else f"document {document} from token {found.start}"
    words: Sequence[int] = run.datasets[source].tokens(document)[found.start : found.start + _WORDS].tolist()
    return f"loss {found.loss:.4f} in {run.plan.sources[source].path}, {what}: {run.tokenizer.decode(words)!r}"
