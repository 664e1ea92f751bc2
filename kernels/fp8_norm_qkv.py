"""`kernels.norm_qkv` with its matrix products in FP8 (`kernels.fp8_linear` explains the method).

The norm's kernel emits codes; normed rows never exist in memory. The backward pass makes the transposed codes again from the
residual stream, which the block keeps anyway.

Shapes: T tokens, D width, H query heads, K key/value heads, E head size, X = (H + 2K) E, P = T rounded up to a multiple of 16.
"""

import torch
from torch import Tensor

from kernels.fp8_linear import WeightCodes, carry_codes, product, weight_gradient
from kernels.linear import leaf
from kernels.norm_qkv import NormQkv
from kernels.rms_norm import add_norm_codes, norm_backward_codes, norm_codes, norm_columns
from kernels.rotary import RotaryTable, rotate_, rotate_back_codes


def fp8_norm_qkv(
    residual_TD: Tensor,
    delta_TD: Tensor | None,
    norm_weight_D: Tensor,
    qkv_weight_XD: Tensor,
    table: RotaryTable,
    heads: tuple[int, int],
    eps: float,
    codes: WeightCodes,
) -> NormQkv:
    """Query, key and value of norm(residual + delta), with queries and keys rotated. Arguments and results: see `norm_qkv`.

    Args: codes: of the weight, whose sizes must be multiples of 16.
    """
    return _Fp8NormQkv.apply(residual_TD, delta_TD, norm_weight_D, qkv_weight_XD, *table, heads, eps, codes)


class _Fp8NormQkv(torch.autograd.Function):
    @staticmethod
    def forward(ctx, residual_TD, delta_TD, norm_weight_D, qkv_weight_XD, cos_TE, sin_TE, heads, eps, codes):
        if delta_TD is None:
            total_TD, (normed, norm_scale_T) = residual_TD, norm_codes(residual_TD, norm_weight_D, eps)
        else:
            total_TD, normed, norm_scale_T = add_norm_codes(residual_TD, delta_TD, norm_weight_D, eps)
        qkv_TX = product(normed, codes.rows(qkv_weight_XD), total_TD.dtype)
        qkv_TSE = qkv_TX.unflatten(-1, (sum(heads) + heads[1], -1))
        rotate_(qkv_TSE, RotaryTable(cos_TE, sin_TE), sum(heads))
        ctx.save_for_backward(total_TD, norm_scale_T, normed.scale_T, norm_weight_D, qkv_weight_XD, cos_TE, sin_TE)
        ctx.codes, ctx.leaf = codes, leaf(qkv_weight_XD)
        return total_TD, *qkv_TSE.split((*heads, heads[1]), dim=1)

    @staticmethod
    def backward(ctx, grad_total_TD, grad_query_THE, grad_key_TKE, grad_value_TKE):
        total_TD, norm_scale_T, normed_scale_T, norm_weight_D, qkv_weight_XD, cos_TE, sin_TE = ctx.saved_tensors
        grad = rotate_back_codes(grad_query_THE, grad_key_TKE, grad_value_TKE, RotaryTable(cos_TE, sin_TE))
        needs_residual, needs_delta, needs_norm, needs_weight, *_ = ctx.needs_input_grad
        grad_weight_XD = grad_input_TD = grad_norm_weight_D = None
        if needs_weight:
            normed_DP = norm_columns(total_TD, norm_weight_D, norm_scale_T, normed_scale_T)
            grad_weight_XD = weight_gradient(grad, normed_DP, normed_scale_T, ctx.leaf, total_TD.dtype)
            del normed_DP
        if needs_residual or needs_delta or needs_norm:
            grad_normed_TD = product(grad, ctx.codes.columns(qkv_weight_XD), total_TD.dtype)
            given = (grad_normed_TD, grad_total_TD, total_TD, norm_weight_D, norm_scale_T)
            grad_input_TD, grad_norm_weight_D, input_codes = norm_backward_codes(*given)
            carry_codes(grad_input_TD, input_codes)
        return (
            grad_input_TD,
            grad_input_TD if needs_delta else None,
            grad_norm_weight_D if needs_norm else None,
            grad_weight_XD,
            *(None,) * 5,
        )
