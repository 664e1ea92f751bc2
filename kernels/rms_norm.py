"""Root-mean-square normalisation (Zhang and Sennrich 2019, https://arxiv.org/abs/1910.07467, equation 4).

Shapes: T tokens, D width.
"""

import torch
from torch import Tensor

from kernels import accumulation_dtype


def rms_norm(hidden_TD: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """hidden / sqrt(mean(hidden^2) + eps) * weight, row by row.

    Args: hidden_TD and weight_D of one floating dtype; eps is added to the mean of squares.
    Returns: [T, D] in the dtype of `hidden_TD`; statistics and product are computed in float32 and rounded once.
    """
    return rms_norm_reference(hidden_TD, weight_D, eps)


def add_rms_norm(residual_TD: Tensor, hidden_TD: Tensor, weight_D: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Add a block's output to the residual stream and normalise the sum.

    Returns: (residual + hidden, its RMS norm), both [T, D] in the dtype of `residual_TD`. The norm is of the sum as
    rounded to that dtype, which is what the next block's residual holds.
    """
    return add_rms_norm_reference(residual_TD, hidden_TD, weight_D, eps)


def rms_norm_reference(hidden_TD: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    wide = hidden_TD.to(accumulation_dtype(hidden_TD.dtype))
    scale = torch.rsqrt(wide.square().mean(dim=-1, keepdim=True) + eps)
    return (wide * scale * weight_D).to(hidden_TD.dtype)


def add_rms_norm_reference(residual_TD: Tensor, hidden_TD: Tensor, weight_D: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    total_TD = residual_TD + hidden_TD
    return total_TD, rms_norm_reference(total_TD, weight_D, eps)
