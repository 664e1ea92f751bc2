"""The figures of a training step, as benchmarks/README.md defines them."""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.measure import spread
from engine.data.batch import Step
from engine.estimate.flops import step_flops
from model.config import MistralConfig


@dataclass(frozen=True)
class Work:
    """The work of a step."""

    places: int
    documents: int
    flops: int  # operations needed

    @classmethod
    def total(cls, works: Sequence["Work"]) -> "Work":
        names = ("places", "documents", "flops")
        return cls(*(sum(getattr(work, name) for work in works) for name in names))


def work_of(
    config: MistralConfig,
    step: Step,  # of one rank
    fp8_layers: int = 0,
) -> Work:
    documents = sum(len(batch.document_B) for batch in step.batches)
    return Work(step.tokens + step.tokens_saved, documents, step_flops(config, step, fp8_layers))


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
    found: dict[str, list[float]] = {name: [] for name in ("tokens", "seconds", "cpu_seconds", "flops")}
    every = Work.total(works)
    for turn, answer in enumerate(rounds):
        work = Work.total(works[first + turn * steps : first + (turn + 1) * steps])
        places, share = work.places, 1.0
        if all(answer["counts"]):
            places = sum(counts["tokens"] - counts["documents"] for counts in answer["counts"])
            work, share = every, places / every.places
        found["tokens"].append(places)
        found["flops"].append(share * work.flops)
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
