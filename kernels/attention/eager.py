"""Attention by torch's eager operators: the reference, and the path of CPU tensors.

The reference computes tile after tile. In a packed row each short document has a small tile, and on a CPU a call costs more
than the tile's arithmetic. So `batched_attention` pads tiles to multiples of 16 queries and keys, and computes all tiles of one
padded size in one call. Padding repeats a tile's own first query and first key, masked: no document reads another's content. A
padded size depends on the tile alone, and torch computes each entry of a batch by itself, so neighbours change no bit of a
document's results. Tiles of more than 256 keys stay alone: gathering would copy the keys of a long document many times.

Shapes: T tokens, H query heads, K key/value heads, E head size, B tiles of a batch, Q queries and J keys of a tile, N and M
queries and keys of all batches.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels import accumulation_dtype
from kernels.attention.work import AttentionWork, MaskedTile, Range

_MULTIPLE = 16
_MOST_KEYS = 256
# Behind every place of a text: no query sees it.
_UNSEEN = 2**31 - 1


def tiled_attention(query_THE: Tensor, key_TKE: Tensor, value_TKE: Tensor, work: AttentionWork) -> Tensor:
    """The reference: [T, H, E], tile by tile; tokens that see nothing give 0."""
    key_THE, value_THE = _repeated(query_THE, key_TKE, value_TKE)
    outputs = [_tile_attention(query_THE, key_THE, value_THE, tile) for tile in _tiles(work, query_THE.device)]
    return torch.cat(outputs)


def log_sum_exps(query_THE: Tensor, key_TKE: Tensor, work: AttentionWork) -> Tensor:
    """The natural logarithm of each softmax's denominator: [H, T] in float32 (float64), -inf where a token sees nothing."""
    wide = accumulation_dtype(query_THE.dtype)
    (source_THE,) = _repeated(query_THE, key_TKE)
    sums = []
    with torch.no_grad():
        for tile in _tiles(work, query_THE.device):
            query_HQE = query_THE[tile.start : tile.end].transpose(0, 1).to(wide)
            score_HQJ = query_HQE @ _keys_of(source_THE, tile).permute(1, 2, 0).to(wide) * query_HQE.shape[-1] ** -0.5
            sums.append(score_HQJ.masked_fill(~tile.mask_QJ, float("-inf")).logsumexp(dim=-1))
    return torch.cat(sums, dim=1)


def masked_attention(query_HQE: Tensor, key_HJE: Tensor, value_HJE: Tensor, mask_QJ: Tensor) -> Tensor:
    """Attention of each query to the keys that its row of the boolean mask allows: [H, Q, E]."""
    out = F.scaled_dot_product_attention(query_HQE[None], key_HJE[None], value_HJE[None], attn_mask=mask_QJ)
    return out[0]


def _repeated(query_THE: Tensor, *sources_TKE: Tensor) -> list[Tensor]:
    """Keys and values, each head repeated for the query heads that read it: [T, H, E]."""
    return [source.repeat_interleave(query_THE.shape[1] // source.shape[1], dim=1) for source in sources_TKE]


def _tiles(work: AttentionWork, device: torch.device) -> list[MaskedTile]:
    """The tiles of the lists; one empty tile where there are none."""
    return work.tiles(device) or [MaskedTile(0, 0, [], torch.empty((0, 0), dtype=torch.bool, device=device))]


def _keys_of(source_THE: Tensor, tile: MaskedTile) -> Tensor:
    """The keys or values that a tile sees: [J, H, E]."""
    parts = [source_THE[slice(*ends)] for ends in tile.keys]
    return parts[0] if len(parts) == 1 else torch.cat([*parts, source_THE[:0]])


def _tile_attention(query_THE: Tensor, key_THE: Tensor, value_THE: Tensor, tile: MaskedTile) -> Tensor:
    """[Q, H, E]."""
    rows = (query_THE[tile.start : tile.end], _keys_of(key_THE, tile), _keys_of(value_THE, tile))
    query_HQE, key_HJE, value_HJE = (part.transpose(0, 1) for part in rows)
    if not tile.mask_QJ.shape[1]:
        # Products over no keys are zeros, and so are their gradients.
        return (query_HQE @ key_HJE.mT @ value_HJE).transpose(0, 1)
    return masked_attention(query_HQE, key_HJE, value_HJE, tile.mask_QJ).transpose(0, 1)


@dataclass(frozen=True, eq=False)
class _Batch:
    """Tiles of one padded size; mask_B1QJ says which query sees which key."""

    tiles: int
    queries: int
    keys: int
    mask_B1QJ: Tensor


@dataclass(frozen=True, eq=False)
class _Batches:
    """The tiles and indices of `batched_attention`, made once for all layers."""

    batches: list[_Batch]
    alone: list[MaskedTile]
    query_N: Tensor  # the token of each query, batch after batch
    key_M: Tensor  # the token of each key, batch after batch
    place_T: Tensor  # row of each token's output; the batches' outputs come first, then the outputs of the tiles alone


def batched_attention(query_THE: Tensor, key_TKE: Tensor, value_TKE: Tensor, work: AttentionWork) -> Tensor:
    """[T, H, E]: within rounding of `tiled_attention`; tokens that see nothing give 0."""
    made = work.once("batched", query_THE.device, _batches)
    _, heads, size = query_THE.shape
    # Gather by an embedding look-up: its backward pass is quick and sums in a fixed order.
    query_NHE, key_MKE, value_MKE = (
        F.embedding(tokens, source.flatten(1)).unflatten(1, (-1, size))
        for tokens, source in ((made.query_N, query_THE), (made.key_M, key_TKE), (made.key_M, value_TKE))
    )
    query_sizes = [batch.tiles * batch.queries for batch in made.batches]
    key_sizes = [batch.tiles * batch.keys for batch in made.batches]
    rows = zip(query_NHE.split(query_sizes), key_MKE.split(key_sizes), value_MKE.split(key_sizes), strict=True)
    outputs = []
    for batch, (query, key, value) in zip(made.batches, rows, strict=True):
        parts = (query, *_repeated(query, key, value))
        query_BHQE, key_BHJE, value_BHJE = (part.unflatten(0, (batch.tiles, -1)).transpose(1, 2) for part in parts)
        out_BHQE = F.scaled_dot_product_attention(query_BHQE, key_BHJE, value_BHJE, attn_mask=batch.mask_B1QJ)
        outputs.append(out_BHQE.transpose(1, 2).flatten(0, 1))
    if made.alone:
        key_THE, value_THE = _repeated(query_THE, key_TKE, value_TKE)
        outputs += [_tile_attention(query_THE, key_THE, value_THE, tile) for tile in made.alone]
    return F.embedding(made.place_T, torch.cat(outputs).flatten(1)).unflatten(1, (heads, size))


def _batches(work: AttentionWork, device: torch.device) -> _Batches:
    by_size: dict[tuple[int, int], list[tuple[int, int, list[Range]]]] = {}
    alone = []
    for number, (start, end, ranges) in enumerate(work.queries()):
        keys = sum(stop - begin for begin, stop, _ in ranges)
        if 0 < keys <= _MOST_KEYS:
            by_size.setdefault((_padded(end - start), _padded(keys)), []).append((start, end, ranges))
        else:
            alone.append(work.tiles(device)[number])
    batches: list[_Batch] = []
    query_N: list[int] = []
    key_M: list[int] = []
    place_T = [0] * work.tokens
    for (queries, keys), tiles in sorted(by_size.items()):
        # Places in the text. The shift gives a key its place as the tile's queries count.
        query_places: list[int] = []
        key_places: list[int] = []
        for start, end, ranges in tiles:
            place_T[start:end] = range(len(query_N), len(query_N) + end - start)
            own = [*range(start, end), *[start] * (queries - (end - start))]
            query_N += own
            query_places += own
            seen = [(token, token + shift) for begin, stop, shift in ranges for token in range(begin, stop)]
            seen += [(ranges[0][0], _UNSEEN)] * (keys - len(seen))
            key_M += [token for token, _ in seen]
            key_places += [place for _, place in seen]
        query_BQ, key_BJ = (torch.tensor(places).view(len(tiles), -1) for places in (query_places, key_places))
        distance_BQJ = query_BQ[:, :, None] - key_BJ[:, None, :]
        mask_B1QJ = ((distance_BQJ >= 0) & (distance_BQJ < work.window))[:, None]
        batches.append(_Batch(len(tiles), queries, keys, mask_B1QJ.to(device)))
    first = len(query_N)
    for tile in alone:
        place_T[tile.start : tile.end] = range(first, first + tile.end - tile.start)
        first += tile.end - tile.start
    return _Batches(
        batches, alone, *(torch.tensor(tokens, dtype=torch.int64, device=device) for tokens in (query_N, key_M, place_T))
    )


class EagerSizes(NamedTuple):
    """Numbers of tokens and pairs that `batched_attention` holds, padding included."""

    gathered_queries: int
    gathered_keys: int  # with copies of whole rows for tiles alone
    outputs: int
    pairs: int  # elements of the masks
    alone: bool  # whether tiles alone read the queries in their place


def eager_sizes(work: AttentionWork) -> EagerSizes:
    made = _batches(work, work.host.device)
    queries, keys = len(made.query_N), len(made.key_M)
    outputs = queries + sum(tile.end - tile.start for tile in made.alone)
    copied = sum(tile.mask_QJ.shape[1] for tile in made.alone if len(tile.keys) > 1)
    copied += work.tokens if made.alone else 0
    pairs = sum(batch.mask_B1QJ.numel() for batch in made.batches) + sum(tile.mask_QJ.numel() for tile in made.alone)
    return EagerSizes(queries, keys + copied, outputs, pairs, bool(made.alone))


def _padded(count: int) -> int:
    return -(-count // _MULTIPLE) * _MULTIPLE
