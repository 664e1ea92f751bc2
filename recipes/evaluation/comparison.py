"""Scores of an evaluation with their intervals, and two models compared on the same items."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from recipes.evaluation.statistics import (
    Interval,
    bootstrap,
    bootstrap_mean,
    detectable_difference,
    holm,
    mcnemar,
    sign_flips,
    wilson,
)


@dataclass(frozen=True)
class Items:
    """What a metric says of each item of a task, or of a group's tasks together.

    keys: task, number and hash of each item. values: of the metric, before aggregation. clusters: None for independent items.
    """

    keys: list[tuple[str, int, str]]
    values: list[Any]
    clusters: list[Any] | None

    @property
    def numeric(self) -> bool:
        return all(isinstance(value, bool | int | float | np.number) for value in self.values)

    @property
    def yes_or_no(self) -> bool:
        return self.numeric and all(value in (0, 1) for value in self.values)


@dataclass(frozen=True)
class Row:
    """A score of the report. method: of the interval."""

    name: str
    shots: int | None
    metric: str
    filter: str
    score: float
    interval: Interval
    method: str
    items: int
    clusters: int | None
    primary: bool


@dataclass(frozen=True)
class Compared:
    """Two models on the same items of a task. difference: ours minus the other's. smallest: see `detectable_difference`."""

    name: str
    metric: str
    ours: float
    other: float
    interval: Interval
    p_value: float
    adjusted: float
    test: str
    smallest: float
    items: int

    @property
    def difference(self) -> float:
        return self.ours - self.other


def items_of(
    samples: Mapping[str, Sequence[Mapping[str, Any]]],  # by task
    metric: str,
    filter: str,
    clusters: Callable[[str, Sequence[Mapping[str, Any]]], list[Any] | None],
) -> Items:
    """The items of tasks together. Items of several tasks are clustered by task."""
    keys: list[tuple[str, int, str]] = []
    values: list[Any] = []
    found: list[Any] = []
    clustered = len(samples) > 1
    for task, own in samples.items():
        chosen = [sample for sample in own if sample["filter"] == filter and metric in sample]
        named = clusters(task, chosen)
        clustered = clustered or named is not None
        keys += [(task, sample["doc_id"], sample["doc_hash"]) for sample in chosen]
        values += [sample[metric] for sample in chosen]
        found += [task] * len(chosen) if named is None or len(samples) > 1 else named
    return Items(keys, values, found if clustered else None)


def interval_of(items: Items, aggregate: Callable[[Sequence[Any]], float] | None) -> tuple[Interval, str]:
    """The 95 % interval of a score, and how it was made.

    Args: aggregate: of the items' values; None for their mean.
    """
    if aggregate is not None:
        chosen = items.values
        return bootstrap(len(chosen), lambda drawn: aggregate([chosen[at] for at in drawn]), items.clusters), "bootstrap"
    if items.clusters is not None and items.yes_or_no and len(set(items.values)) == 1:
        # Drawn again, items that are all right or all wrong would have an interval of no width.
        count = len(set(items.clusters))
        return wilson(count if items.values[0] else 0, count), "Wilson, by cluster"
    if items.clusters is not None:
        return bootstrap_mean(np.asarray(items.values, dtype=float), items.clusters), "bootstrap by cluster"
    if items.yes_or_no:
        return wilson(int(sum(items.values)), len(items.values)), "Wilson"
    return bootstrap_mean(np.asarray(items.values, dtype=float)), "bootstrap"


def compared(ours: Mapping[str, tuple[str, Items]], others: Mapping[str, Items], alpha: float = 0.05) -> list[Compared]:
    """Each task of ours that the other has with the same items; p-values adjusted over these by Holm.

    Args: ours: (metric, items) by task or group. others: items of the same metric.
    """
    pairs = {
        name: (metric, items, others[name])
        for name, (metric, items) in ours.items()
        if name in others and items.numeric and items.keys == others[name].keys and items.keys
    }
    raw = []
    for name, (metric, one, two) in pairs.items():
        first, second = (np.asarray(items.values, dtype=float) for items in (one, two))
        # McNemar's test takes items as independent; of items in clusters, whole clusters change sides.
        exact = one.yes_or_no and two.yes_or_no and one.clusters is None
        p_value = mcnemar(first == 1, second == 1) if exact else sign_flips(first - second, one.clusters)
        test = "exact McNemar" if exact else "sign flips" if one.clusters is None else "sign flips by cluster"
        smallest = detectable_difference(first - second, one.clusters, alpha=alpha / len(pairs))
        raw.append((name, metric, first, second, one.clusters, p_value, test, smallest))
    adjusted = holm([entry[5] for entry in raw])
    return [
        Compared(
            name=name,
            metric=metric,
            ours=float(first.mean()),
            other=float(second.mean()),
            interval=bootstrap_mean(first - second, clusters),
            p_value=p_value,
            adjusted=final,
            test=test,
            smallest=smallest,
            items=len(first),
        )
        for (name, metric, first, second, clusters, p_value, test, smallest), final in zip(raw, adjusted, strict=True)
    ]


def samples_file(task: str) -> str:
    """Name of the file with a task's samples."""
    return f"samples_{task.replace('/', '_')}.jsonl"


def read_samples(folder: Path, task: str) -> list[dict[str, Any]] | None:
    """The samples that an evaluation wrote for a task; None where it has none.

    Raises: ValueError naming file and line of what is no sample.
    """
    path = folder / samples_file(task)
    if not path.is_file():
        return None
    samples = []
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            try:
                sample = json.loads(line)
                sample["filter"], sample["doc_id"], sample["doc_hash"]
            except (ValueError, KeyError, TypeError):
                raise ValueError(f"{path}:{number}: not a sample of an evaluation; evaluate that model again") from None
            samples.append(sample)
    return samples
