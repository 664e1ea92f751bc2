"""Work lists: which places of a packed row attend to which. The CPU makes them once a batch for all layers.

A row is cut into segments: documents, or parts of a document. A segment may continue an earlier segment, its prefix. Its places
then see the prefix's places as if the prefix stood right before them, whatever lies between. A preference pair is therefore
three segments, [prompt | chosen | rejected]: the last two have the prompt as their prefix, and it is computed once.

A tile is up to `tile` neighbouring places of one segment. Each tile of queries has the ranges of keys that any of its places
sees. Each tile of keys has the ranges of queries that may see its places: in each segment from the first query that sees one to
the segment's end, which kernels narrow to the window. A range is (start, end, shift): the distance from place j to place i of
the row is i - j - shift, and i sees j if 0 <= distance < window. Kernels visit ranges, nothing else.

Tiles with much work come first. But a tile of keys never comes before an earlier tile of its text: programs of the backward
pass may wait for the tiles before theirs (`kernels.attention.backward`).

Shapes: Q queries of a tile, J keys that the tile sees.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any, TypeVar

import torch
from torch import Tensor

from kernels import TILE

# A window that no distance reaches.
UNBOUNDED = 2**30
# Lists are padded to a multiple of this, so that few different shapes are uploaded.
_PADDING = 64
# (start, end, shift)
Range = tuple[int, int, int]
# (start, end, ranges, work: pairs for each place)
Tile = tuple[int, int, list[Range], int]
Made = TypeVar("Made")


@dataclass(frozen=True, eq=False)
class AttentionWork:
    """The work lists of a row, in one tensor, so that one copy takes them to a device.

    The tensor is int32 [rows, 4]: `query_tiles` rows (start, end, first range, end of ranges), `key_tiles` such rows, then the
    ranges (start, end, shift, text), and rows of zeros. text, of a range of queries: where its text begins, as the keys are
    counted, so that the text has keys - text places before them. Places of padding are in tiles without ranges.
    """

    work: Tensor
    host: Tensor  # the same lists on the CPU
    query_tiles: int
    key_tiles: int
    segments: tuple[tuple[int, int, int], ...]  # (start, end, index of the prefix or -1) of each segment
    tokens: int  # places of the row
    window: int  # places that a place sees, itself included; `UNBOUNDED` for all
    tile: int  # places of a tile
    _made: dict[tuple[str, torch.device], Any] = field(default_factory=dict, repr=False, compare=False)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> "AttentionWork":
        """The lists on a device. This copy owns the data that backends derive from it."""
        return replace(self, work=self.work.to(device, non_blocking=non_blocking), _made={})

    def pinned(self) -> "AttentionWork":
        """The lists in pinned memory, from which a device copies while the host goes on."""
        return replace(self, work=self.work.pin_memory())

    @property
    def numbers(self) -> tuple[int, int, int, int]:
        """The kernels' arguments beside the lists: (tiles of queries, tiles of keys, window, places of a tile)."""
        return self.query_tiles, self.key_tiles, self.window, self.tile

    def once(self, name: str, device: torch.device, make: Callable[["AttentionWork", torch.device], Made]) -> Made:
        """The data that a backend derives from the lists with `make`, under its name: made once for all layers."""
        if (name, device) not in self._made:
            self._made[name, device] = make(self, device)
        return self._made[name, device]

    def tiles(self, device: torch.device) -> "list[MaskedTile]":
        """The tiles of queries with their masks, for the reference."""
        return self.once("reference", device, lambda work, on: [_masked(*tile, work.window, on) for tile in work.queries()])

    def queries(self) -> Iterator[tuple[int, int, list[Range]]]:
        """(start, end, ranges of keys) of each tile of queries, in the order of the row."""
        rows = self.host.tolist()
        ranges = rows[self.query_tiles + self.key_tiles :]
        for start, end, first, last in sorted(rows[: self.query_tiles]):
            yield start, end, [(begin, stop, shift) for begin, stop, shift, _ in ranges[first:last]]


@dataclass(frozen=True, eq=False)
class MaskedTile:
    """A tile of queries, and which of its queries sees which key."""

    start: int
    end: int
    keys: list[tuple[int, int]]  # (start, end) of each range
    mask_QJ: Tensor  # bool, over the keys of all ranges


def _masked(start: int, end: int, ranges: list[Range], window: int, device: torch.device) -> MaskedTile:
    query_Q1 = torch.arange(start, end, device=device)[:, None]
    masks = [torch.empty((end - start, 0), dtype=torch.bool, device=device)]
    for begin, stop, shift in ranges:
        distance_QJ = query_Q1 - shift - torch.arange(begin, stop, device=device)
        masks.append((distance_QJ >= 0) & (distance_QJ < window))
    return MaskedTile(start, end, [(begin, stop) for begin, stop, _ in ranges], torch.cat(masks, dim=1))


def attention_work(
    cu_segments: Sequence[int],
    window: int | None,
    *,
    prefixes: Sequence[int] | None = None,
    tokens: int | None = None,
    tile: int = TILE,
) -> AttentionWork:
    """Cut a packed row into tiles and list what each tile visits.

    Args:
        cu_segments: bounds of the segments, [0, ..., places].
        window: in places, None for unbounded.
        prefixes: for each segment the index of the earlier segment that it continues, -1 for none. Default: -1 for all.
        tokens: length of the row. Places behind the last segment are padding: they see nothing, and nothing sees them.
        tile: places of a tile.
    Raises: ValueError for a window below 1, bounds that do not rise from 0, a row shorter than its segments, another number of
        prefixes than segments, and a prefix that is not before its segment or has a prefix itself.
    """
    if window is not None and window < 1:
        raise ValueError(f"attention window {window}: must be at least 1, because a place sees itself")
    bounds = [int(bound) for bound in cu_segments]
    segments = _checked_segments(bounds, prefixes)
    tokens = bounds[-1] if tokens is None else tokens
    if tokens < bounds[-1]:
        raise ValueError(f"segments end at {bounds[-1]}, but the row has {tokens} tokens: give at least {bounds[-1]}")
    reach = UNBOUNDED if window is None else window
    children: dict[int, list[tuple[int, int]]] = {}
    for start, end, prefix in segments:
        children.setdefault(prefix, []).append((start, end))
    query_tiles: list[Tile] = []
    key_tiles: list[Tile] = []
    texts: list[tuple[int, int]] = []  # of each tile of keys: the text's number, and where it begins as the keys are counted
    for segment, (start, end, prefix) in enumerate(segments):
        before = segments[prefix] if prefix >= 0 else None
        text = (prefix, start - (before[1] - before[0])) if before else (segment, start)
        for first in range(start, end, tile):
            last = min(first + tile, end)
            seen = _keys_of(first, last, start, before, reach)
            query_tiles.append((first, last, seen, sum(stop - begin for begin, stop, _ in seen)))
            key_tiles.append((first, last, *_queries_of(first, last, end, children.get(segment, []), reach)))
            texts.append(text)
    for first in range(bounds[-1], tokens, tile):
        padding: Tile = (first, min(first + tile, tokens), [], 0)
        query_tiles.append(padding)
        key_tiles.append(padding)
        texts.append((-1, first))
    rows: list[tuple[int, int, int, int]] = []
    ranges: list[tuple[int, int, int, int]] = []
    for number in sorted(range(len(query_tiles)), key=lambda number: -query_tiles[number][3]):
        _list(query_tiles[number], 0, rows, ranges)
    for number in _keys_in_order(key_tiles, texts):
        _list(key_tiles[number], texts[number][1], rows, ranges)
    listed = rows + ranges
    listed += [(0, 0, 0, 0)] * (-len(listed) % _PADDING)
    work = torch.tensor(listed, dtype=torch.int32).view(-1, 4)
    return AttentionWork(work, work, len(query_tiles), len(key_tiles), segments, tokens, reach, tile)


def _checked_segments(bounds: list[int], prefixes: Sequence[int] | None) -> tuple[tuple[int, int, int], ...]:
    """(start, end, prefix) of each segment."""
    if not bounds or bounds[0] != 0 or any(start > end for start, end in pairwise(bounds)):
        raise ValueError(f"bounds of segments {bounds[:10]}: must rise from 0")
    count = len(bounds) - 1
    parents = [-1] * count if prefixes is None else [int(prefix) for prefix in prefixes]
    if len(parents) != count:
        raise ValueError(f"{len(parents)} prefixes for {count} segments: give one for each segment")
    for segment, prefix in enumerate(parents):
        if prefix >= segment or prefix < -1 or (prefix >= 0 and parents[prefix] >= 0):
            raise ValueError(f"segment {segment} has prefix {prefix}: must be an earlier segment without a prefix, or -1")
    return tuple((*ends, prefix) for ends, prefix in zip(pairwise(bounds), parents, strict=True))


def _keys_of(first: int, last: int, start: int, prefix: tuple[int, int, int] | None, reach: int) -> list[Range]:
    """The ranges of keys that queries [first, last) see: of the prefix, then of their own segment from `start` on."""
    own = (max(start, first - reach + 1), last, 0)
    if prefix is None:
        return [own]
    shift = start - prefix[1]
    before = (max(prefix[0], first - shift - reach + 1), prefix[1], shift)
    if before[0] >= before[1]:
        return [own]
    return [(before[0], last, 0)] if shift == 0 else [before, own]


def _queries_of(first: int, last: int, end: int, followers: Sequence[tuple[int, int]], reach: int) -> tuple[list[Range], int]:
    """The ranges of queries of keys [first, last), and how many queries see any of them.

    Of their own segment up to `end`, then of the segments after it. A range ends where its segment does, and segments have
    ranges of their own even side by side, so that all tiles cut a segment's queries into the same blocks.
    """
    ranges, work = [], 0
    for start, stop, shift in [(first, end, 0), *((start, stop, start - end) for start, stop in followers)]:
        seeing = min(stop, last - 1 + shift + reach) - start
        if seeing > 0:
            ranges.append((start, stop, shift))
            work += seeing
    return ranges, work


def _keys_in_order(tiles: list[Tile], texts: list[tuple[int, int]]) -> list[int]:
    """The numbers of tiles of keys, heaviest first, but no tile before an earlier tile of its text."""
    heaviest: dict[int, int] = {}
    behind = []  # the work of each tile, or of the heaviest tile behind it in its text
    for (*_, work), (text, _) in zip(reversed(tiles), reversed(texts), strict=True):
        heaviest[text] = max(work, heaviest.get(text, 0))
        behind.append(heaviest[text])
    behind.reverse()
    return sorted(range(len(tiles)), key=lambda number: -behind[number])


def _list(tile: Tile, text: int, rows: list[tuple[int, int, int, int]], ranges: list[tuple[int, int, int, int]]) -> None:
    """Append a tile's row and its ranges."""
    start, end, own, _ = tile
    rows.append((start, end, len(ranges), len(ranges) + len(own)))
    ranges += [(*found, text) for found in own]


def attended_pairs(lengths: Iterable[int], window: int | None) -> int:
    """Attended pairs (query, key) of documents of these lengths: the sum over places i of min(i + 1, window)."""
    total = 0
    for length in lengths:
        full = length if window is None else min(length, window)
        total += full * (full + 1) // 2 + (length - full) * full
    return total


def pairs_of(work: AttentionWork) -> int:
    """Attended pairs (query, key) of a batch; a segment's places follow its prefix's."""
    ends, starts = [], []
    for start, end, prefix in work.segments:
        before = work.segments[prefix][1] - work.segments[prefix][0] if prefix >= 0 else 0
        starts.append(before)
        ends.append(before + end - start)
    return attended_pairs(ends, work.window) - attended_pairs(starts, work.window)
