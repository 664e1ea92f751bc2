"""Micro-batches: a global step of the plan, packed, dealt to ranks and turned into tensors.

A pair whose sides have a prompt in common is laid out as [prompt | chosen | rejected] where the plan shares prompts: the prompt
is computed once, and both sides continue it. The prompt's last token predicts another token on each side, so it is the first
place of each side and not the last of the prompt.

On a GPU packs are padded to few different lengths, so that its memory is not cut into pieces of ever new sizes.

T places of a pack, D documents of a pack (or parts of those longer than the context), N places that are trained on (padded).
"""

import itertools
import queue
import threading
import warnings
from collections.abc import Generator, Sequence
from dataclasses import dataclass, fields, replace

import numpy as np
import torch
from torch import Tensor

from engine.data.dataset import TokenDataset
from engine.data.packing import deal, pack_best_fit
from engine.data.plan import Plan, SegmentTable, Units
from kernels.attention.work import AttentionWork, attended_pairs, attention_work

ROWS = 128
# Rows of a tile of a matrix product: up to a whole number of them, more rows cost nothing.
_TILE = 128
# A pack that lacks less than this share of its room is padded to all of it.
_NEARLY_FULL = 1 / 16


@dataclass(frozen=True)
class Batch:
    """One micro-batch: a packed row of documents.

    tokens_T: int64, the input tokens. labels_T: int64, the token to predict at each place (already shifted; at the end of
    a part of a longer document, the first token of the next). weight_T: float32, 0 where not trained on.
    positions_T: int32, from 0 in each document (part); a side of a pair continues from the prompt that it shares.
    document_T: int64, which of the D each place belongs to; a shared prompt belongs to the chosen side.
    rows_N: int32, the places of non-zero weight, padded with -1 to a multiple of 128 (at least 128).
    attention: who sees whom, for all layers; its `segments` are the bounds of documents (or of a shared prompt and its sides).
    document_D: int64, the document's id, unique over the sources of the run: they follow one another. document_start_D: int64,
    the part's first place in its document. document_length_D: int64, tokens of the whole document. pair_D: int64, preferences
    only: index of the pair within its source; 2i and 2i + 1 of the D are the chosen and the rejected side of one pair.

    Padding stands behind the documents: places of weight 0 that see nothing and that nothing sees.

    A rank for which a step has nothing gets one filler document (a filler pair for preferences): one token of weight 0,
    document and pair -1.
    """

    tokens_T: Tensor
    labels_T: Tensor
    weight_T: Tensor
    positions_T: Tensor
    document_T: Tensor
    rows_N: Tensor
    attention: AttentionWork
    document_D: Tensor
    document_start_D: Tensor
    document_length_D: Tensor
    pair_D: Tensor | None

    @property
    def tokens(self) -> int:
        """Places of the micro-batch, a filler's and padding not counted."""
        return self.attention.segments[-1][1] if int(self.document_D[0]) >= 0 else 0

    @property
    def tokens_saved(self) -> int:
        """Places more that the same documents would take if they shared none."""
        segments = self.attention.segments
        prefixes = [prefix for _, _, prefix in segments if prefix >= 0]
        lengths = [end - start for start, end, _ in segments]
        return sum(lengths[prefix] for prefix in prefixes) - sum(lengths[prefix] for prefix in set(prefixes))

    def to(self, device: torch.device | str) -> "Batch":
        """The batch on a device; to CUDA through pinned memory and without waiting."""
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


@dataclass(frozen=True)
class Step:
    """One rank's part of a global step: `batches` are its own, the numbers count all ranks.

    weight: the sum of the weights of all places. tokens: places that are computed. tokens_saved: those that sharing saves.
    trained: places that reach the head. attended: pairs (query, key) that attention computes.
    """

    index: int
    batches: list[Batch]
    weight: float
    pairs: int
    tokens: int
    tokens_saved: int
    trained: int
    attended: int


def make_step(
    plan: Plan, step: int, *, window: int | None, pack_tokens: int, rank: int = 0, ranks: int = 1, pad: bool = False
) -> Step:
    """Pack a global step best-fit into micro-batches of at most `pack_tokens` places, and take this rank's.

    window: the model's attention window in places, None for unbounded. pad: to few different lengths, for a GPU. Every rank
    gets the same number of micro-batches.
    Raises: ValueError where the plan's longest segment (both sides of its longest pair) exceeds `pack_tokens`.
    """
    assert 0 <= rank < ranks
    if pack_tokens < plan.longest_unit:
        what = "both sides of the longest pair" if plan.paired else "the longest segment"
        raise ValueError(
            f"pack_tokens = {pack_tokens} is below {what} ({plan.longest_unit} places): raise it, or lower "
            f"context_length = {plan.context_length}"
        )
    units = plan.units(step)
    sizes = units.sizes.tolist()
    packs = deal(pack_best_fit(sizes, pack_tokens), sizes, ranks)[rank]
    room = pack_tokens if pad else 0
    batches = [_collate(plan.datasets, plan.document_offsets, units, pack, window, room) for pack in packs]
    # Each trained place weighs 1.
    trained = _trained(plan.datasets, units)
    return Step(
        step, batches, float(trained), len(sizes) if plan.paired else 0, sum(sizes), int(units.shared.sum()), trained,
        _attended(units, window),
    )  # fmt: skip


def padded_places(places: int, pack_tokens: int) -> int:
    """Places that a pack of so many is padded to: whole tiles, and all of its room where it is nearly full."""
    tiles, room = (-(-count // _TILE) * _TILE for count in (places, pack_tokens))
    return room if tiles >= (1 - _NEARLY_FULL) * room else tiles


def step_stream(
    plan: Plan, start: int, *, window: int | None, pack_tokens: int, rank: int = 0, ranks: int = 1, prefetch: int = 2,
    device: torch.device | None = None,
) -> Generator[Step, None, None]:  # fmt: skip
    """`make_step` for steps `start` to the plan's last, `prefetch` steps ahead in a background thread.

    device: where a CUDA device, steps come on it, padded: pinned and copied by that thread, on a stream of its own, while
    others compute, so that neither the host nor the device waits for them.
    An exception of the thread is raised by the iterator; closing the iterator ends the thread.
    """
    ready: queue.Queue[_Prefetched | BaseException | None] = queue.Queue(maxsize=max(1, prefetch))
    closed = threading.Event()

    def put(item: _Prefetched | BaseException | None) -> None:
        # A plain put could wait for ever on a consumer that has left.
        while not closed.is_set():
            try:
                ready.put(item, timeout=0.1)
                return
            except queue.Full:
                pass

    def work() -> None:
        try:
            copies = torch.cuda.Stream(device) if device is not None and device.type == "cuda" else None
            for step in range(start, plan.steps):
                if closed.is_set():
                    return
                for dataset in plan.datasets:
                    dataset.check_unchanged()
                made = make_step(
                    plan, step, window=window, pack_tokens=pack_tokens, rank=rank, ranks=ranks, pad=copies is not None
                )  # fmt: skip
                put(_Prefetched(made) if copies is None else _copied(made, copies))
            put(None)
        except BaseException as error:
            put(error)

    thread = threading.Thread(target=work, name="step_stream", daemon=True)
    thread.start()
    try:
        while (item := ready.get()) is not None:
            if isinstance(item, BaseException):
                raise item
            yield item.arrived()
    finally:
        closed.set()
        thread.join()


@dataclass(frozen=True)
class _Prefetched:
    """A step, and what says that it is on the device."""

    step: Step
    copied: torch.cuda.Event | None = None

    def arrived(self) -> Step:
        """The step for the current stream, which waits for it where it has to."""
        if self.copied is not None:
            stream = torch.cuda.current_stream(self.step.batches[0].tokens_T.device)
            stream.wait_event(self.copied)
            for batch in self.step.batches:
                # Their memory is the copying stream's, which would take it back while this one still computes with it.
                for part in (getattr(batch, field.name) for field in fields(batch)):
                    if part is not None:
                        (part.work if isinstance(part, AttentionWork) else part).record_stream(stream)
        return self.step


def _copied(step: Step, stream: torch.cuda.Stream) -> _Prefetched:
    """Copy a step to the stream's device, without waiting for it."""
    with torch.cuda.device(stream.device), torch.cuda.stream(stream):
        on_device = replace(step, batches=[batch.to(stream.device) for batch in step.batches])
        copied = torch.cuda.Event()
        copied.record(stream)
    return _Prefetched(on_device, copied)


def evaluation_batches(
    dataset: TokenDataset,
    *,
    window: int | None,
    context_length: int,
    pack_tokens: int,
    limit: int | None = None,
    share_prompts: bool = False,
) -> list[Batch]:
    """Every document (pair) of a dataset, or the first `limit`, in order, once; packed next-fit, so that order holds.

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
    if not len(table):
        raise ValueError(f"{dataset.folder}: nothing to evaluate on within context_length = {context_length}: raise it")
    numbers, unit = np.arange(len(table)), 2 if table.paired else 1
    document, start, places = table.locate(numbers)
    if limit is not None:
        keep = document < limit * unit
        document, start, places = document[keep], start[keep], places[keep]
    shared = table.shared(numbers[: len(document) // unit])
    units = Units(np.zeros_like(document), document, start, places, shared, unit)
    packs: list[list[int]] = []
    room = 0
    for unit, size in enumerate(units.sizes.tolist()):
        if size > pack_tokens:
            raise ValueError(f"pack_tokens = {pack_tokens} is below a segment or pair of {size} places: raise it")
        if size > room:
            packs.append([])
            room = pack_tokens
        packs[-1].append(unit)
        room -= size
    return [_collate([dataset], [0], units, pack, window) for pack in packs]


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
    """Pairs (query, key) of a step; those within a shared prompt are computed for one side only."""
    return attended_pairs(units.places.tolist(), window) - attended_pairs(units.shared.tolist(), window)


def _collate(
    datasets: Sequence[TokenDataset], offsets: Sequence[int], units: Units, pack: list[int], window: int | None, room: int = 0
) -> Batch:
    """The tensors of one pack, padded as one with so much room (0: not at all); of a filler where it is empty."""
    if not pack:
        return _filler(units.unit, window)
    chosen = np.array(pack, dtype=np.int64)
    documents = (units.unit * chosen[:, None] + np.arange(units.unit)).reshape(-1)
    source, document = units.source[documents], units.document[documents]
    start, places = units.start[documents], units.places[documents]
    segments = _segments(places.tolist(), units.shared[chosen].tolist())
    bounds = [0, *itertools.accumulate(count for _, _, count, _ in segments)]
    total = padded_places(bounds[-1], room) if room else bounds[-1]
    # Padding is what stays as it is here.
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
        attention=attention_work(bounds, window, prefixes=[prefix for *_, prefix in segments], tokens=total),
        document_D=torch.from_numpy(np.asarray(offsets, dtype=np.int64)[source] + document),
        document_start_D=torch.from_numpy(start),
        document_length_D=torch.tensor(lengths),
        pair_D=torch.from_numpy(document // 2) if units.unit == 2 else None,
    )


def _segments(places: Sequence[int], shared: Sequence[int]) -> list[tuple[int, int, int, int]]:
    """(index of its document, places of that before it, places, index of the segment that it continues or -1) of each segment.

    Args: places of each document; shared: places that the documents of each unit begin with, 0 for none.
    """
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
    rows = np.full(max(1, -(-len(trained) // ROWS)) * ROWS, -1, dtype=np.int32)
    rows[: len(trained)] = trained
    return torch.from_numpy(rows)


def share_of(batches: Sequence[Batch], rank: int, ranks: int) -> list[Batch]:
    """A rank's micro-batches of a list that all ranks have: as many for each rank, with fillers, as collectives must match."""
    mine = list(batches[rank::ranks])
    missing = -(-len(batches) // ranks) - len(mine)
    first = batches[0]
    return mine + [_filler(1 if first.pair_D is None else 2, first.attention.window)] * missing


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
        document_D=nothing,
        document_start_D=zeros,
        document_length_D=torch.ones_like(zeros),
        pair_D=nothing if documents == 2 else None,
    )
