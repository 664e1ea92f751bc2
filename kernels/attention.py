"""Causal attention with a sliding window over packed documents, with grouped key/value heads.

Place i sees the places j of its own document with i - window < j <= i (Jiang et al. 2023, https://arxiv.org/abs/2310.06825;
Beltagy et al. 2020, https://arxiv.org/abs/2004.05150). Window 4096 means 4096 places, itself included.

Shapes: T tokens, H query heads, K key/value heads, E head size, Q queries of a tile, J keys of a tile.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

_TILE = 256


@dataclass(frozen=True)
class AttentionTile:
    """Queries [query_start, query_end) and all the keys that any of them may see; mask_QJ says which sees which."""

    query_start: int
    query_end: int
    key_start: int
    mask_QJ: Tensor


def attention_tiles(cu_docs: Tensor, window: int | None, tile: int = _TILE) -> list[AttentionTile]:
    """Cut the packed row into tiles of queries, built once a batch for all layers.

    Args: cu_docs integer [documents + 1], 0 = cu_docs[0] <= ... <= cu_docs[-1] = T; window in places, None for unbounded.
    """
    if window is not None and window < 1:
        raise ValueError(f"attention window {window}: must be at least 1, a place sees itself")
    bounds = cu_docs.tolist()
    document_T = torch.repeat_interleave(cu_docs.diff().long())
    tiles = []
    for start in range(0, bounds[-1], tile):
        end = min(start + tile, bounds[-1])
        key_start = bounds[int(document_T[start])]
        if window is not None:
            key_start = max(key_start, start - window + 1)
        query_Q1 = torch.arange(start, end, device=cu_docs.device)[:, None]
        key_1J = torch.arange(key_start, end, device=cu_docs.device)[None, :]
        mask_QJ = (key_1J <= query_Q1) & (document_T[start:end, None] == document_T[None, key_start:end])
        if window is not None:
            mask_QJ &= key_1J > query_Q1 - window
        tiles.append(AttentionTile(start, end, key_start, mask_QJ))
    return tiles


def sliding_window_attention(query_THE: Tensor, key_TKE: Tensor, value_TKE: Tensor, tiles: list[AttentionTile]) -> Tensor:
    """softmax(query key^T / sqrt(E)) value over the visible places.

    Args: query_THE [T, H, E]; key_TKE and value_TKE [T, K, E] with H a multiple of K, query head h reading key/value head
        h // (H / K); tiles from `attention_tiles` for the same T.
    Returns: [T, H, E] in the dtype of `query_THE`; scores and softmax in float32.
    """
    return sliding_window_attention_reference(query_THE, key_TKE, value_TKE, tiles)


def sliding_window_attention_reference(
    query_THE: Tensor, key_TKE: Tensor, value_TKE: Tensor, tiles: list[AttentionTile]
) -> Tensor:
    group = query_THE.shape[1] // key_TKE.shape[1]
    key_HTE = key_TKE.repeat_interleave(group, dim=1).transpose(0, 1)
    value_HTE = value_TKE.repeat_interleave(group, dim=1).transpose(0, 1)
    query_HTE = query_THE.transpose(0, 1)
    parts = [
        masked_attention(
            query_HTE[:, tile.query_start : tile.query_end],
            key_HTE[:, tile.key_start : tile.query_end],
            value_HTE[:, tile.key_start : tile.query_end],
            tile.mask_QJ,
        )
        for tile in tiles
    ]
    return torch.cat(parts, dim=1).transpose(0, 1) if parts else query_THE * 0


def masked_attention(query_HQE: Tensor, key_HJE: Tensor, value_HJE: Tensor, mask_QJ: Tensor) -> Tensor:
    """Attention of each query to the keys that its row of the boolean mask allows: [H, Q, E]."""
    out = F.scaled_dot_product_attention(query_HQE[None], key_HJE[None], value_HJE[None], attn_mask=mask_QJ)
    return out[0]
