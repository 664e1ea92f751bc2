"""One step of a run once more, with the same batch: what it computed, by micro-batch and by document."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from engine.data.batch import Batch, Step
from engine.distributed.ranks import gather, host_group, lost_ranks_named
from engine.distributed.sharding import reshard
from engine.loop import accumulate
from engine.observe.metrics import logged_steps
from engine.optim.adamw import norm_of_gradients
from engine.run import Run
from model.mistral import Mistral

_WORST, _WORDS = 5, 24


class ReplayedObjective(Protocol):
    """An objective that can also tell the losses of a micro-batch's documents (or pairs) apart."""

    def __call__(self, model: Mistral, batch: Batch, step: Step) -> dict[str, Tensor]: ...

    def losses(self, model: Mistral, batch: Batch, step: Step) -> Tensor: ...


@dataclass(frozen=True)
class _Document:
    """A document, a part of one from `start` on, or the chosen side of a pair, by its number over all sources."""

    loss: float
    number: int
    start: int


@lost_ranks_named()
def replay(run: Run, model: Mistral, objective: ReplayedObjective) -> None:
    """Run step `replay` of the run forward and backward from the weights in `model`, and print what came of it.

    The loss is to the bit the logged one where these weights are those of the step before, and rows are dealt to as many ranks.
    """
    number, ranks = run.settings.replay, run.ranks
    step = run.step(number - 1)
    parts: list[Tensor] = []

    def noted(model: Mistral, batch: Batch, step: Step) -> dict[str, Tensor]:
        values = objective(model, batch, step)
        parts.append(values["loss"].detach())
        return values

    values = ranks.sum(accumulate(model, noted, step))
    values["gradient_norm"] = norm_of_gradients(list(model.parameters()))
    documents = [document for batch in step.batches for document in _documents(model, objective, batch, step)]
    reshard(model)
    group = host_group(ranks)
    batches = gather(
        [
            f"micro-batch rank {ranks.rank}, {batch.tokens} tokens in {len(batch.document_B)} documents: adds {float(part):.6f}"
            for batch, part in zip(step.batches, parts, strict=True)
            if batch.tokens
        ],
        ranks,
        group,
    )
    worst = sorted(gather(documents, ranks, group), key=lambda document: -document.loss)[:_WORST]
    if ranks.main:
        lines = [_began(run), *_compared(run, values), *batches, *(_described(run, document) for document in worst)]
        print("\n".join(lines))


@torch.no_grad()
def _documents(model: Mistral, objective: ReplayedObjective, batch: Batch, step: Step) -> list[_Document]:
    losses = objective.losses(model, batch.to(model.lm_head.weight.device), step).tolist()
    every = 1 if batch.pair_B is None else 2
    numbers, starts = batch.document_B[::every].tolist(), batch.document_start_B[::every].tolist()
    return [_Document(*found) for found in zip(losses, numbers, starts, strict=True) if found[1] >= 0]


def _began(run: Run) -> str:
    number, before = run.settings.replay, run.settings.replay - 1 - run.start
    where = run.checkpoint or f"{run.settings.model}, as the run began"
    late = f"; they are {before} steps older than the step's own, whose loss is another" if before else ""
    return f"replay     step {number} with the weights of {where}{late}"


def _compared(run: Run, values: dict[str, Tensor]) -> list[str]:
    """The step's values beside those that the run logged."""
    steps = logged_steps(run.out / "metrics.jsonl")
    logged, lines = next((line for line in steps if line["step"] == run.settings.replay), {}), []
    for name, value in values.items():
        found, then = float(value), logged.get(name)
        beside = (
            "not logged" if then is None else f"logged {then!r}, " + ("the same" if found == then else f"{found - then:+.3g}")
        )
        lines.append(f"{name:<10} {found!r} ({beside})")
    return lines


def _described(run: Run, found: _Document) -> str:
    source = max(index for index, first in enumerate(run.plan.document_offsets) if first <= found.number)
    document = found.number - run.plan.document_offsets[source]
    what = f"pair {document // 2}" if run.plan.paired else f"document {document} from token {found.start}"
    words: Sequence[int] = run.datasets[source].tokens(document)[found.start : found.start + _WORDS].tolist()
    return f"loss {found.loss:.4f} in {run.plan.sources[source].path}, {what}: {run.tokenizer.decode(words)!r}"
