"""Micro-batches: a global step of the plan, packed, dealt to ranks and turned into tensors.

T tokens of a pack, D segments of a pack, N places that are trained on (padded).
"""

import queue
import threading
import warnings
from collections.abc import Generator, Sequence
from dataclasses import dataclass, fields

import numpy as np
import torch
from torch import Tensor

from engine.data.dataset import TokenDataset
from engine.data.packing import deal, pack_best_fit
from engine.data.plan import Plan, SegmentTable, Units

ROWS = 128


@dataclass(frozen=True)
class Batch:
    """One micro-batch: a packed row of segments.

    tokens_T: int64, the input tokens. labels_T: int64, the token to predict at each place (already shifted; at the end of
    a segment of a longer document, the first token of the next). weight_T: float32, 0 where not trained on.
    positions_T: int32, from 0 in each segment. cu_docs: int32 [D + 1], bounds of the segments, [0, ..., T].
    rows_N: int32, the places of non-zero weight, padded with -1 to a multiple of 128 (at least 128).
    document_D: int64, an id of each segment's document, unique over the sources of the run. document_start_D: int64,
    the segment's first place in its document. document_length_D: int64, tokens of the whole document. source_D: int64,
    index of the source. pair_D: int64, preferences only: index of the pair within its source; segments 2i and 2i + 1
    are the chosen and the rejected side of one pair.

    A rank for which a step has nothing gets one filler segment (a filler pair for preferences): one token of weight 0,
    document, source and pair -1.
    """

    tokens_T: Tensor
    labels_T: Tensor
    weight_T: Tensor
    positions_T: Tensor
    cu_docs: Tensor
    rows_N: Tensor
    document_D: Tensor
    document_start_D: Tensor
    document_length_D: Tensor
    source_D: Tensor
    pair_D: Tensor | None

    @property
    def tokens(self) -> int:
        """Places of the micro-batch, a filler's not counted."""
        return len(self.tokens_T) if int(self.document_D[0]) >= 0 else 0

    def to(self, device: torch.device | str) -> "Batch":
        """The batch on a device; to CUDA through pinned memory and without waiting."""
        device = torch.device(device)

        def move(tensor: Tensor | None) -> Tensor | None:
            if tensor is None or device.type != "cuda":
                return None if tensor is None else tensor.to(device)
            return (tensor if tensor.is_cuda else tensor.pin_memory()).to(device, non_blocking=True)

        return Batch(**{field.name: move(getattr(self, field.name)) for field in fields(self)})  # type: ignore[arg-type]


@dataclass(frozen=True)
class Step:
    """One rank's part of a global step: `batches` are its own, `weight`, `pairs` and `tokens` count all ranks."""

    index: int
    batches: list[Batch]
    weight: float
    pairs: int
    tokens: int


def make_step(plan: Plan, step: int, *, pack_tokens: int, rank: int = 0, ranks: int = 1) -> Step:
    """Pack a global step best-fit into micro-batches of at most `pack_tokens` places, and take this rank's.

    Every rank gets the same number of micro-batches. Raises: ValueError where the plan's longest segment (both sides of
    its longest pair) exceeds `pack_tokens`.
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
    batches = [_collate(plan.datasets, plan.document_offsets, units, pack) for pack in packs]
    weight = _total_weight(plan.datasets, units)
    return Step(step, batches, weight, len(sizes) if plan.paired else 0, int(units.places.sum()))


def step_stream(
    plan: Plan, start: int, *, pack_tokens: int, rank: int = 0, ranks: int = 1, prefetch: int = 2
) -> Generator[Step, None, None]:
    """`make_step` for steps `start` to the plan's last, `prefetch` steps ahead in a background thread.

    An exception of the thread is raised by the iterator; closing the iterator ends the thread.
    """
    ready: queue.Queue[Step | BaseException | None] = queue.Queue(maxsize=max(1, prefetch))
    closed = threading.Event()

    def put(item: Step | BaseException | None) -> None:
        # A plain put could wait for ever on a consumer that has left.
        while not closed.is_set():
            try:
                ready.put(item, timeout=0.1)
                return
            except queue.Full:
                pass

    def work() -> None:
        try:
            for step in range(start, plan.steps):
                if closed.is_set():
                    return
                put(make_step(plan, step, pack_tokens=pack_tokens, rank=rank, ranks=ranks))
            put(None)
        except BaseException as error:
            put(error)

    thread = threading.Thread(target=work, name="step_stream", daemon=True)
    thread.start()
    try:
        while (item := ready.get()) is not None:
            if isinstance(item, BaseException):
                raise item
            yield item
    finally:
        closed.set()
        thread.join()


def evaluation_batches(
    dataset: TokenDataset, *, context_length: int, pack_tokens: int, limit: int | None = None
) -> list[Batch]:
    """Every document (pair) of a dataset, or the first `limit`, in order, once; packed next-fit, so that order holds.

    Long documents are split as in training. Pairs with a side longer than the context are left out with a warning.
    Raises: ValueError where nothing is left, `limit` is below 1, or a segment (pair) exceeds `pack_tokens`.
    """
    if limit is not None and limit < 1:
        raise ValueError(f"limit = {limit}: must be at least 1")
    table = SegmentTable(dataset, context_length)
    if table.paired and table.skipped:
        warnings.warn(
            f"{dataset.folder}: {table.skipped} of {len(dataset) // 2} pairs are longer than context_length = "
            f"{context_length} and left out of the evaluation",
            stacklevel=2,
        )
    if not len(table):
        raise ValueError(f"{dataset.folder}: nothing to evaluate on within context_length = {context_length}: raise it")
    document, start, places = table.locate(np.arange(len(table)))
    if limit is not None:
        keep = document < limit * (2 if table.paired else 1)
        document, start, places = document[keep], start[keep], places[keep]
    units = Units(np.zeros_like(document), document, start, places, unit=2 if table.paired else 1)
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
    return [_collate([dataset], [0], units, pack) for pack in packs]


def _total_weight(datasets: Sequence[TokenDataset], units: Units) -> float:
    """The sum of the weights of all places of a step."""
    total = 0
    for source, document, start, places in zip(
        *(column.tolist() for column in (units.source, units.document, units.start, units.places)), strict=True
    ):
        dataset = datasets[source]
        if dataset.kind == "text":
            total += places
        else:
            total += int(dataset.trained(document, start + 1, start + places + 1).sum())
    return float(total)


def _collate(datasets: Sequence[TokenDataset], offsets: Sequence[int], units: Units, pack: list[int]) -> Batch:
    """The tensors of one pack; of a filler where it is empty."""
    paired = units.unit == 2
    if not pack:
        return _filler(units.unit)
    segments = np.array(pack, dtype=np.int64)
    if paired:
        segments = np.stack((2 * segments, 2 * segments + 1), axis=1).reshape(-1)
    source, document = units.source[segments], units.document[segments]
    start, places = units.start[segments], units.places[segments]
    cu_docs = np.zeros(len(segments) + 1, dtype=np.int32)
    np.cumsum(places, out=cu_docs[1:])
    total = int(cu_docs[-1])
    tokens, labels = np.empty(total, dtype=np.int64), np.empty(total, dtype=np.int64)
    weight, positions = np.empty(total, dtype=np.float32), np.empty(total, dtype=np.int32)
    lengths = np.empty(len(segments), dtype=np.int64)
    for i, (s, d, first, count) in enumerate(
        zip(source.tolist(), document.tolist(), start.tolist(), places.tolist(), strict=True)
    ):
        at = slice(int(cu_docs[i]), int(cu_docs[i + 1]))
        ids = datasets[s].tokens(d)[first : first + count + 1]
        tokens[at], labels[at] = ids[:-1], ids[1:]
        weight[at] = datasets[s].trained(d, first + 1, first + count + 1)
        positions[at] = np.arange(count)
        lengths[i] = datasets[s].lengths[d]
    return Batch(
        tokens_T=torch.from_numpy(tokens),
        labels_T=torch.from_numpy(labels),
        weight_T=torch.from_numpy(weight),
        positions_T=torch.from_numpy(positions),
        cu_docs=torch.from_numpy(cu_docs),
        rows_N=_rows(weight),
        document_D=torch.from_numpy(np.asarray(offsets, dtype=np.int64)[source] + document),
        document_start_D=torch.from_numpy(start),
        document_length_D=torch.from_numpy(lengths),
        source_D=torch.from_numpy(source),
        pair_D=torch.from_numpy(document // 2) if paired else None,
    )


def _rows(weight: np.ndarray) -> Tensor:
    trained = np.flatnonzero(weight)
    rows = np.full(max(1, -(-len(trained) // ROWS)) * ROWS, -1, dtype=np.int32)
    rows[: len(trained)] = trained
    return torch.from_numpy(rows)


def _filler(segments: int) -> Batch:
    zeros, nothing = torch.zeros(segments, dtype=torch.int64), torch.full((segments,), -1, dtype=torch.int64)
    return Batch(
        tokens_T=zeros,
        labels_T=zeros,
        weight_T=torch.zeros(segments),
        positions_T=zeros.int(),
        cu_docs=torch.arange(segments + 1, dtype=torch.int32),
        rows_N=_rows(np.zeros(segments)),
        document_D=nothing,
        document_start_D=zeros,
        document_length_D=torch.ones_like(zeros),
        source_D=nothing,
        pair_D=nothing if segments == 2 else None,
    )
