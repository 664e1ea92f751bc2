"""The feed-forward half of a block as one function: residual sum, RMS norm, gate and up, SwiGLU, down.

Besides the residual stream, which its neighbours keep anyway, it keeps for the backward pass:

    none, block   normed rows, gate and up, product of SwiGLU
    light         gate and up
    ffn           nothing

Shapes: T tokens, D width, F feed-forward size, F2 = 2F.
"""

import torch
from torch import Tensor

from kernels.linear import leaf, weight_gradient
from kernels.recompute import Recompute
from kernels.rms_norm import add_norm_forward, add_rms_norm_reference, norm_backward, norm_forward
from kernels.swiglu import swiglu, swiglu_backward_, swiglu_reference


def feed_forward(
    residual_TD: Tensor,
    delta_TD: Tensor,
    norm_weight_D: Tensor,
    gate_up_weight_F2D: Tensor,
    down_weight_DF: Tensor,
    eps: float,
    *,
    recompute: Recompute = "light",
) -> tuple[Tensor, Tensor]:
    """SwiGLU network of norm(residual + delta).

    Args:
        residual_TD: the residual stream. delta_TD: the output of attention, to be added to it.
        gate_up_weight_F2D: rows of the gate, then of the up projection.
        recompute: what the backward pass computes again. "block" keeps as much as "none": the caller checkpoints the block.
    Returns: (residual + delta, output of the network), both [T, D]. The caller adds the output to the stream.
    Raises: RuntimeError in a second backward pass, because the first overwrites gate and up by their gradient.
    """
    return _FeedForward.apply(residual_TD, delta_TD, norm_weight_D, gate_up_weight_F2D, down_weight_DF, eps, recompute)


def feed_forward_reference(
    residual_TD: Tensor,
    delta_TD: Tensor,
    norm_weight_D: Tensor,
    gate_up_weight_F2D: Tensor,
    down_weight_DF: Tensor,
    eps: float,
    *,
    recompute: Recompute = "none",
) -> tuple[Tensor, Tensor]:
    total_TD, normed_TD = add_rms_norm_reference(residual_TD, delta_TD, norm_weight_D, eps)
    return total_TD, swiglu_reference(normed_TD @ gate_up_weight_F2D.T) @ down_weight_DF.T


class _FeedForward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, residual_TD, delta_TD, norm_weight_D, gate_up_weight_F2D, down_weight_DF, eps, recompute):
        total_TD, normed_TD, scale_T = add_norm_forward(residual_TD, delta_TD, norm_weight_D, eps)
        gate_up_TF2 = normed_TD @ gate_up_weight_F2D.T
        product_TF = swiglu(gate_up_TF2)
        everything = recompute in ("none", "block")
        ctx.save_for_backward(
            total_TD,
            scale_T,
            norm_weight_D,
            gate_up_weight_F2D,
            down_weight_DF,
            None if recompute == "ffn" else gate_up_TF2,
            normed_TD if everything else None,
            product_TF if everything else None,
        )
        ctx.eps, ctx.leaves = eps, (leaf(gate_up_weight_F2D), leaf(down_weight_DF))
        return total_TD, product_TF @ down_weight_DF.T

    @staticmethod
    def backward(ctx, grad_total_TD, grad_out_TD):
        total_TD, scale_T, norm_weight_D, gate_up_weight_F2D, down_weight_DF, *kept = ctx.saved_tensors
        gate_up_TF2, normed_TD, product_TF = kept
        *needs_input, needs_gate_up, needs_down, _, _ = ctx.needs_input_grad
        gate_up_leaf, down_leaf = ctx.leaves
        grad_gate_up_weight_F2D = grad_down_DF = grad_input_TD = grad_norm_weight_D = None
        if normed_TD is None and (needs_gate_up or gate_up_TF2 is None):
            normed_TD, _ = norm_forward(total_TD, norm_weight_D, ctx.eps)
        if gate_up_TF2 is None:
            gate_up_TF2 = normed_TD @ gate_up_weight_F2D.T
        # From here on this buffer, which has no other reader, holds the gradients of gate and up.
        emitted_TF = swiglu_backward_(gate_up_TF2, grad_out_TD @ down_weight_DF, emit=needs_down and product_TF is None)
        if needs_down:
            grad_down_DF = weight_gradient(grad_out_TD, product_TF if emitted_TF is None else emitted_TF, down_leaf)
        if needs_gate_up:
            grad_gate_up_weight_F2D = weight_gradient(gate_up_TF2, normed_TD, gate_up_leaf)
        if any(needs_input):
            grad_normed_TD = gate_up_TF2 @ gate_up_weight_F2D
            grad_input_TD, grad_norm_weight_D = norm_backward(grad_normed_TD, grad_total_TD, total_TD, norm_weight_D, scale_T)
        if not needs_input[2]:
            grad_norm_weight_D = None
        return grad_input_TD, grad_input_TD, grad_norm_weight_D, grad_gate_up_weight_F2D, grad_down_DF, None, None
