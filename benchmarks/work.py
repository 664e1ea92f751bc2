"""The figures of a training step, and their meaning.

tokens: places of the documents; padding never counts. A document of L tokens has L - 1 places, as its last token is only
predicted. The shared prompt of a pair counts on both sides though we compute it once, so that the figures of all candidates are
of the same data. MFU: the operations that a step needs (attended pairs exactly, a shared prompt once, the head only where
something is predicted, no look-up) over the device's published peak. HFU: the same with everything that the backward pass
recomputes. FP8 operations count half. of_ceiling: the needed operations over what a large product reached in the same process.
"""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks.measure import spread
from engine.data.batch import Batch, Step
from engine.estimate.flops import recomputed_flops, step_flops
from kernels.attention.work import pairs_of
from kernels.logit_budget import default_budget, plan, sum_of_parts
from model.config import MistralConfig

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Work:
    """The work of a step."""

    places: int
    documents: int
    trained: int  # places with a weight in the loss
    flops: int  # operations needed
    again: int  # operations that the backward pass recomputes

    @classmethod
    def total(cls, works: Sequence["Work"]) -> "Work":
        names = ("places", "documents", "trained", "flops", "again")
        return cls(*(sum(getattr(work, name) for work in works) for name in names))


def work_of(
    config: MistralConfig,
    step: Step,  # of one rank
    recompute: str = "",  # mode; empty counts no recomputed blocks
    *,
    device: torch.device = CPU,
    dtype: torch.dtype = torch.float32,  # of the parameters
    fp8_layers: int = 0,
) -> Work:
    documents = sum(len(batch.document_B) for batch in step.batches)
    budget, kernels = default_budget(device), device.type == "cuda"
    again = sum(head_again(config, batch, dtype.itemsize, budget, kernels=kernels) for batch in step.batches)
    for batch in step.batches if recompute else []:
        pairs = pairs_of(batch.attention)
        sizes = {"tokens": batch.tokens, "pairs": pairs, "fp8_layers": fp8_layers}
        again += recomputed_flops(config, recompute=recompute, **sizes)  # type: ignore[arg-type]
    return Work(step.tokens + step.tokens_saved, documents, step.trained, step_flops(config, step, fp8_layers), again)


def head_again(config: MistralConfig, batch: Batch, itemsize: int, budget_bytes: int, *, kernels: bool = False) -> int:
    """Operations of logits that the backward pass recomputes because they exceed the head's budget.

    Only preference tuning has them: for a weighted sum of log-probabilities, gradients are made together with the logits.
    """
    rows = len(batch.rows_N)
    total = sum_of_parts(config.vocab_size * config.hidden_size, itemsize, kernels=kernels)
    if batch.pair_B is None or plan(rows, config.vocab_size, itemsize, budget_bytes, sum_bytes=total).keep:
        return 0
    return 2 * rows * config.hidden_size * config.vocab_size


def speed(
    works: Sequence[Work],  # of all steps, the warm-up's first
    rounds: Sequence[Mapping[str, Any]],  # a worker's answers
    *,
    first: int,  # step that the first round starts with
    steps: int,  # of a round
    peak: float | None = None,  # operations a second that shares are taken of; None where unknown
    ceiling: float | None = None,
) -> dict[str, Any]:
    """Tokens and operations a second, as spreads over the rounds.

    A trainer that composes its own steps counts tokens and documents; its places cost the average operations of a place.
    """
    found: dict[str, list[float]] = {name: [] for name in ("tokens", "seconds", "cpu_seconds", "flops", "executed")}
    every = Work.total(works)
    for turn, answer in enumerate(rounds):
        work = Work.total(works[first + turn * steps : first + (turn + 1) * steps])
        places, share = work.places, 1.0
        if all(answer["counts"]):
            places = sum(counts["tokens"] - counts["documents"] for counts in answer["counts"])
            work, share = every, places / every.places
        found["tokens"].append(places)
        found["flops"].append(share * work.flops)
        found["executed"].append(share * (work.flops + work.again))
        found["seconds"].append(sum(answer["seconds"]))
        found["cpu_seconds"].append(answer["cpu_seconds"])

    def ratio(top: str, bottom: str = "seconds", unit: float | None = 1.0) -> dict[str, Any] | None:
        if unit is None:
            return None
        return spread([value / by / unit for value, by in zip(found[top], found[bottom], strict=True)])

    return {
        "tokens": round(sum(found["tokens"]) / len(rounds) / steps),
        "step_seconds": spread([*itertools.chain.from_iterable(answer["seconds"] for answer in rounds)]),
        "tokens_per_second": ratio("tokens"),
        "tokens_per_cpu_second": ratio("tokens", "cpu_seconds"),
        "mfu": ratio("flops", unit=peak),
        "hfu": ratio("executed", unit=peak),
        "of_ceiling": ratio("flops", unit=ceiling),
    }


def with_reference(figures: Mapping[str, Any], reference: Mapping[str, float], works: Sequence[Work]) -> dict[str, Any]:
    """Rates that charge each token its part of the reference's log-probabilities, computed once before training."""
    places = sum(work.places for work in works)
    found = {}
    for name, spent in (("tokens_per_second", "seconds"), ("tokens_per_cpu_second", "cpu_seconds")):
        extra = reference[spent] / places
        found[f"{name}_with_reference"] = {
            key: value if key == "samples" else 1 / (1 / value + extra) for key, value in figures[name].items()
        }
    return found
