"""What the figures of a training step mean.

tokens: places of the documents; padding never counts. A document of L tokens has L - 1 of them, as its last token is only
predicted. A prompt that a pair shares counts on both sides though we compute it once, so that all figures are of the same data.
MFU: operations that the step needs (attended pairs exactly, a shared prompt once, the head only where something is predicted,
no look-up) over the device's published peak. HFU: the same with what is computed again in the backward pass. of_ceiling: the
needed operations over what a large matrix product reached in the same process.
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
from kernels.linear_log_prob import default_budget, plan
from model.config import MistralConfig

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Work:
    """One step: places, documents, places that are trained on, operations needed, operations computed again."""

    places: int
    documents: int
    trained: int
    flops: int
    again: int


def work_of(
    config: MistralConfig, step: Step, recompute: str = "", *, device: torch.device = CPU, dtype: torch.dtype = torch.float32
) -> Work:
    """The work of a step of one rank on a device, of parameters of a dtype."""
    documents = sum(len(batch.document_B) for batch in step.batches)
    again = sum(head_again(config, batch, dtype.itemsize, default_budget(device)) for batch in step.batches)
    for batch in step.batches if recompute else []:
        pairs = pairs_of(batch.attention)
        again += recomputed_flops(config, tokens=batch.tokens, pairs=pairs, recompute=recompute)  # type: ignore[arg-type]
    return Work(step.tokens + step.tokens_saved, documents, step.trained, step_flops(config, step), again)


def head_again(config: MistralConfig, batch: Batch, itemsize: int, budget_bytes: int) -> int:
    """Operations of logits that are computed again in the backward pass, as what they leave does not fit the head's budget.

    Only preference tuning has such: the gradients of a weighted sum of log-probs are made with the logits.
    """
    rows = len(batch.rows_N)
    if batch.pair_B is None or plan(rows, config.vocab_size, itemsize, budget_bytes).keep:
        return 0
    return 2 * rows * config.hidden_size * config.vocab_size


def speed(
    works: Sequence[Work],
    rounds: Sequence[Mapping[str, Any]],
    *,
    first: int,
    steps: int,
    whole_documents: bool = False,
    peak: float | None = None,
    ceiling: float | None = None,
) -> dict[str, Any]:
    """What rounds of `steps` steps each, of which the first is step `first`, say of speed.

    A trainer that composes its steps itself counts them; its operations are then those of an average place.
    whole_documents: count each document's last token as well. peak, ceiling: operations a second; None where unknown, as are
    the shares of it then.
    """
    found: dict[str, list[float]] = {name: [] for name in ("tokens", "seconds", "cpu_seconds", "flops", "executed")}
    every = _total(works)
    for turn, answer in enumerate(rounds):
        work = _total(works[first + turn * steps : first + (turn + 1) * steps])
        places, documents, share = work.places, work.documents, 1.0
        if all(answer["counts"]):
            documents = sum(counts["documents"] for counts in answer["counts"])
            places = sum(counts["tokens"] for counts in answer["counts"]) - documents
            work, share = every, places / every.places
        found["tokens"].append(places + whole_documents * documents)
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


def _total(works: Sequence[Work]) -> Work:
    return Work(*(sum(getattr(work, name) for work in works) for name in ("places", "documents", "trained", "flops", "again")))
