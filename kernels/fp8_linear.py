"""The three products of a linear map y = x W^T in FP8: a matrix product of 8-bit floats runs at up to twice the speed of bf16.

The idea. A tensor core multiplies E4M3 numbers (1 sign, 4 exponent, 3 mantissa bits; at most 448) twice as fast as bf16 and
adds the products in float32. So a product costs half if both factors are first written as codes times a scale, x = code *
scale, with scales that leave the sum and multiply the result:

    output            y  = x W^T     y[t, o]  = r_t w     sum over i of x8[t, i] W8[o, i]
    input gradient    dx = dy W      dx[t, i] = s_t w     sum over o of dy8[t, o] W8[o, i]
    weight gradient   dW = dy^T x    dW[o, i] =           sum over t of (s_t dy8[t, o]) (r_t x8[t, i])

Each token has a scale of its own, r_t for its input and s_t for its gradient. So no token's codes depend on its neighbours: an
outlier costs only its own token precision, and the output and the input gradient are the same in any micro-batch. A weight has
one scale w, so that the same codes serve the first two products, as W8 and as its transpose.

In the third product both scales stand inside the sum. Scales are powers of two, therefore they can move into the codes: with C
the largest r_t s_t of the micro-batch, the factor is dy8[t, o] * (r_t s_t / C), again E4M3, and C multiplies the result.
Nothing is rounded a second time, except that codes of tokens with a small r_t s_t underflow, whose share of the sum is as
small. C stays on the device: the host waits for nothing.

What it costs in precision. E4M3 rounds by at most 1/16 of a value, at random: a product of two rounded factors has a relative
error of 3.7 % where its terms have random signs (bf16: 0.3 %). The scales are made from the numbers at hand, never from earlier
steps, so there is no state to save, to lose or to reduce over ranks, and a resumed run continues with the same bits. What it
does to the loss is measured for small models alone: benchmarks/README.md, "Does FP8 change the loss?".

What stays in bf16: embedding, head, norms, attention, and the layers that the settings name (by default the first and the
last). The optimizer never sees FP8; checkpoints hold what they hold otherwise.

How it runs. cuBLAS multiplies (`torch._scaled_mm`), here in three places. Hopper reads both factors along the summed dimension,
hence the transposed codes W8^T, x8^T and dy8^T. A weight's codes are made once an update (`WeightCodes`).

Kernels that write a whole row emit its codes in the same pass. Forward: `kernels.rms_norm` and `kernels.swiglu`, whose rows
then never exist in memory; they make the transposed codes again in the backward pass, from what the block keeps anyway.
Backward: SwiGLU and the rotation emit codes instead of their gradients. The norm emits the codes of its gradient beside it, and
the gradient carries them to the product that it enters next (`carry_codes`). Attention's output takes a pass of its own,
because a token's scale spans all heads and a program of attention has one: the largest value is known only after the last of
them. So do its transposed codes, and the shifted codes of gradients, because C is the largest product of all tokens.

Sources: Micikevicius et al. 2022, https://arxiv.org/abs/2209.05433 (E4M3); Fishman et al. 2024,
https://arxiv.org/abs/2409.12517 (outliers of SwiGLU); the weight gradient's shift is ours.

Shapes: T tokens, I inputs, O outputs, P = T rounded up to a multiple of 16.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from kernels import in_dtype
from kernels.fp8 import Codes, column_codes, matrix_codes, row_codes, shifted_columns
from kernels.linear import leaf, only_adds

# A scale for each token inside the product (rowwise), or one for the product and the tokens' scales applied to its result in a
# pass of their own. Both give the same bits. Chosen by arithmetic, not measured: the pass costs a read and a write of every
# output.
ROWWISE = True
# Whether tensor cores may keep partial sums in fewer bits than float32. Faster, and wrong by up to 2 % on long sums
# (https://arxiv.org/abs/2412.19437, section 3.3.2), as much as half of what E4M3 itself costs: not taken.
FAST_ACCUMULATION = False
# A gradient's attribute: (the gradient's version, its codes).
_CARRIED = "_komainu_fp8_codes"


class WeightCodes:
    """The codes of a model's weights, made from the weight at hand, or inside `unchanged` once for all products.

    keep: whether to keep codes inside `unchanged`: 2 bytes for each element. Weights that are gathered for each pass (FSDP)
    must not be kept, as others take their place.
    """

    def __init__(self, *, keep: bool = True) -> None:
        self.keep = keep
        self._keeping = False
        # A weight's address -> (its codes, the codes transposed, its scale). Activation checkpointing hands out copies of a
        # weight that share its memory.
        self._kept: dict[int, tuple[Tensor, Tensor, Tensor]] = {}

    @contextmanager
    def unchanged(self) -> Iterator[None]:
        """Inside, the weights do not change and stay where they are."""
        self._keeping = self.keep
        try:
            yield
        finally:
            self._keeping = False
            self._kept.clear()

    def rows(self, weight_OI: Tensor) -> tuple[Tensor, Tensor]:
        """(codes [O, I], scale), for the output."""
        code_OI, _, scale = self._codes(weight_OI, rows=True)
        return code_OI, scale

    def columns(self, weight_OI: Tensor) -> tuple[Tensor, Tensor]:
        """(codes transposed [I, O], scale), for the input gradient."""
        _, code_IO, scale = self._codes(weight_OI, rows=False)
        return code_IO, scale

    def _codes(self, weight_OI: Tensor, *, rows: bool) -> tuple[Tensor, Tensor, Tensor]:
        if not self._keeping:
            return matrix_codes(weight_OI, rows=rows, columns=not rows)
        address = weight_OI.data_ptr()
        if address not in self._kept:
            self._kept[address] = matrix_codes(weight_OI)
        return self._kept[address]


def fp8_linear(input_TI: Tensor, weight_OI: Tensor, codes: WeightCodes) -> Tensor:
    """input @ weight^T with all three products in FP8: [T, O] in the inputs' dtype.

    Args: input_TI, weight_OI: of one dtype, bfloat16 on CUDA; I and O multiples of 16.
    """
    return _Fp8Linear.apply(input_TI, weight_OI, codes)


def product(
    left: Codes,  # [T, K]
    right: tuple[Tensor, Tensor],  # codes [N, K] with one scale, from `WeightCodes`
    dtype: torch.dtype,
) -> Tensor:
    """left @ right^T: [T, N]."""
    code_NK, scale = right
    if ROWWISE:
        scale_1N = scale.expand(1, len(code_NK)).contiguous()
        return _multiplied(left.code_TK, code_NK, left.scale_T[:, None], scale_1N, dtype)
    out_TN = _multiplied(left.code_TK, code_NK, torch.ones_like(scale), scale, dtype)
    # Powers of two: the product may be rounded before it is scaled. Not in place, for the reason in `in_dtype`.
    return out_TN * left.scale_T[:, None]


def weight_gradient(
    grad: Codes,  # of the output's gradient, [T, O]
    input_code_IP: Tensor,  # transposed
    input_scale_T: Tensor,
    parameter_OI: Tensor | None,  # from `kernels.linear.leaf`
    dtype: torch.dtype,
) -> Tensor | None:
    """grad^T @ input, added to the parameter's gradient, then None; or the product [O, I] for autograd to add.

    The product is float32 where the parameter's gradients are float32, else of `dtype`.
    """
    sum_OI = parameter_OI.grad if parameter_OI is not None and only_adds(parameter_OI) else None
    wide = sum_OI is not None or (parameter_OI is not None and parameter_OI.grad_dtype == torch.float32)
    grad_code_OP, common_8 = shifted_columns(grad, input_scale_T)
    product_OI = _multiplied(grad_code_OP, input_code_IP, common_8[0], common_8[4], torch.float32 if wide else dtype)
    if sum_OI is None:
        return product_OI
    # cuBLAS adds FP8 products to nothing: the sum takes a pass of its own, and is rounded once.
    sum_OI.add_(product_OI)
    return None


def carry_codes(grad_TK: Tensor, codes: Codes) -> None:
    """Let a gradient carry its codes to `gradient_codes`; they end with it.

    Autograd hands this very object to the next backward function, unless it adds something to it.
    """
    if not torch.compiler.is_compiling():  # a graph has no objects
        setattr(grad_TK, _CARRIED, (grad_TK._version, codes))


def gradient_codes(grad_TK: Tensor) -> Codes:
    """The codes of a gradient: those that it carries, once, or else from a pass over it."""
    version, codes = None, None
    if not torch.compiler.is_compiling():
        version, codes = vars(grad_TK).pop(_CARRIED, (None, None))
    return codes if codes is not None and version == grad_TK._version else row_codes(grad_TK)


def _multiplied(
    left_MK: Tensor,  # codes
    right_NK: Tensor,  # codes
    left_scale: Tensor,  # float32: [M, 1], or [] for one scale
    right_scale: Tensor,  # float32: [1, N], or []
    dtype: torch.dtype,
) -> Tensor:
    """(left * its scale) @ (right * its scale)^T: [M, N], rounded once to `dtype`."""
    if left_MK.is_cuda and len(left_MK):
        return torch._scaled_mm(
            left_MK,
            right_NK.T,
            scale_a=left_scale,
            scale_b=right_scale,
            out_dtype=dtype,
            use_fast_accum=FAST_ACCUMULATION,
        )
    # The same sums; torch's own operator is up to a thousand times slower on a CPU.
    return in_dtype(left_MK.float() @ right_NK.float().T * left_scale * right_scale, dtype)


class _Fp8Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, input_TI, weight_OI, codes):
        rows = row_codes(input_TI)
        ctx.save_for_backward(input_TI, rows.scale_T, weight_OI)
        ctx.leaf, ctx.codes = leaf(weight_OI), codes
        return product(rows, codes.rows(weight_OI), input_TI.dtype)

    @staticmethod
    def backward(ctx, grad_TO):
        input_TI, scale_T, weight_OI = ctx.saved_tensors
        needs_input, needs_weight, _ = ctx.needs_input_grad
        grad = gradient_codes(grad_TO)
        grad_input_TI = product(grad, ctx.codes.columns(weight_OI), grad_TO.dtype) if needs_input else None
        if not needs_weight:
            return grad_input_TI, None, None
        input_code_IP = column_codes(input_TI, scale_T)
        return grad_input_TI, weight_gradient(grad, input_code_IP, scale_T, ctx.leaf, grad_TO.dtype), None
