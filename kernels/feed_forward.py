"""The feed-forward half of a block as one function: residual sum, RMS norm, gate and up, SwiGLU, down.

What is kept for the backward pass is chosen; what is not kept is made again there by the same functions, so that loss and
gradients are to the bit the same:

    none    normed rows, gate and up, product of SwiGLU
    light   gate and up: norm and SwiGLU again, passes over memory without a product
    ffn     nothing of its own: the product for gate and up again as well

Shapes: T tokens, D width, F feed-forward size.
"""

from typing import Literal

import torch
from torch import Tensor

from kernels.rms_norm import add_norm_forward, add_rms_norm_reference, norm_backward, norm_forward
from kernels.swiglu import swiglu, swiglu_backward_, swiglu_reference

Recompute = Literal["none", "light", "ffn"]


def feed_forward(
    residual_TD: Tensor,
    delta_TD: Tensor,
    norm_weight_D: Tensor,
    gate_up_weight_GD: Tensor,
    down_weight_DF: Tensor,
    eps: float,
    *,
    recompute: Recompute = "light",
) -> tuple[Tensor, Tensor]:
    """SwiGLU network of norm(residual + delta).

    Args:
        residual_TD: the residual stream. delta_TD: what attention adds to it.
        gate_up_weight_GD: [2F, D], rows of the gate, then of the up projection. down_weight_DF: [D, F].
        recompute: what is made again in the backward pass, see the module.
    Returns: (residual + delta, output of the network), both [T, D]; the output is yet to be added to the stream.
    Raises: RuntimeError in a second backward pass: the first has put the gradient of gate and up in their place.
    """
    return _FeedForward.apply(residual_TD, delta_TD, norm_weight_D, gate_up_weight_GD, down_weight_DF, eps, recompute)


def feed_forward_reference(
    residual_TD: Tensor,
    delta_TD: Tensor,
    norm_weight_D: Tensor,
    gate_up_weight_GD: Tensor,
    down_weight_DF: Tensor,
    eps: float,
    *,
    recompute: Recompute = "none",
) -> tuple[Tensor, Tensor]:
    total_TD, normed_TD = add_rms_norm_reference(residual_TD, delta_TD, norm_weight_D, eps)
    return total_TD, swiglu_reference(normed_TD @ gate_up_weight_GD.T) @ down_weight_DF.T


class _FeedForward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, residual_TD, delta_TD, norm_weight_D, gate_up_weight_GD, down_weight_DF, eps, recompute):
        total_TD, normed_TD, scale_T = add_norm_forward(residual_TD, delta_TD, norm_weight_D, eps)
        gate_up_TG = normed_TD @ gate_up_weight_GD.T
        product_TF = swiglu(gate_up_TG)
        everything = recompute == "none"
        ctx.save_for_backward(
            total_TD, scale_T, norm_weight_D, gate_up_weight_GD, down_weight_DF, None if recompute == "ffn" else gate_up_TG,
            normed_TD if everything else None, product_TF if everything else None,
        )  # fmt: skip
        ctx.eps = eps
        return total_TD, product_TF @ down_weight_DF.T

    @staticmethod
    def backward(ctx, grad_total_TD, grad_out_TD):
        total_TD, scale_T, norm_weight_D, gate_up_weight_GD, down_weight_DF, *kept = ctx.saved_tensors
        gate_up_TG, normed_TD, product_TF = kept
        if normed_TD is None:
            normed_TD, _ = norm_forward(total_TD, norm_weight_D, ctx.eps)
        if gate_up_TG is None:
            gate_up_TG = normed_TD @ gate_up_weight_GD.T
        # From here on gate and up hold their gradients: nobody else has this buffer.
        emitted_TF = swiglu_backward_(gate_up_TG, grad_out_TD @ down_weight_DF, emit=product_TF is None)
        grad_down_DF = grad_out_TD.T @ (emitted_TF if product_TF is None else product_TF)
        grad_gate_up_weight_GD = gate_up_TG.T @ normed_TD
        grad_normed_TD = gate_up_TG @ gate_up_weight_GD
        grad_input_TD, grad_norm_weight_D = norm_backward(grad_normed_TD, grad_total_TD, total_TD, norm_weight_D, scale_T)
        return grad_input_TD, grad_input_TD, grad_norm_weight_D, grad_gate_up_weight_GD, grad_down_DF, None, None
