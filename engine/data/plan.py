"""The plan of a run: the segments (or pairs) of every global step.

The plan is a pure function of (datasets, seed, settings). Ranks, packs and micro-batches divide a step afterwards (`batch`), so
the data order does not depend on them, and a run resumes from its step number alone.

Places: a document of L tokens has L - 1 places; place i holds token i and predicts token i + 1.
Segments: a document longer than the context is cut into segments of `context_length` places, shuffled like documents.
Units: a unit is a segment, or both sides of a pair.
Epochs: a source is the concatenation of its epochs, each shuffled by (seed, source, epoch).
Mixing: a unit's virtual time is (places of its source before the unit) / (rate of its source). Units run by virtual time.
Steps: step k holds the units that begin in [k * step_size, (k + 1) * step_size) of the merged order. Where the epochs end with
less than half a step, the step before takes what is left: a few tokens would otherwise move the weights like a whole step.

Nothing else here depends on the number of steps, so a run can be made longer and its first steps stay the same. A step is found
when it is asked for: the unit at a place of the merged order lies within a few units of that virtual time in each source.
"""

import copy
import hashlib
import json
import math
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from engine.data.dataset import TokenDataset
from engine.data.order import SourceOrder
from engine.data.packing import pack_best_fit
from engine.settings.sections import Source

# Part of the fingerprint. Raise both whenever equal inputs give another order: a run must not resume on another order than it
# began with.
ORDER = 1
# The order of a plan whose last step took what was left. Runs that began before there was such a step go on with ORDER.
MERGED_ORDER = 2


@dataclass(frozen=True, eq=False)
class Units:
    """The segments of a step, in the order of the plan; for preferences, rows 2i and 2i + 1 are one pair, chosen first."""

    source: np.ndarray  # int64 [segments]: index of the source
    document: np.ndarray  # int64 [segments]: index in the source's dataset
    start: np.ndarray  # int64 [segments]: first place of the segment in its document
    places: np.ndarray  # int64 [segments]: length of the segment
    shared: np.ndarray  # int64 [segments / unit]: places at the start of a pair that are computed once for both sides
    unit: int  # segments of a unit: 1, or 2 for preferences

    @property
    def sizes(self) -> np.ndarray:
        """Places to compute of each unit: int64 [segments / unit]."""
        return self.places.reshape(-1, self.unit).sum(axis=1) - self.shared


class SegmentTable:
    """The usable units (segments or pairs) of one dataset, numbered, in arrays: millions cost little.

    sizes: uint32 [units], places to compute of each unit; with share_prompts, a pair's shared places count once.
    skipped: pairs longer than the context, or segments of conversations without a trained place.
    """

    def __init__(self, dataset: TokenDataset, context_length: int, share_prompts: bool = False):
        self.dataset = dataset
        self.paired = dataset.kind == "preferences"
        self.context_length = context_length
        self.skipped = 0
        self._used: np.ndarray | None = None
        self._shared: np.ndarray | None = None
        self._first: np.ndarray | None = None
        places = dataset.lengths - 1
        if self.paired:
            sides = places.reshape(-1, 2)
            fits = sides.max(axis=1, initial=0) <= context_length
            self.skipped = int((~fits).sum())
            if self.skipped:
                self._used = np.flatnonzero(fits)
            self.sizes = sides.sum(axis=1)[fits].astype(np.uint32)
            if share_prompts:
                self._shared = dataset.shared_places[fits].astype(np.uint32)
                self.sizes -= self._shared
            return
        if places.max(initial=0) <= context_length:
            # Each document is one segment.
            self.sizes = places.astype(np.uint32)
            return
        counts = -(-places // context_length)
        self._first = np.zeros(len(places) + 1, dtype=np.int64)
        np.cumsum(counts, out=self._first[1:])
        sizes = np.full(int(self._first[-1]), context_length, dtype=np.uint32)
        sizes[self._first[1:] - 1] = places - (counts - 1) * context_length
        if dataset.kind == "conversations":
            # A segment without a trained place would cost a forward pass and change nothing.
            useful = np.ones(len(sizes), dtype=bool)
            for document in np.flatnonzero(counts > 1).tolist():
                predicted = dataset.trained(document, 1)
                edges = np.arange(0, len(predicted), context_length)
                useful[self._first[document] : self._first[document + 1]] = np.logical_or.reduceat(predicted, edges)
            self.skipped = int((~useful).sum())
            if self.skipped:
                self._used = np.flatnonzero(useful)
                sizes = sizes[useful]
        self.sizes = sizes

    def __len__(self) -> int:
        return len(self.sizes)

    @property
    def total(self) -> int:
        """Pairs of the dataset, or places of all its segments."""
        return len(self) if self.paired else int(self.sizes.sum())

    def locate(self, units: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(document, start, places) of each segment of the given units (indices into `sizes`): int64 [segments]."""
        numbers = units.astype(np.int64) if self._used is None else self._used[units]
        if self.paired:
            document = np.stack((2 * numbers, 2 * numbers + 1), axis=1).reshape(-1)
            return document, np.zeros_like(document), self.dataset.lengths[document] - 1
        places = self.sizes[units].astype(np.int64)
        if self._first is None:
            return numbers, np.zeros_like(numbers), places
        document = np.searchsorted(self._first, numbers, side="right") - 1
        return document, (numbers - self._first[document]) * self.context_length, places

    def shared(self, units: np.ndarray) -> np.ndarray:
        """Places that the two sides of each given unit share, 0 without shared prompts: int64 [units]."""
        return np.zeros(len(units), dtype=np.int64) if self._shared is None else self._shared[units].astype(np.int64)

    @property
    def shared_total(self) -> np.ndarray | None:
        """`shared` of all units; None without shared prompts."""
        return self._shared


class Plan:
    """Global steps over a mixture of prepared datasets.

    Args:
        datasets: one opened dataset for each of `sources`, all of one kind (text and conversations mix) and one tokenizer.
        sources: their shares or passes.
        seed: keys the shuffles.
        context_length: places of the longest segment. Pairs with a longer side are left out and counted in `skipped`.
        step_size: places of a global step; pairs for preferences.
        steps, epochs: length of the run. Shares need `steps`. Otherwise `steps` alone repeats the data as needed, `epochs`
            alone ends with the data, and both together end at `steps`.
        share_prompts: compute the common prompt of a pair once. The order does not depend on it.

    Attributes:
        steps: int.
        merged: bool; the last step also holds what was left behind it, less than half a step.
        fingerprint: hex; equal for equal data order, whatever the number of steps.
        paired: bool; preferences.
        skipped: of each source, `SegmentTable.skipped`.
        longest_unit: places to compute of the longest segment or pair.
        document_offsets: of each source, the id of its first document.

    Raises: ValueError naming the setting or the source, and the remedy.
    """

    def __init__(
        self,
        datasets: list[TokenDataset],
        sources: list[Source],
        *,
        seed: int,
        context_length: int,
        step_size: int,
        steps: int | None,
        epochs: float | None,
        share_prompts: bool = False,
    ):
        _check_mixture(datasets, sources, context_length, step_size, steps, epochs)
        self.datasets, self.sources = datasets, list(sources)
        self.seed, self.context_length, self.step_size = seed, context_length, step_size
        self.paired = datasets[0].kind == "preferences"
        self.share_prompts = share_prompts and self.paired
        self.tables = [SegmentTable(dataset, context_length, self.share_prompts) for dataset in datasets]
        self.skipped = [table.skipped for table in self.tables]
        self.longest_unit = self._longest_unit()
        self.document_offsets = np.cumsum([0] + [len(dataset) for dataset in datasets])[:-1].tolist()

        passes = [1.0 if source.passes is None else source.passes for source in self.sources]
        rates = [
            part * table.total if source.share is None else source.share
            for source, table, part in zip(self.sources, self.tables, passes, strict=True)
        ]
        self._rates = [rate / sum(rates) for rate in rates]
        self._epoch_size = sum(part * table.total for table, part in zip(self.tables, passes, strict=True))
        self._orders = [
            SourceOrder(None if self.paired else table.sizes, len(table), seed, source)
            for source, table in enumerate(self.tables)
        ]
        self._set_length(steps, epochs)

    def _set_length(self, steps: int | None, epochs: float | None) -> None:
        if epochs is None:
            assert steps is not None
            targets = [math.ceil(rate * steps * self.step_size) for rate in self._rates]
        else:
            passes = [epochs if source.passes is None else source.passes * epochs for source in self.sources]
            targets = [max(1, round(part * table.total)) for table, part in zip(self.tables, passes, strict=True)]
        self.passes = [target / table.total for target, table in zip(targets, self.tables, strict=True)]
        self._ends = None
        self.merged = False
        if epochs is not None:
            self._ends = [order.first_at(target) for order, target in zip(self._orders, targets, strict=True)]
            planned, left = self._planned(self._ends)
            if steps is None:
                # A number of steps that the user names is kept as it is.
                self.merged = planned > 1 and 2 * left < self.step_size
                steps = planned - self.merged
            elif steps > planned:
                raise ValueError(
                    f"steps = {steps}, but {epochs:g} epochs of this data make {planned} steps of {self.step_size}: "
                    "lower steps, raise epochs, or leave epochs out to repeat the data as needed"
                )
        assert steps is not None
        self.steps = steps

    def of_length(self, steps: int | None, epochs: float | None) -> "Plan":
        """The plan of the same order with another length."""
        plan = copy.copy(self)
        plan._set_length(steps, epochs)
        return plan

    def continues(self, fingerprint: str) -> bool:
        """Whether a plan of this fingerprint has the same order, up to its own end."""
        return fingerprint in (self._fingerprint(ORDER), self._fingerprint(MERGED_ORDER))

    def seam(self, longer: "Plan") -> tuple[int, int]:
        """(places or pairs that a longer plan of the same order passes over after this one's last step, those it repeats)."""
        ends, firsts = self._bounds(self.steps - 1)[1], longer._bounds(self.steps)[0]
        gaps = [order.start(to) - order.start(end) for order, end, to in zip(self._orders, ends, firsts, strict=True)]
        return sum(gap for gap in gaps if gap > 0), -sum(gap for gap in gaps if gap < 0)

    @property
    def fingerprint(self) -> str:
        return self._fingerprint(MERGED_ORDER if self.merged else ORDER)

    def _fingerprint(self, order: int) -> str:
        described = {
            "order": order,
            "datasets": [dataset.fingerprint for dataset in self.datasets],
            "rates": self._rates,
            "seed": self.seed,
            "context_length": self.context_length,
            "step_size": self.step_size,
        }
        return hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest()

    @property
    def mean_step_places(self) -> float:
        """Places to compute of a mean step: `step_size`; for preferences, that many pairs of mean length."""
        if not self.paired:
            return float(self.step_size)
        return self.step_size * sum(
            rate * float(table.sizes.mean()) for rate, table in zip(self._rates, self.tables, strict=True)
        )

    def epoch(self, done: int) -> float:
        """Passes over the data after `done` steps: their places (pairs) over those of all sources, each times its `passes`."""
        places = done * self.step_size
        if self._ends is not None and done == self.steps:
            # The data may end before the step is full, or a little after it.
            places = sum(order.start(stop) for order, stop in zip(self._orders, self._bounds(done - 1)[1], strict=True))
        return places / self._epoch_size

    def unmerged(self) -> "Plan":
        """The plan with a last step of its own for what is left, however little: the order of runs that began that way."""
        plan = copy.copy(self)
        plan.merged, plan.steps = False, self.steps + self.merged
        return plan

    def _planned(self, ends: list[int]) -> tuple[int, int]:
        """Steps until the sources end, and the places (pairs) of the last of them."""
        total = sum(order.start(end) for order, end in zip(self._orders, ends, strict=True))
        begins = [order.start(end - 1) / rate for order, end, rate in zip(self._orders, ends, self._rates, strict=True)]
        # Of units that begin at once, the later source's comes last.
        last = max(range(len(begins)), key=lambda source: (begins[source], source))
        (size,) = self._orders[last].counted(self._orders[last].units(ends[last] - 1, ends[last])).tolist()
        steps = (total - size) // self.step_size + 1
        cut = self._cuts((steps - 1) * self.step_size, None)[0]
        return steps, total - sum(order.start(unit) for order, unit in zip(self._orders, cut, strict=True))

    def _longest_unit(self) -> int:
        """Places to compute of the longest unit. Raises: ValueError for a source without units, or a step below a segment."""
        for source, table in zip(self.sources, self.tables, strict=True):
            if not len(table):
                raise ValueError(
                    f"source '{source.path}': nothing to train on within context_length = {self.context_length} "
                    f"({table.skipped} {'pairs too long' if self.paired else 'segments untrained'}): raise it"
                )
        longest = max(int(table.sizes.max()) for table in self.tables)
        if not self.paired and longest > self.step_size:
            raise ValueError(
                f"step_size = {self.step_size} is below the longest segment ({longest} places): "
                f"raise step_size or lower context_length = {self.context_length}"
            )
        return longest

    def units(self, step: int) -> Units:
        """The segments of global step `step`, source by source, each in the source's order."""
        if not 0 <= step < self.steps:
            raise IndexError(f"step {step} of {self.steps}")
        parts = []
        firsts, stops = self._bounds(step)
        for source, table in enumerate(self.tables):
            chosen = self._orders[source].units(firsts[source], stops[source])
            document, start, places = table.locate(chosen)
            parts.append((np.full(len(document), source, dtype=np.int64), document, start, places, table.shared(chosen)))
        columns = (np.concatenate(column) for column in zip(*parts, strict=True))
        source_of, document, start, places, shared = columns
        return Units(source_of, document, start, places, shared, unit=2 if self.paired else 1)

    def summary(self, pack_tokens: int, *, sample_steps: int = 8) -> dict[str, Any]:
        """The data of the run: per source its documents, tokens, share and passes; steps; utilisation.

        tokens: places to compute. tokens_saved: places that shared prompts save. utilisation: places / (packs * pack_tokens)
        over up to `sample_steps` evenly spread steps.
        """
        sources = []
        _, stops = self._bounds(self.steps - 1)
        ended = list(zip(self._orders, self.tables, stops, strict=True))
        totals = [order.sum_of(table.sizes, stop) for order, table, stop in ended]
        measures = stops if self.paired else totals
        for index, (source, table) in enumerate(zip(self.sources, self.tables, strict=True)):
            sources.append(
                {
                    **asdict(source),
                    "documents": len(table.dataset),
                    "segments": len(table),
                    "skipped": table.skipped,
                    "tokens": totals[index],
                    "fraction": measures[index] / sum(measures),
                    "seen": measures[index] / table.total,
                }
            )
        saved = sum(order.sum_of(t.shared_total, stop) for order, t, stop in ended if t.shared_total is not None)
        places = packs = 0
        for step in sorted({round(at) for at in np.linspace(0, self.steps - 1, min(sample_steps, self.steps)).tolist()}):
            sizes = self.units(step).sizes.tolist()
            places += sum(sizes)
            packs += len(pack_best_fit(sizes, pack_tokens))
        return {
            "sources": sources,
            "steps": self.steps,
            "step_size": self.step_size,
            "last_step": self._size(self.steps - 1),
            "tokens": sum(totals),
            "tokens_saved": saved,
            "pack_tokens": pack_tokens,
            "utilisation": places / (packs * pack_tokens),
        }

    def describe(self, pack_tokens: int) -> list[str]:
        """`summary` as lines for a console."""
        summary = self.summary(pack_tokens)
        unit = "pairs" if self.paired else "documents"
        lines = []
        for source in summary["sources"]:
            documents = source["documents"] // (2 if self.paired else 1)
            line = (
                f"{source['path']}: {documents:,} {unit}, {source['tokens']:,} tokens, "
                f"{source['fraction']:.1%} of the run, seen {source['seen']:.2f} times"
            )
            if source["skipped"]:
                line += f"; {source['skipped']:,} " + (
                    f"pairs longer than context_length = {self.context_length} left out"
                    if self.paired
                    else "segments without a trained place left out"
                )
            lines.append(line)
        saved = f" ({summary['tokens_saved']:,} saved by shared prompts)" if self.share_prompts else ""
        lines.append(
            f"{summary['steps']:,} steps of {self.step_size:,} {'pairs' if self.paired else 'tokens'}, "
            f"{summary['tokens']:,} tokens{saved}; packs of {pack_tokens:,} are {summary['utilisation']:.1%} full"
        )
        last = f"the last step holds {summary['last_step']:,} {'pairs' if self.paired else 'tokens'}"
        if self.merged:
            lines.append(f"{last}: what was left behind it is less than half a step, and joined it")
        elif summary["last_step"] <= self.step_size - self._slack:
            lines.append(f"{last}, and updates the weights like a whole one")
        return lines

    def _size(self, step: int) -> int:
        """Places (pairs) of a step."""
        firsts, stops = (
            sum(order.start(unit) for order, unit in zip(self._orders, cut, strict=True)) for cut in self._bounds(step)
        )
        return stops - firsts

    @property
    def _slack(self) -> int:
        """The merged place of a unit exceeds its virtual time by less than this."""
        return sum(order.longest for order in self._orders)

    def _bounds(self, step: int) -> tuple[list[int], list[int]]:
        """Of each source, the first unit of a step, and the first unit after it."""
        low = step * self.step_size
        return self._cuts(low, None if self.merged and step == self.steps - 1 else low + self.step_size)

    def _cuts(self, low: int, high: int | None) -> tuple[list[int], list[int]]:
        """Of each source, its first unit at or after the places `low` and `high` of the merged order; None: the end.

        A unit's place is the sum of what each source has before it. So it is at least the unit's virtual time (but for the
        rounding of the sources' ends), and exceeds it by less than one unit of each source: only units of virtual times around
        `low` to `high` need sorting.
        """
        earliest = max(0, low - self._slack - 1)
        firsts, times, sizes = [], [], []
        for source, (order, rate) in enumerate(zip(self._orders, self._rates, strict=True)):
            end = None if self._ends is None else self._ends[source]
            if high is None:
                assert end is not None
                stop = end
            else:
                stop = order.first_at(math.ceil((high + len(self._orders) + 1) * rate)) + 2
                stop = stop if end is None else min(stop, end)
            first = min(stop, max(0, order.first_at(math.floor(earliest * rate)) - 2))
            size = order.counted(order.units(first, stop))
            time = (order.start(first) + np.cumsum(size) - size) / rate
            skipped = int(np.searchsorted(time, earliest, side="left"))
            firsts.append(first + skipped)
            times.append(time[skipped:])
            sizes.append(size[skipped:])
        owner = np.repeat(np.arange(len(times)), [len(time) for time in times])
        # Stable: of equal times, the earlier source comes first.
        merged = np.argsort(np.concatenate(times), kind="stable")
        size = np.concatenate(sizes)[merged]
        before = sum(order.start(first) for order, first in zip(self._orders, firsts, strict=True))
        place = before + np.cumsum(size) - size
        found = []
        for bound in (low, high):
            taken = len(place) if bound is None else int(np.searchsorted(place, bound, side="left"))
            counts = np.bincount(owner[merged[:taken]], minlength=len(times)).tolist()
            found.append([first + count for first, count in zip(firsts, counts, strict=True)])
        return found[0], found[1]


def _check_mixture(
    datasets: list[TokenDataset],
    sources: list[Source],
    context_length: int,
    step_size: int,
    steps: int | None,
    epochs: float | None,
) -> None:
    if not sources or len(datasets) != len(sources):
        raise ValueError(f"{len(sources)} sources and {len(datasets)} datasets: name at least one source, one dataset each")
    for name, value in (("context_length", context_length), ("step_size", step_size), ("steps", steps)):
        if value is not None and value < 1:
            raise ValueError(f"{name} = {value}: must be at least 1")
    if epochs is not None and not (math.isfinite(epochs) and epochs > 0):
        raise ValueError(f"epochs = {epochs}: must be above 0")
    shared = [source.path for source in sources if source.share is not None]
    if shared and len(shared) < len(sources):
        other = next(source.path for source in sources if source.share is None)
        raise ValueError(f"source '{shared[0]}' has a share and '{other}' has none: give every source a share, or none")
    if shared and steps is None:
        raise ValueError("a mixture by share needs steps: the sources repeat as often as their shares ask for")
    if shared and epochs is not None:
        raise ValueError(f"epochs = {epochs:g} has no effect on a mixture by share: leave it out, or use passes")
    if steps is None and epochs is None:
        raise ValueError("neither steps nor epochs is given: set one")
    for dataset, source in zip(datasets, sources, strict=True):
        if (dataset.kind == "preferences") != (datasets[0].kind == "preferences"):
            raise ValueError(
                f"source '{source.path}' holds {dataset.kind} and '{sources[0].path}' {datasets[0].kind}: "
                "preferences do not mix with other kinds"
            )
        if dataset.tokenizer_fingerprint != datasets[0].tokenizer_fingerprint:
            raise ValueError(
                f"source '{source.path}' was prepared with another tokenizer than '{sources[0].path}': "
                "prepare both with the same"
            )
        if not len(dataset):
            raise ValueError(f"source '{source.path}': no documents: leave it out")
