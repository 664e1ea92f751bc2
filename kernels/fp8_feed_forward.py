"""`kernels.feed_forward` with its matrix products in FP8 (`kernels.fp8_linear` explains the method).

The kernels of norm and SwiGLU emit codes; normed rows and products of SwiGLU never exist in memory. Besides the residual
stream, it keeps for the backward pass the scales of its codes, and in every mode but "ffn" gate and up: the transposed codes
that a weight's gradient needs are made from them, whether or not a copy had been kept.

Shapes: T tokens, D width, F feed-forward size, F2 = 2F, P = T rounded up to a multiple of 16.
"""

import torch
from torch import Tensor

from kernels.fp8_linear import WeightCodes, carry_codes, gradient_codes, product, weight_gradient
from kernels.linear import leaf
from kernels.recompute import Recompute
from kernels.rms_norm import add_norm_codes, norm_backward_codes, norm_codes, norm_columns
from kernels.swiglu import swiglu_backward_codes, swiglu_codes, swiglu_columns


def fp8_feed_forward(
    residual_TD: Tensor,
    delta_TD: Tensor,
    norm_weight_D: Tensor,
    gate_up_weight_F2D: Tensor,
    down_weight_DF: Tensor,
    eps: float,
    codes: WeightCodes,
    *,
    recompute: Recompute = "light",
) -> tuple[Tensor, Tensor]:
    """SwiGLU network of norm(residual + delta). Arguments and results: see `feed_forward`.

    Args: codes: of both weights. Their sizes must be multiples of 16.
    """
    return _Fp8FeedForward.apply(
        residual_TD, delta_TD, norm_weight_D, gate_up_weight_F2D, down_weight_DF, eps, codes, recompute == "ffn"
    )


class _Fp8FeedForward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, residual_TD, delta_TD, norm_weight_D, gate_up_weight_F2D, down_weight_DF, eps, codes, again):
        dtype = residual_TD.dtype
        total_TD, normed, norm_scale_T = add_norm_codes(residual_TD, delta_TD, norm_weight_D, eps)
        gate_up_TF2 = product(normed, codes.rows(gate_up_weight_F2D), dtype)
        inner = swiglu_codes(gate_up_TF2)
        ctx.save_for_backward(
            total_TD,
            norm_scale_T,
            normed.scale_T,
            inner.scale_T,
            None if again else gate_up_TF2,
            norm_weight_D,
            gate_up_weight_F2D,
            down_weight_DF,
        )
        ctx.eps, ctx.codes, ctx.leaves = eps, codes, (leaf(gate_up_weight_F2D), leaf(down_weight_DF))
        return total_TD, product(inner, codes.rows(down_weight_DF), dtype)

    @staticmethod
    def backward(ctx, grad_total_TD, grad_out_TD):
        total_TD, norm_scale_T, normed_scale_T, inner_scale_T, gate_up_TF2, norm_weight_D, *weights = ctx.saved_tensors
        gate_up_weight_F2D, down_weight_DF = weights
        codes, (gate_up_leaf, down_leaf) = ctx.codes, ctx.leaves
        *needs_input, needs_gate_up, needs_down, _, _, _ = ctx.needs_input_grad
        dtype = total_TD.dtype
        grad_gate_up_weight_F2D = grad_down_DF = grad_input_TD = grad_norm_weight_D = None
        if gate_up_TF2 is None:
            normed, _ = norm_codes(total_TD, norm_weight_D, ctx.eps)
            gate_up_TF2 = product(normed, codes.rows(gate_up_weight_F2D), dtype)
        grad_out = gradient_codes(grad_out_TD)
        if needs_down:
            inner_FP = swiglu_columns(gate_up_TF2, inner_scale_T)
            grad_down_DF = weight_gradient(grad_out, inner_FP, inner_scale_T, down_leaf, dtype)
            del inner_FP
        grad_inner_TF = product(grad_out, codes.columns(down_weight_DF), dtype)
        grad_gate_up = swiglu_backward_codes(gate_up_TF2, grad_inner_TF)
        del gate_up_TF2, grad_inner_TF
        if needs_gate_up:
            normed_DP = norm_columns(total_TD, norm_weight_D, norm_scale_T, normed_scale_T)
            grad_gate_up_weight_F2D = weight_gradient(grad_gate_up, normed_DP, normed_scale_T, gate_up_leaf, dtype)
            del normed_DP
        if any(needs_input):
            grad_normed_TD = product(grad_gate_up, codes.columns(gate_up_weight_F2D), dtype)
            given = (grad_normed_TD, grad_total_TD, total_TD, norm_weight_D, norm_scale_T)
            grad_input_TD, grad_norm_weight_D, input_codes = norm_backward_codes(*given)
            carry_codes(grad_input_TD, input_codes)
        if not needs_input[2]:
            grad_norm_weight_D = None
        return grad_input_TD, grad_input_TD, grad_norm_weight_D, grad_gate_up_weight_F2D, grad_down_DF, None, None, None
