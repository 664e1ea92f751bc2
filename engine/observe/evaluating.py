"""One evaluation of a run: held-out losses, scores of benchmark tasks, answers to prompts. It leaves no trace in training."""

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch

from engine.distributed.ranks import Ranks
from engine.distributed.sharding import gathered
from engine.inference.samples import Samples
from engine.objectives.heldout import Evaluation, evaluate
from model.mistral import Mistral


@dataclass(frozen=True)
class Signs:
    """How an evaluation and the loop hear of each other."""

    alive: Callable[[], None]  # called often, as a sign of life
    stopping: Callable[[], bool]  # asked often whether to give up; all ranks ask equally often
    say: Callable[[str], None]  # prints a line from rank 0


class Scorer(Protocol):
    """Benchmark tasks, which a recipe hands to the loop."""

    def __call__(self, model: Mistral, signs: Signs) -> dict[str, float] | None:
        """{"scores/TASK/METRIC": score} on every rank; all ranks call it, each with whole weights. None where it gave up."""


@dataclass(frozen=True, eq=False)
class Extras:
    """What an evaluation does beside the held-out losses."""

    samples: Samples | None = None
    scores: Scorer | None = None

    def __bool__(self) -> bool:
        return self.samples is not None or self.scores is not None


def examine(
    model: Mistral,
    ranks: Ranks,
    evaluations: Sequence[Evaluation],
    extras: Extras,
    signs: Signs,
) -> tuple[dict[str, float], list[dict[str, str]]] | None:
    """(held-out values and scores by name, samples), the same on every rank; None where a signal asked to stop meanwhile."""
    values = evaluate(model, evaluations, ranks, signs.alive, signs.stopping) if evaluations else {}
    if values is None or not extras:
        return None if values is None else (values, [])
    samples: list[dict[str, str]] | None = []
    scores: dict[str, float] | None = {}
    with _unchanged(model), gathered(model):
        if extras.samples is not None:
            samples = extras.samples.answer(model, signs.alive, signs.stopping)
        if extras.scores is not None and samples is not None:
            scores = extras.scores(model, signs)
    if samples is None or scores is None:
        return None
    return values | scores, samples


@contextmanager
def _unchanged(model: Mistral) -> Iterator[None]:
    """Evaluation mode inside. Afterwards the mode and every global random state are as before: libraries may draw numbers."""
    training, python, numpy = model.training, random.getstate(), np.random.get_state()
    model.eval()
    try:
        with torch.random.fork_rng():
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
        model.train(training)
