"""Rotary position embedding in the rotate-half layout (Su et al. 2021, https://arxiv.org/abs/2104.09864).

Element e of a head (e < E/2) is paired with element e + E/2, as in Hugging Face's Mistral, so weights need no permutation.

Shapes: T tokens, S heads of a packed query-key-value row (H query, K key, K value), E head size.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from kernels import accumulation_dtype


class RotaryTable(NamedTuple):
    """Cosine and sine of position times frequency, each float32 [T, E/2]; one table serves all layers of a batch."""

    cos_TE: Tensor
    sin_TE: Tensor


def rotary_table(positions_T: Tensor, head_dim: int, theta: float) -> RotaryTable:
    """The angles of each position, in float32 as published for Mistral: angle(t, e) = t * theta^(-2e / E).

    Args: positions_T integer [T], counted from 0 at the start of each document.
    """
    exponent = torch.arange(0, head_dim, 2, dtype=torch.float32, device=positions_T.device) / head_dim
    angle_TE = positions_T.to(torch.float32)[:, None] * (1.0 / theta**exponent)
    return RotaryTable(angle_TE.cos(), angle_TE.sin())


def rotary(qkv_TSE: Tensor, table: RotaryTable, rotated_heads: int) -> Tensor:
    """Rotate the first `rotated_heads` heads (queries and keys) of each packed row by its position's angles.

    Args: qkv_TSE [T, S, E]; rotated_heads = H + K; the K value heads behind them pass through.
    Returns: [T, S, E] in the dtype of `qkv_TSE`, rotated in float32 and rounded once.
    """
    return rotary_reference(qkv_TSE, table, rotated_heads)


def rotary_reference(qkv_TSE: Tensor, table: RotaryTable, rotated_heads: int) -> Tensor:
    wide = accumulation_dtype(qkv_TSE.dtype)
    cos, sin = table.cos_TE[:, None].to(wide), table.sin_TE[:, None].to(wide)
    first, second = qkv_TSE[:, :rotated_heads].to(wide).chunk(2, dim=-1)
    rotated = torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
    return torch.cat((rotated.to(qkv_TSE.dtype), qkv_TSE[:, rotated_heads:]), dim=1)
