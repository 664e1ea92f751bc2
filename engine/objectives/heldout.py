"""Evaluation on held-out sets: the objective's values over a whole prepared folder, without noise and without gradients."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from engine.data.batch import Step, share_of
from engine.distributed.ranks import Ranks
from engine.distributed.sharding import reshard
from engine.objectives import Objective
from model.mistral import Mistral


@dataclass(frozen=True, eq=False)
class Evaluation:
    """A held-out set: its name in the metrics, its objective, and the whole set as one step."""

    name: str
    objective: Objective
    step: Step


@torch.no_grad()
def evaluate(
    model: Mistral,
    evaluations: Sequence[Evaluation],
    ranks: Ranks | None = None,
    alive: Callable[[], None] = lambda: None,
    stopping: Callable[[], bool] = lambda: False,
) -> dict[str, float] | None:
    """The objective's values on each held-out set, over all ranks: {"eval/<name>/<value>": ...}.

    Args: alive: called before each micro-batch, as a sign of life. stopping: asked before each micro-batch whether to give up.
    Returns: None where it gave up.
    """
    model.eval()
    device = model.lm_head.weight.device
    results: dict[str, float] = {}
    for evaluation in evaluations:
        totals: dict[str, Tensor] = {}
        batches = evaluation.step.batches
        for batch in share_of(batches, ranks.rank, ranks.ranks) if ranks else batches:
            alive()
            if stopping():
                reshard(model)
                model.train()
                return None
            for name, value in evaluation.objective(model, batch.to(device), evaluation.step).items():
                totals[name] = totals.get(name, 0) + value.double()
        summed = ranks.sum(totals) if ranks else totals
        results.update({f"eval/{evaluation.name}/{name}": float(value) for name, value in summed.items()})
    reshard(model)
    model.train()
    return results
