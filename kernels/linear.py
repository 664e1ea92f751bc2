"""The three products of a linear map y = x W^T, and where the gradient of its weight goes.

    output            y  = x W^T     `linear`, or x @ weight.T inside a function of its own
    input gradient    dx = dy W      dy @ weight
    weight gradient   dW = dy^T x    `weight_gradient`

Gradient accumulation. Autograd adds a weight's gradient to `weight.grad` in a pass of its own: dW is written, then dW and the
sum are read and the sum is written. From a step's second micro-batch on, `weight_gradient` lets the product add to the sum
itself and hands autograd nothing: no dW in memory, and one rounding of the sum instead of two. A sum in float32
(`weight.grad_dtype`) takes float32 products from the first micro-batch on: no product is rounded to bfloat16.

Autograd keeps its own way wherever it would do more than add: hooks on the parameter, `torch.autograd.grad`, a second
derivative, `torch.compile`. Hooks on the AccumulateGrad node, as DistributedDataParallel sets them, cannot be seen: it is not
supported.

Shapes: T tokens, I inputs, O outputs, N, M and D of any product.
"""

import torch
from torch import Tensor

from kernels import accumulation_dtype


def linear(input_TI: Tensor, weight_OI: Tensor) -> Tensor:
    """input @ weight^T: [T, O], in their dtype. Makes only the gradients that are needed."""
    return _Linear.apply(input_TI, weight_OI)


def leaf(weight: Tensor) -> Tensor | None:
    """The parameter that a backward pass may add a gradient to, None where autograd has to add it.

    A forward pass keeps this beside the saved tensors, because activation checkpointing hands back detached copies of those.
    """
    return weight if weight.is_leaf and not torch.compiler.is_compiling() else None


def weight_gradient(
    grad_TO: Tensor,
    input_TI: Tensor,
    parameter_OI: Tensor | None,  # from `leaf`
) -> Tensor | None:
    """grad^T @ input, added to the parameter's gradient, then None; or the product [O, I] for autograd to add.

    The product is float32 where the parameter's gradients are float32, else of the inputs' dtype.
    """
    if parameter_OI is None:
        return grad_TO.T @ input_TI
    sum_OI = parameter_OI.grad
    if sum_OI is not None and only_adds(parameter_OI):
        add_product_(sum_OI, grad_TO.T, input_TI)
        return None
    if parameter_OI.grad_dtype == accumulation_dtype(grad_TO.dtype):
        return wide_product(grad_TO.T, input_TI.T)
    return grad_TO.T @ input_TI


def wide_product(left_ND: Tensor, right_MD: Tensor, out: Tensor | None = None) -> Tensor:
    """left @ right^T accumulated and returned in float32 (float64 for float64), whatever the inputs' dtype: [N, M]."""
    wide = accumulation_dtype(left_ND.dtype)
    if left_ND.is_cuda and left_ND.dtype != wide:
        return torch.mm(left_ND, right_MD.T, out_dtype=wide)
    return torch.mm(left_ND.to(wide), right_MD.to(wide).T, out=out)


def add_product_(
    sum_NM: Tensor,  # of the factors' dtype, or float32
    left_ND: Tensor,
    right_DM: Tensor,
) -> None:
    """sum += left @ right, rounded once to the sum's dtype. On CUDA nothing but the sum is written (torch 2.10 or later)."""
    if sum_NM.dtype == left_ND.dtype:
        torch.addmm(sum_NM, left_ND, right_DM, out=sum_NM)
    elif sum_NM.is_cuda:
        torch.addmm(sum_NM, left_ND, right_DM, out_dtype=sum_NM.dtype, out=sum_NM)
    else:
        torch.addmm(sum_NM, left_ND.to(sum_NM.dtype), right_DM.to(sum_NM.dtype), out=sum_NM)


def only_adds(parameter: Tensor) -> bool:
    """Whether the running backward pass would do nothing with the parameter's gradient but add it to an earlier one."""
    if type(parameter.grad) is not Tensor or torch.is_grad_enabled():
        return False
    if parameter._backward_hooks or parameter._post_accumulate_grad_hooks:
        return False
    node = torch.autograd.graph.get_gradient_edge(parameter).node
    try:
        return torch._C._will_engine_execute_node(node)
    except RuntimeError:  # torch refuses to answer in `torch.autograd.grad`, which adds to no parameter
        return False


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, input_TI, weight_OI):
        ctx.save_for_backward(input_TI if ctx.needs_input_grad[1] else None, weight_OI)
        ctx.leaf = leaf(weight_OI)
        return input_TI @ weight_OI.T

    @staticmethod
    def backward(ctx, grad_TO):
        input_TI, weight_OI = ctx.saved_tensors
        needs_input, needs_weight = ctx.needs_input_grad
        grad_input_TI = grad_TO @ weight_OI if needs_input else None
        return grad_input_TI, weight_gradient(grad_TO, input_TI, ctx.leaf) if needs_weight else None
