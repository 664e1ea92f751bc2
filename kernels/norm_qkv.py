"""The way into attention as one function: residual sum, RMS norm, the packed projection, rotary embedding.

Autograd would keep the normed rows for the gradient of the projection's weight. This function keeps the residual stream, which
the block keeps anyway, and norms it again: a pass over memory, no matrix product.

Shapes: T tokens, D width, H query heads, K key/value heads, E head size, S = H + 2K packed heads, X = S * E.
"""

import torch
from torch import Tensor

from kernels.linear import leaf, weight_gradient
from kernels.rms_norm import add_norm_forward, add_rms_norm_reference, norm_backward, norm_forward, rms_norm_reference
from kernels.rotary import RotaryTable, rotary_reference_, rotate_, rotate_back

# (residual stream [T, D], rotated query [T, H, E], rotated key [T, K, E], value [T, K, E])
NormQkv = tuple[Tensor, Tensor, Tensor, Tensor]


def norm_qkv(
    residual_TD: Tensor,
    delta_TD: Tensor | None,
    norm_weight_D: Tensor,
    qkv_weight_XD: Tensor,
    table: RotaryTable,
    heads: tuple[int, int],
    eps: float,
    *,
    keep_normed: bool = False,
) -> NormQkv:
    """Query, key and value of norm(residual + delta), with queries and keys rotated.

    Args:
        residual_TD: the residual stream. delta_TD: the previous block's output, to be added to it; None for nothing.
        qkv_weight_XD: rows of queries, keys and values, in this order. table: the angles of each token's position.
        heads: (H, K). keep_normed: whether to keep the normed rows for the backward pass; the gradients are the same.
    Returns: (residual + delta, query, key, value). The last three are views of one packed row.
    """
    return _NormQkv.apply(residual_TD, delta_TD, norm_weight_D, qkv_weight_XD, *table, heads, eps, keep_normed)


def norm_qkv_reference(
    residual_TD: Tensor,
    delta_TD: Tensor | None,
    norm_weight_D: Tensor,
    qkv_weight_XD: Tensor,
    table: RotaryTable,
    heads: tuple[int, int],
    eps: float,
    *,
    keep_normed: bool = True,
) -> NormQkv:
    if delta_TD is None:
        total_TD, normed_TD = residual_TD, rms_norm_reference(residual_TD, norm_weight_D, eps)
    else:
        total_TD, normed_TD = add_rms_norm_reference(residual_TD, delta_TD, norm_weight_D, eps)
    qkv_TSE = (normed_TD @ qkv_weight_XD.T).unflatten(-1, (sum(heads) + heads[1], -1))
    query_THE, key_TKE, value_TKE = rotary_reference_(qkv_TSE, table, sum(heads)).split((*heads, heads[1]), dim=1)
    return total_TD, query_THE, key_TKE, value_TKE


class _NormQkv(torch.autograd.Function):
    @staticmethod
    def forward(ctx, residual_TD, delta_TD, norm_weight_D, qkv_weight_XD, cos_TE, sin_TE, heads, eps, keep_normed):
        if delta_TD is None:
            total_TD, (normed_TD, scale_T) = residual_TD, norm_forward(residual_TD, norm_weight_D, eps)
        else:
            total_TD, normed_TD, scale_T = add_norm_forward(residual_TD, delta_TD, norm_weight_D, eps)
        qkv_TSE = (normed_TD @ qkv_weight_XD.T).unflatten(-1, (sum(heads) + heads[1], -1))
        rotate_(qkv_TSE, RotaryTable(cos_TE, sin_TE), sum(heads))
        kept_TD = normed_TD if keep_normed else None
        ctx.save_for_backward(total_TD, kept_TD, scale_T, norm_weight_D, qkv_weight_XD, cos_TE, sin_TE)
        ctx.eps, ctx.qkv_leaf = eps, leaf(qkv_weight_XD)
        return total_TD, *qkv_TSE.split((*heads, heads[1]), dim=1)

    @staticmethod
    def backward(ctx, grad_total_TD, grad_query_THE, grad_key_TKE, grad_value_TKE):
        total_TD, normed_TD, scale_T, norm_weight_D, qkv_weight_XD, cos_TE, sin_TE = ctx.saved_tensors
        table = RotaryTable(cos_TE, sin_TE)
        grad_qkv_TX = rotate_back(grad_query_THE, grad_key_TKE, grad_value_TKE, table).flatten(1)
        needs_residual, needs_delta, needs_norm, needs_qkv, *_ = ctx.needs_input_grad
        grad_qkv_weight_XD = grad_input_TD = grad_norm_weight_D = None
        if needs_qkv:
            if normed_TD is None:
                normed_TD, _ = norm_forward(total_TD, norm_weight_D, ctx.eps)
            grad_qkv_weight_XD = weight_gradient(grad_qkv_TX, normed_TD, ctx.qkv_leaf)
        if needs_residual or needs_delta or needs_norm:
            grad_normed_TD = grad_qkv_TX @ qkv_weight_XD
            grad_input_TD, grad_norm_weight_D = norm_backward(grad_normed_TD, grad_total_TD, total_TD, norm_weight_D, scale_T)
        return (
            grad_input_TD,
            grad_input_TD if needs_delta else None,
            grad_norm_weight_D if needs_norm else None,
            grad_qkv_weight_XD,
            *(None,) * 5,
        )
