"""SwiGLU (Shazeer 2020, https://arxiv.org/abs/2002.05202): silu(gate) * up, with silu(x) = x sigmoid(x).

With s = sigmoid(gate), for a gradient g of the product:

    d gate = g up s (1 + gate (1 - s)),   d up = g gate s

The backward pass can overwrite gate and up by their gradients and return the product again. The weight gradient of the next
matrix needs the product, so nobody has to keep it.

Shapes: T tokens, F feed-forward size, F2 = 2F.
"""

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from kernels import accumulation_dtype
from kernels.configurations import configuration
from kernels.fp8 import (
    Codes,
    column_codes,
    empty_codes,
    empty_row_codes,
    encode,
    inverse_of,
    launch_columns,
    launch_rows,
    padded,
    row_codes,
    store_columns,
    store_row,
    store_two_parts,
    tile_of,
)
from kernels.launch import launch, operator, runs_triton, unit_stride


def swiglu(gate_up_TF2: Tensor) -> Tensor:
    """silu(gate) * up.

    Args: gate_up_TF2: the gate in the first F columns, the up projection in the last F.
    Returns: [T, F] in the same dtype, computed in float32 and rounded once.
    """
    return (_swiglu if runs_triton(gate_up_TF2) else swiglu_reference)(gate_up_TF2)


def swiglu_reference(gate_up_TF2: Tensor) -> Tensor:
    gate_TF, up_TF = gate_up_TF2.to(accumulation_dtype(gate_up_TF2.dtype)).chunk(2, dim=-1)
    return (F.silu(gate_TF) * up_TF).to(gate_up_TF2.dtype)


def swiglu_backward_(gate_up_TF2: Tensor, grad_TF: Tensor, *, emit: bool) -> Tensor | None:
    """Overwrite gate and up by their gradients.

    Args: gate_up_TF2: contiguous rows without another reader. grad_TF: gradient of the product.
    Returns: with `emit` the product [T, F], to the bit as in the forward pass, else None.
    """
    if runs_triton(gate_up_TF2):
        product_TF = _swiglu_backward_(gate_up_TF2, grad_TF, emit)
        return product_TF if emit else None
    product_TF = swiglu_reference(gate_up_TF2) if emit else None
    gate_up_TF2.copy_(_backward_eager(gate_up_TF2, grad_TF))
    return product_TF


def swiglu_codes(gate_up_TF2: Tensor) -> Codes:
    """E4M3 codes of the product, in one pass; the product itself is not written."""
    if runs_triton(gate_up_TF2):
        return Codes(*_swiglu_codes(gate_up_TF2))
    return row_codes(swiglu_reference(gate_up_TF2))


def swiglu_columns(gate_up_TF2: Tensor, code_scale_T: Tensor) -> Tensor:
    """The codes of `swiglu_codes` again, transposed: [F, P] (see `kernels.fp8`)."""
    if runs_triton(gate_up_TF2):
        return _swiglu_columns(gate_up_TF2, code_scale_T)
    return column_codes(swiglu_reference(gate_up_TF2), code_scale_T)


def swiglu_backward_codes(gate_up_TF2: Tensor, grad_TF: Tensor) -> Codes:
    """E4M3 codes of the gradients of gate and up: one row of both, with one scale."""
    if runs_triton(gate_up_TF2):
        return Codes(*_swiglu_backward_codes(gate_up_TF2, grad_TF))
    return row_codes(_backward_eager(gate_up_TF2, grad_TF).to(gate_up_TF2.dtype))


@operator("komainu::swiglu")
def _swiglu(gate_up_TF2: Tensor) -> Tensor:
    gate_up_TF2 = unit_stride(gate_up_TF2)
    out_TF = _product_of(gate_up_TF2)
    width = out_TF.shape[1]
    config = configuration("swiglu", gate_up_TF2.device)
    launch(
        _forward_kernel,
        (out_TF.shape[0] * triton.cdiv(width, config.block),),
        gate_up_TF2,
        out_TF,
        gate_up_TF2.stride(0),
        WIDTH=width,
        BLOCK=config.block,
        device=gate_up_TF2.device,
        warps=config.warps,
        fusion=False,
    )
    return out_TF


@operator("komainu::swiglu_backward")
def _swiglu_backward(gate_up_TF2: Tensor, grad_TF: Tensor) -> Tensor:
    grad_gate_up_TF2 = torch.empty(gate_up_TF2.shape, dtype=gate_up_TF2.dtype, device=gate_up_TF2.device)
    _launch_backward(unit_stride(gate_up_TF2), grad_TF, grad_gate_up_TF2, None)
    return grad_gate_up_TF2


@operator("komainu::swiglu_backward_", mutates=("gate_up_TF2",))
def _swiglu_backward_(gate_up_TF2: Tensor, grad_TF: Tensor, emit: bool) -> Tensor:
    assert gate_up_TF2.stride(-1) == 1, "a copy would be overwritten instead"
    product_TF = _product_of(gate_up_TF2) if emit else gate_up_TF2.new_empty(0)
    _launch_backward(gate_up_TF2, grad_TF, gate_up_TF2, product_TF if emit else None)
    return product_TF


def _launch_backward(gate_up_TF2: Tensor, grad_TF: Tensor, grad_gate_up_TF2: Tensor, product_TF: Tensor | None) -> None:
    grad_TF = unit_stride(grad_TF)
    tokens, width = grad_TF.shape
    config = configuration("swiglu_backward", grad_TF.device)
    launch(
        _backward_kernel,
        (tokens * triton.cdiv(width, config.block),),
        gate_up_TF2,
        grad_TF,
        grad_gate_up_TF2,
        grad_TF if product_TF is None else product_TF,
        gate_up_TF2.stride(0),
        grad_TF.stride(0),
        grad_gate_up_TF2.stride(0),
        WIDTH=width,
        BLOCK=config.block,
        EMIT=product_TF is not None,
        device=grad_TF.device,
        warps=config.warps,
        fusion=False,
    )


@operator("komainu::swiglu_codes")
def _swiglu_codes(gate_up_TF2: Tensor) -> tuple[Tensor, Tensor]:
    gate_up_TF2 = unit_stride(gate_up_TF2)
    given = (gate_up_TF2, gate_up_TF2.stride(0))
    return launch_rows(_codes_kernel, given, gate_up_TF2, gate_up_TF2.shape[1] // 2, chosen="swiglu_codes")


@operator("komainu::swiglu_columns")
def _swiglu_columns(gate_up_TF2: Tensor, code_scale_T: Tensor) -> Tensor:
    gate_up_TF2 = unit_stride(gate_up_TF2)
    given = (gate_up_TF2, code_scale_T, gate_up_TF2.stride(0))
    return launch_columns(_columns_kernel, given, gate_up_TF2, gate_up_TF2.shape[1] // 2)


@operator("komainu::swiglu_backward_codes")
def _swiglu_backward_codes(gate_up_TF2: Tensor, grad_TF: Tensor) -> tuple[Tensor, Tensor]:
    gate_up_TF2, grad_TF = unit_stride(gate_up_TF2), unit_stride(grad_TF)
    given = (gate_up_TF2, grad_TF, gate_up_TF2.stride(0), grad_TF.stride(0))
    return launch_rows(_backward_codes_kernel, given, grad_TF, grad_TF.shape[1], chosen="swiglu_codes", parts=2)


def _product_of(gate_up_TF2: Tensor) -> Tensor:
    tokens, both = gate_up_TF2.shape
    return torch.empty((tokens, both // 2), dtype=gate_up_TF2.dtype, device=gate_up_TF2.device)


@_swiglu.register_fake
def _(gate_up_TF2):
    return _product_of(gate_up_TF2)


@_swiglu_backward.register_fake
def _(gate_up_TF2, grad_TF):
    return torch.empty(gate_up_TF2.shape, dtype=gate_up_TF2.dtype, device=gate_up_TF2.device)


@_swiglu_backward_.register_fake
def _(gate_up_TF2, grad_TF, emit):
    return _product_of(gate_up_TF2) if emit else gate_up_TF2.new_empty(0)


@_swiglu_codes.register_fake
def _(gate_up_TF2):
    return empty_row_codes(gate_up_TF2, gate_up_TF2.shape[1] // 2)


@_swiglu_columns.register_fake
def _(gate_up_TF2, code_scale_T):
    return empty_codes(gate_up_TF2, gate_up_TF2.shape[1] // 2, padded(len(gate_up_TF2)))


@_swiglu_backward_codes.register_fake
def _(gate_up_TF2, grad_TF):
    return empty_row_codes(gate_up_TF2, gate_up_TF2.shape[1])


_swiglu.register_autograd(
    lambda ctx, grad_TF: _swiglu_backward(ctx.saved_tensors[0], grad_TF),
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(inputs[0]),
)


def _backward_eager(gate_up_TF2: Tensor, grad_TF: Tensor) -> Tensor:
    wide = accumulation_dtype(gate_up_TF2.dtype)
    gate_TF, up_TF = gate_up_TF2.to(wide).chunk(2, dim=-1)
    grad_TF, share_TF = grad_TF.to(wide), torch.sigmoid(gate_TF)
    grad_gate_TF = grad_TF * up_TF * share_TF * (1 + gate_TF * (1 - share_TF))
    return torch.cat((grad_gate_TF, grad_TF * gate_TF * share_TF), dim=-1)


@triton.jit
def _place(WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """(row, columns) of this program: one block of one row, because a whole row would leave most of a multiprocessor idle.

    Neighbours in memory run next to each other in time.
    """
    blocks: tl.constexpr = (WIDTH + BLOCK - 1) // BLOCK
    program = tl.program_id(0)
    return (program // blocks).to(tl.int64), (program % blocks) * BLOCK + tl.arange(0, BLOCK)


@triton.jit
def _gradients(gate, up, g):
    """(gradient of the gate, gradient of the up projection, sigmoid of the gate), for a gradient g of the product."""
    share = tl.sigmoid(gate)
    return g * up * share * (1 + gate * (1 - share)), g * gate * share, share


@triton.jit
def _forward_kernel(
    gate_up,  # [tokens, 2 WIDTH]
    out,  # [tokens, WIDTH]
    row_stride,  # elements from row to row of gate_up
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,  # columns of a program
):
    row, column = _place(WIDTH, BLOCK)
    inside = column < WIDTH
    gate = tl.load(gate_up + row * row_stride + column, mask=inside).to(tl.float32)
    up = tl.load(gate_up + row * row_stride + WIDTH + column, mask=inside).to(tl.float32)
    product = gate * tl.sigmoid(gate) * up
    tl.store(out + row * WIDTH + column, product.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _backward_kernel(
    gate_up,  # [tokens, 2 WIDTH]
    grad,  # [tokens, WIDTH]
    grad_gate_up,  # [tokens, 2 WIDTH]; may be gate_up
    product,  # [tokens, WIDTH], written if EMIT
    row_stride,  # elements from row to row
    grad_stride,
    grad_gate_up_stride,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,  # columns of a program
    EMIT: tl.constexpr,
):
    row, column = _place(WIDTH, BLOCK)
    inside = column < WIDTH
    gate = tl.load(gate_up + row * row_stride + column, mask=inside).to(tl.float32)
    up = tl.load(gate_up + row * row_stride + WIDTH + column, mask=inside).to(tl.float32)
    g = tl.load(grad + row * grad_stride + column, mask=inside).to(tl.float32)
    grad_gate, grad_up, share = _gradients(gate, up, g)
    target = grad_gate_up + row * grad_gate_up_stride + column
    tl.store(target, grad_gate.to(grad_gate_up.dtype.element_ty), mask=inside)
    tl.store(target + WIDTH, grad_up.to(grad_gate_up.dtype.element_ty), mask=inside)
    if EMIT:
        tl.store(product + row * WIDTH + column, (gate * share * up).to(product.dtype.element_ty), mask=inside)


@triton.jit
def _codes_kernel(
    gate_up,  # [tokens, 2 WIDTH]
    row_stride,  # elements from row to row of gate_up
    code,  # [tokens, WIDTH]
    scale,  # [tokens] float32
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,  # WIDTH up to a power of two
):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < WIDTH
    gate = tl.load(gate_up + row * row_stride + column, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_up + row * row_stride + WIDTH + column, mask=inside, other=0.0).to(tl.float32)
    # Codes are made of rounded values: the same codes as in a pass of their own.
    product = (gate * tl.sigmoid(gate) * up).to(gate_up.dtype.element_ty)
    store_row(product.to(tl.float32), code + row * WIDTH, scale + row, column, inside)


@triton.jit(do_not_specialize=["tokens", "groups"])
def _columns_kernel(
    gate_up,  # [tokens, 2 WIDTH]
    scale,  # [tokens] float32
    row_stride,  # elements from row to row of gate_up
    target,  # [WIDTH, 16 groups]: codes
    tokens,
    groups,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,  # rows of a program's tile
    BLOCK: tl.constexpr,  # columns of a program's tile
):
    row, column, inside = tile_of(tokens, WIDTH, ROWS, BLOCK)
    at = gate_up + row.to(tl.int64)[:, None] * row_stride + column[None, :]
    gate = tl.load(at, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(at + WIDTH, mask=inside, other=0.0).to(tl.float32)
    product = (gate * tl.sigmoid(gate) * up).to(gate_up.dtype.element_ty).to(tl.float32)
    inverse = inverse_of(tl.load(scale + row, mask=row < tokens, other=1.0))
    store_columns(encode(product, inverse[:, None]), target, row, column, groups, WIDTH)


@triton.jit
def _backward_codes_kernel(
    gate_up,  # [tokens, 2 WIDTH]
    grad,  # [tokens, WIDTH]
    row_stride,  # elements from row to row of gate_up
    grad_stride,
    code,  # [tokens, 2 WIDTH]
    scale,  # [tokens] float32
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,  # WIDTH up to a power of two
):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < WIDTH
    gate = tl.load(gate_up + row * row_stride + column, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_up + row * row_stride + WIDTH + column, mask=inside, other=0.0).to(tl.float32)
    g = tl.load(grad + row * grad_stride + column, mask=inside, other=0.0).to(tl.float32)
    grad_gate, grad_up, _ = _gradients(gate, up, g)
    grad_gate = grad_gate.to(gate_up.dtype.element_ty).to(tl.float32)
    grad_up = grad_up.to(gate_up.dtype.element_ty).to(tl.float32)
    store_two_parts(grad_gate, grad_up, code + row * 2 * WIDTH, scale + row, column, inside, WIDTH)
