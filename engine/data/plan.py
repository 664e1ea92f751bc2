"""The plan of a run: the segments (or pairs) of every global step.

The plan is a pure function of (datasets, seed, settings). Ranks, packs and micro-batches divide a step afterwards (`batch`), so
the data order does not depend on them, and a run resumes from its step number alone.

Places: a document of L tokens has L - 1 places; place i holds token i and predicts token i + 1.
Segments: a document longer than the context is cut into segments of `context_length` places, shuffled like documents.
Units: a unit is a segment, or both sides of a pair.
Epochs: a source is the concatenation of its epochs, each shuffled by (seed, source, epoch).
Mixing: a unit's virtual time is (places of its source before the unit) / (rate of its source). Units run by virtual time.
Steps: step k holds the units that begin in [k * step_size, (k + 1) * step_size) of the merged order.

Nothing here depends on the number of steps, so a run can be made longer and its first steps stay the same.
"""

import hashlib
import json
import math
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from engine.data.dataset import TokenDataset
from engine.data.packing import pack_best_fit
from engine.settings.sections import Source

# Raise this whenever equal inputs give another order: a run must not resume on another order than it began with.
ORDER = 1
# Units to sort at once, which bounds the memory.
MERGE_UNITS = 2**20


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

    sizes: int64 [units], places to compute of each unit; with share_prompts, a pair's shared places count once.
    skipped: pairs longer than the context, or segments of conversations without a trained place.
    """

    def __init__(self, dataset: TokenDataset, context_length: int, share_prompts: bool = False):
        self.dataset = dataset
        self.paired = dataset.kind == "preferences"
        self.context_length = context_length
        self.skipped = 0
        self._used: np.ndarray | None = None
        self._shared: np.ndarray | None = None
        places = dataset.lengths - 1
        if self.paired:
            sides = places.reshape(-1, 2)
            fits = sides.max(axis=1, initial=0) <= context_length
            self.skipped = int((~fits).sum())
            if self.skipped:
                self._used = np.flatnonzero(fits)
            self.sizes = sides.sum(axis=1)[fits]
            if share_prompts:
                self._shared = dataset.shared_places[fits]
                self.sizes -= self._shared
            self._first = np.empty(0, dtype=np.int64)
            return
        counts = -(-places // context_length)
        self._first = np.zeros(len(places) + 1, dtype=np.int64)
        np.cumsum(counts, out=self._first[1:])
        sizes = np.full(int(self._first[-1]), context_length, dtype=np.int64)
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

    def counted(self, units: np.ndarray) -> np.ndarray:
        """The part of a step that each given unit takes: 1 for a pair, its places for a segment; int64 [units]."""
        return np.ones(len(units), dtype=np.int64) if self.paired else self.sizes[units]

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
        document = np.searchsorted(self._first, numbers, side="right") - 1
        return document, (numbers - self._first[document]) * self.context_length, self.sizes[units]

    def shared(self, units: np.ndarray) -> np.ndarray:
        """Places that the two sides of each given unit share, 0 without shared prompts: int64 [units]."""
        return np.zeros(len(units), dtype=np.int64) if self._shared is None else self._shared[units]


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
        if epochs is None:
            assert steps is not None
            targets = [math.ceil(rate * steps * step_size) for rate in self._rates]
        else:
            targets = [max(1, round(part * epochs * table.total)) for table, part in zip(self.tables, passes, strict=True)]
        self.passes = [target / table.total for target, table in zip(targets, self.tables, strict=True)]
        self._sequences = [self._sequence(source, target) for source, target in enumerate(targets)]
        counts = self._merge()
        planned = len(counts)
        if steps is not None and steps > planned:
            raise ValueError(
                f"steps = {steps}, but {epochs:g} epochs of this data make {planned} steps of {step_size}: "
                "lower steps, raise epochs, or leave epochs out to repeat the data as needed"
            )
        self.steps = planned if steps is None else steps
        self._cuts = np.zeros((self.steps + 1, len(datasets)), dtype=np.int64)
        np.cumsum(counts[: self.steps], axis=0, out=self._cuts[1:])
        self._sequences = [sequence[: self._cuts[-1, i]] for i, sequence in enumerate(self._sequences)]
        described = {
            "order": ORDER,
            "datasets": [dataset.fingerprint for dataset in datasets],
            "rates": self._rates,
            "seed": seed,
            "context_length": context_length,
            "step_size": step_size,
        }
        self.fingerprint = hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest()

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
        for source, table in enumerate(self.tables):
            chosen = self._sequences[source][self._cuts[step, source] : self._cuts[step + 1, source]]
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
        totals = [int(table.sizes[sequence].sum()) for table, sequence in zip(self.tables, self._sequences, strict=True)]
        measures = [len(sequence) for sequence in self._sequences] if self.paired else totals
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
        saved = sum(int(table.shared(units).sum()) for table, units in zip(self.tables, self._sequences, strict=True))
        places = packs = 0
        for step in sorted({round(at) for at in np.linspace(0, self.steps - 1, min(sample_steps, self.steps)).tolist()}):
            sizes = self.units(step).sizes.tolist()
            places += sum(sizes)
            packs += len(pack_best_fit(sizes, pack_tokens))
        return {
            "sources": sources,
            "steps": self.steps,
            "step_size": self.step_size,
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
        return lines

    def _sequence(self, source: int, target: int) -> np.ndarray:
        """The units of a source in its own order, epoch after epoch, that begin before `target` places (pairs)."""
        table = self.tables[source]
        dtype = np.uint32 if len(table) <= 2**32 else np.uint64
        whole, rest = divmod(target, table.total)
        parts = [_shuffle(len(table), self.seed, source, epoch).astype(dtype) for epoch in range(whole)]
        if rest:
            order = _shuffle(len(table), self.seed, source, whole).astype(dtype)
            parts.append(order[: int(np.searchsorted(_starts(table, order), rest, side="left"))])
        return np.concatenate(parts) if parts else np.empty(0, dtype=dtype)

    def _merge(self) -> np.ndarray:
        """Number of units of each source in each step: int64 [steps, sources].

        The sources are merged in slices of virtual time. The slices bound the memory; the result does not depend on them.
        """
        times, total = [], 0
        for table, sequence, rate in zip(self.tables, self._sequences, self._rates, strict=True):
            starts = _starts(table, sequence)
            total += int(starts[-1] + table.counted(sequence[-1:])[0])
            times.append(starts / rate)
        counts = np.zeros((total // self.step_size + 1, len(times)), dtype=np.int64)
        slices = max(1, sum(map(len, times)) // MERGE_UNITS)
        edges = np.linspace(0, max(float(time[-1]) for time in times), slices + 1)[1:-1]
        cuts = [[0, *np.searchsorted(time, edges).tolist(), len(time)] for time in times]
        before = last = 0
        for part in range(slices):
            bounds = [(cut[part], cut[part + 1]) for cut in cuts]
            owner = np.repeat(np.arange(len(times)), [stop - start for start, stop in bounds])
            if not len(owner):
                continue
            order = np.argsort(np.concatenate([t[a:b] for t, (a, b) in zip(times, bounds, strict=True)]), kind="stable")
            sizes = [table.counted(s[a:b]) for table, s, (a, b) in zip(self.tables, self._sequences, bounds, strict=True)]
            size = np.concatenate(sizes)[order]
            step = (before + np.cumsum(size) - size) // self.step_size
            before += int(size.sum())
            first, last = int(step[0]), int(step[-1])
            for source in range(len(times)):
                counts[first : last + 1, source] += np.bincount(
                    step[owner[order] == source] - first, minlength=last + 1 - first
                )
        return counts[: last + 1]


def _starts(table: SegmentTable, order: np.ndarray) -> np.ndarray:
    """Places (pairs) before each unit of `order`: int64 [units]."""
    counted = table.counted(order)
    return np.cumsum(counted) - counted


def _shuffle(count: int, seed: int, source: int, epoch: int) -> np.ndarray:
    """A permutation of range(count), keyed by (seed, source, epoch).

    Sorts outputs of SplitMix64 (Steele, Lea, Flood 2014). They are distinct for distinct counters and the same in every NumPy
    release; NumPy's own generators do not promise that.
    """
    key = hashlib.sha256(f"{seed} {source} {epoch}".encode()).digest()
    mixed = np.arange(count, dtype=np.uint64)
    mixed *= np.uint64(0x9E3779B97F4A7C15)
    mixed += np.uint64(int.from_bytes(key[:8], "little"))
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        mixed ^= mixed >> np.uint64(shift)
        mixed *= np.uint64(factor)
    mixed ^= mixed >> np.uint64(31)
    return np.argsort(mixed)


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
