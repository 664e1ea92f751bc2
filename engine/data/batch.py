"""Micro-batches: a global step of the plan, packed, dealt to ranks and turned into tensors.

With shared prompts, a pair of preferences is laid out as [prompt | chosen | rejected]: the prompt is computed once and both
sides continue it. The prompt's last token predicts another token on each side, so it is the first place of each side instead of
the prompt's last.

On a GPU, packs are padded to few different lengths, so that the allocator's memory does not fragment.

Shapes: T places of a micro-batch, B documents in it (parts, for documents longer than the context), N rows that reach the head.
"""

import itertools
import warnings
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from typing import overload

import numpy as np
import torch
from torch import Tensor

from engine.data.dataset import TokenDataset
from engine.data.packing import deal, pack_best_fit
from engine.data.plan import Plan, SegmentTable, Units
from kernels import padded_to_tiles
from kernels.attention.work import AttentionWork, attended_pairs, attention_work

# A pack with less than this share of its tokens free is padded to its full size.
_NEARLY_FULL = 1 / 16


@dataclass(frozen=True)
class Packing:
    """How a run cuts its steps into micro-batches; the same for every step."""

    window: int | None
    """The model's attention window in tokens, None for unbounded."""
    pack_tokens: int
    """Most tokens of a micro-batch."""
    rank: int = 0
    """This rank, of `ranks`."""
    ranks: int = 1
    pad: bool = False
    """Pad packs to few different lengths, for a GPU."""


@dataclass(frozen=True, eq=False)
class Batch:
    """One micro-batch: a packed row of documents.

    Padding stands behind the documents: places of weight 0 that attend to nothing and that nothing attends to.
    A rank without work in a step gets a filler: one document (a pair, for preferences) of one token with weight 0.
    """

    tokens_T: Tensor  # int64: the input tokens
    labels_T: Tensor  # int64: the token to predict at each place; a part of a document ends with the next part's first token
    weight_T: Tensor  # float32: the weight of each label's loss, 0 where it is not trained on
    positions_T: Tensor  # int32: counted from 0 in each document (part); a side of a pair continues its shared prompt
    document_T: Tensor  # int64: index 0 .. B - 1 of each place's document; a shared prompt belongs to the chosen side
    rows_N: Tensor  # int32: the places of non-zero weight, padded with -1 to whole tiles (at least one)
    attention: AttentionWork  # work lists for all layers; `segments` are the bounds of documents, shared prompts and sides
    document_B: Tensor  # int64: id of each document, counted through all sources of the run; -1 for a filler
    document_start_B: Tensor  # int64: first place of the part in its document
    document_length_B: Tensor  # int64: tokens of the whole document
    pair_B: Tensor | None  # int64, preferences only: the pair's index in its source (-1: filler); chosen at even places of B

    @property
    def tokens(self) -> int:
        """Places of documents; fillers and padding do not count."""
        return self.attention.segments[-1][1] if int(self.document_B[0]) >= 0 else 0

    @property
    def tokens_saved(self) -> int:
        """Places that shared prompts save."""
        segments = self.attention.segments
        prefixes = [prefix for _, _, prefix in segments if prefix >= 0]
        lengths = [end - start for start, end, _ in segments]
        return sum(lengths[prefix] for prefix in prefixes) - sum(lengths[prefix] for prefix in set(prefixes))

    def to(self, device: torch.device | str) -> "Batch":
        """The batch on a device. Copies to CUDA go through pinned memory and do not block the host."""
        device = torch.device(device)

        def move(part: Tensor | AttentionWork | None) -> Tensor | AttentionWork | None:
            if part is None or device.type != "cuda":
                return None if part is None else part.to(device)
            on_device = part.is_cuda if isinstance(part, Tensor) else part.work.is_cuda
            if on_device:
                return part.to(device, non_blocking=True)
            pinned = part.pin_memory() if isinstance(part, Tensor) else part.pinned()
            return pinned.to(device, non_blocking=True)

        return Batch(**{field.name: move(getattr(self, field.name)) for field in fields(self)})  # type: ignore[arg-type]


@dataclass(frozen=True, eq=False)
class Step:
    """One rank's part of a global step. The batches are this rank's; all numbers count the whole step over all ranks."""

    index: int  # from 0
    batches: Sequence[Batch]
    weight: float  # sum of all places' weights
    pairs: int  # of preferences, else 0
    tokens: int  # places computed
    tokens_saved: int  # places that shared prompts save
    trained: int  # places that reach the head
    attended: int  # (query, key) pairs that attention computes


def make_step(plan: Plan, step: int, packing: Packing) -> Step:
    """Pack a global step best-fit into micro-batches of at most `pack_tokens` tokens, and take this rank's.

    Every rank gets the same number of micro-batches.
    Raises: ValueError where the plan's longest segment (both sides of its longest pair) exceeds `pack_tokens`.
    """
    assert 0 <= packing.rank < packing.ranks
    if packing.pack_tokens < plan.longest_unit:
        what = "both sides of the longest pair" if plan.paired else "the longest segment"
        raise ValueError(
            f"pack_tokens = {packing.pack_tokens} is below {what} ({plan.longest_unit} places): raise it, or lower "
            f"context_length = {plan.context_length}"
        )
    units = plan.units(step)
    sizes = units.sizes.tolist()
    packs = deal(pack_best_fit(sizes, packing.pack_tokens), sizes, packing.ranks)[packing.rank]
    trained = _trained(plan.datasets, units)
    return Step(
        index=step,
        batches=[_collate(plan.datasets, plan.document_offsets, units, pack, packing) for pack in packs],
        weight=float(trained),  # each trained place weighs 1
        pairs=len(sizes) if plan.paired else 0,
        tokens=sum(sizes),
        tokens_saved=int(units.shared.sum()),
        trained=trained,
        attended=_attended(units, packing.window),
    )


class EvaluationBatches(Sequence[Batch]):
    """A whole dataset in unpadded micro-batches for all ranks, each collated when it is asked for. A slice stays as lazy.

    A million pairs are a few megabytes here. Collated, their tensors would be 41 bytes a place.
    """

    def __init__(
        self,
        table: SegmentTable,
        bounds: np.ndarray,  # int64 [micro-batches + 1]: first unit of each micro-batch
        packing: Packing,
        chosen: range | None = None,  # the micro-batches of a slice; default: all
    ):
        self._table, self._bounds = table, bounds
        self._packing = Packing(packing.window, packing.pack_tokens)
        self._chosen = range(len(bounds) - 1) if chosen is None else chosen

    def __len__(self) -> int:
        return len(self._chosen)

    @overload
    def __getitem__(self, index: int) -> Batch: ...

    @overload
    def __getitem__(self, index: slice) -> "EvaluationBatches": ...

    def __getitem__(self, index: int | slice) -> "Batch | EvaluationBatches":
        if isinstance(index, slice):
            return EvaluationBatches(self._table, self._bounds, self._packing, self._chosen[index])
        units = self._units(self._chosen[index])
        return _collate([self._table.dataset], [0], units, list(range(len(units.sizes))), self._packing)

    def parts(self) -> Iterator[Units]:
        """The units of each micro-batch."""
        return map(self._units, self._chosen)

    @property
    def tokens(self) -> int:
        """Places to compute."""
        return sum(int(self._table.sizes[self._bounds[pack] : self._bounds[pack + 1]].sum()) for pack in self._chosen)

    def as_step(self) -> Step:
        """All micro-batches as one step, so that an objective's values are means over the whole set. Nothing is collated."""
        saved = trained = attended = pairs = 0
        for units in self.parts():
            saved += int(units.shared.sum())
            trained += _trained([self._table.dataset], units)
            attended += _attended(units, self._packing.window)
            pairs += len(units.sizes) if units.unit == 2 else 0
        return Step(
            index=0,
            batches=self,
            weight=float(trained),
            pairs=pairs,
            tokens=self.tokens,
            tokens_saved=saved,
            trained=trained,
            attended=attended,
        )

    def _units(self, pack: int) -> Units:
        numbers = np.arange(self._bounds[pack], self._bounds[pack + 1])
        document, start, places = self._table.locate(numbers)
        unit = 2 if self._table.paired else 1
        return Units(np.zeros_like(document), document, start, places, self._table.shared(numbers), unit)


def evaluation_batches(
    dataset: TokenDataset,
    packing: Packing,  # its window and pack_tokens
    context_length: int,
    *,
    limit: int | None = None,
    share_prompts: bool = False,
) -> EvaluationBatches:
    """All documents (pairs) of a dataset, or the first `limit`, once and in order, packed next-fit and unpadded, for all ranks.

    Long documents are split, and prompts of pairs shared, as in training. Pairs with a side longer than the context are left
    out with a warning.
    Raises: ValueError where nothing is left, `limit` is below 1, or a segment (pair) exceeds `pack_tokens`.
    """
    if limit is not None and limit < 1:
        raise ValueError(f"limit = {limit}: must be at least 1")
    table = SegmentTable(dataset, context_length, share_prompts)
    if table.paired and table.skipped:
        warnings.warn(
            f"{dataset.folder}: {table.skipped} of {len(dataset) // 2} pairs are longer than context_length = "
            f"{context_length} and left out of the evaluation",
            stacklevel=2,
        )
    count = len(table)
    if limit is not None:
        # Units are in the order of their documents.
        unit = 2 if table.paired else 1
        count = bisect_left(range(count), limit * unit, key=lambda number: int(table.locate(np.array([number]))[0][0]))
    if not count:
        raise ValueError(f"{dataset.folder}: nothing to evaluate on within context_length = {context_length}: raise it")
    longest = int(table.sizes[:count].max())
    if longest > packing.pack_tokens:
        raise ValueError(f"pack_tokens = {packing.pack_tokens} is below a segment or pair of {longest} places: raise it")
    ends = np.cumsum(table.sizes[:count], dtype=np.int64)
    bounds = [0]
    while bounds[-1] < count:
        before = int(ends[bounds[-1] - 1]) if bounds[-1] else 0
        bounds.append(int(np.searchsorted(ends, before + packing.pack_tokens, side="right")))
    return EvaluationBatches(table, np.array(bounds, dtype=np.int64), packing)


def share_of(batches: Sequence[Batch], rank: int, ranks: int) -> Iterator[Batch]:
    """A rank's micro-batches of a sequence that all ranks have, filled up to the same number, as collectives must match."""
    mine = batches[rank::ranks]
    yield from mine
    if len(mine) < -(-len(batches) // ranks):
        first = batches[0]
        yield _filler(1 if first.pair_B is None else 2, first.attention.window)


def padded_places(places: int, pack_tokens: int) -> int:
    """Length that a pack is padded to: whole tiles, and the full `pack_tokens` where the pack is nearly full."""
    tiles, room = (padded_to_tiles(count) for count in (places, pack_tokens))
    return room if tiles >= (1 - _NEARLY_FULL) * room else tiles


def _trained(datasets: Sequence[TokenDataset], units: Units) -> int:
    """Places of a step that are trained on."""
    total = 0
    for source, document, start, places in zip(
        *(column.tolist() for column in (units.source, units.document, units.start, units.places)), strict=True
    ):
        dataset = datasets[source]
        if dataset.kind == "text":
            total += places
        else:
            total += int(dataset.trained(document, start + 1, start + places + 1).sum())
    return total


def _attended(units: Units, window: int | None) -> int:
    """(query, key) pairs of a step. A shared prompt attends to itself once, for one side."""
    return attended_pairs(units.places.tolist(), window) - attended_pairs(units.shared.tolist(), window)


def _collate(
    datasets: Sequence[TokenDataset],
    offsets: Sequence[int],  # id of each dataset's first document
    units: Units,
    pack: list[int],  # units of this micro-batch; empty: a filler
    packing: Packing,
) -> Batch:
    """The tensors of one micro-batch."""
    if not pack:
        return _filler(units.unit, packing.window)
    chosen = np.array(pack, dtype=np.int64)
    documents = (units.unit * chosen[:, None] + np.arange(units.unit)).reshape(-1)
    source, document = units.source[documents], units.document[documents]
    start, places = units.start[documents], units.places[documents]
    segments = _segments(places.tolist(), units.shared[chosen].tolist())
    bounds = [0, *itertools.accumulate(count for _, _, count, _ in segments)]
    total = padded_places(bounds[-1], packing.pack_tokens) if packing.pad else bounds[-1]
    # The segments below overwrite all but the padding.
    tokens, labels = np.zeros(total, dtype=np.int64), np.zeros(total, dtype=np.int64)
    weight, positions = np.zeros(total, dtype=np.float32), np.zeros(total, dtype=np.int32)
    document_of = np.full(total, len(documents) - 1)
    for (index, before, count, _), begin, end in zip(segments, bounds, bounds[1:], strict=False):
        dataset, number = datasets[source[index]], int(document[index])
        at, first = slice(begin, end), int(start[index]) + before
        ids = dataset.tokens(number)[first : first + count + 1]
        tokens[at], labels[at] = ids[:-1], ids[1:]
        weight[at] = dataset.trained(number, first + 1, first + count + 1)
        positions[at] = np.arange(before, before + count)
        document_of[at] = index
    lengths = [int(datasets[s].lengths[d]) for s, d in zip(source.tolist(), document.tolist(), strict=True)]
    return Batch(
        tokens_T=torch.from_numpy(tokens),
        labels_T=torch.from_numpy(labels),
        weight_T=torch.from_numpy(weight),
        positions_T=torch.from_numpy(positions),
        document_T=torch.from_numpy(document_of),
        rows_N=_rows(weight),
        attention=attention_work(bounds, packing.window, prefixes=[prefix for *_, prefix in segments], tokens=total),
        document_B=torch.from_numpy(np.asarray(offsets, dtype=np.int64)[source] + document),
        document_start_B=torch.from_numpy(start),
        document_length_B=torch.tensor(lengths),
        pair_B=torch.from_numpy(document // 2) if units.unit == 2 else None,
    )


def _segments(
    places: Sequence[int],  # of each document
    shared: Sequence[int],  # places that the documents of each unit have in common, 0 for none
) -> list[tuple[int, int, int, int]]:
    """The segments of a pack: (index of the document, its places before the segment, places of the segment, index of the
    segment that this one continues or -1)."""
    segments: list[tuple[int, int, int, int]] = []
    width = len(places) // len(shared)
    for unit, common in enumerate(shared):
        prefix = -1
        if common:
            prefix = len(segments)
            segments.append((width * unit, 0, common, -1))
        for index in range(width * unit, width * (unit + 1)):
            segments.append((index, common, places[index] - common, prefix))
    return segments


def _rows(weight: np.ndarray) -> Tensor:
    trained = np.flatnonzero(weight)
    rows = np.full(padded_to_tiles(max(1, len(trained))), -1, dtype=np.int32)
    rows[: len(trained)] = trained
    return torch.from_numpy(rows)


def _filler(documents: int, window: int | None) -> Batch:
    zeros, nothing = torch.zeros(documents, dtype=torch.int64), torch.full((documents,), -1, dtype=torch.int64)
    return Batch(
        tokens_T=zeros,
        labels_T=zeros,
        weight_T=torch.zeros(documents),
        positions_T=zeros.int(),
        document_T=torch.arange(documents),
        rows_N=_rows(np.zeros(documents)),
        attention=attention_work(range(documents + 1), window),
        document_B=nothing,
        document_start_B=zeros,
        document_length_B=torch.ones_like(zeros),
        pair_B=nothing if documents == 2 else None,
    )
