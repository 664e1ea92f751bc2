"""Root-mean-square normalisation (Zhang and Sennrich 2019, https://arxiv.org/abs/1910.07467, equation 4).

With s = (mean(x^2) + eps)^(-1/2), out = x s w. For a gradient g of out:

    dx = s (g w - x s^2 mean(g w x)),   dw = sum over rows of g x s

dw is summed in two stages of fixed order: each program sums its rows, then a second kernel adds up the programs' sums.

Shapes: T tokens, D width, P partial sums.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels import accumulation_dtype, in_dtype
from kernels.configurations import configuration
from kernels.fp8 import (
    Codes,
    column_codes,
    empty_codes,
    empty_row_codes,
    encode,
    inverse_of,
    launch_columns,
    padded,
    row_codes,
    store_columns,
    store_row,
    tile_of,
)
from kernels.launch import launch, multiprocessors, operator, runs_triton, unit_stride


def rms_norm(hidden_TD: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """hidden / sqrt(mean(hidden^2) + eps) * weight, row by row.

    Args: hidden_TD and weight_D of one floating dtype; eps is added to the mean of squares.
    Returns: [T, D] in the dtype of `hidden_TD`, computed in float32 and rounded once.
    """
    return norm_forward(hidden_TD, weight_D, eps)[0]


def add_rms_norm(residual_TD: Tensor, hidden_TD: Tensor, weight_D: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Add a block's output to the residual stream and normalise the sum.

    Returns: (residual + hidden, its RMS norm), both [T, D] in the dtype of `residual_TD`. The sum is rounded to that dtype
        before the norm, because the next block's residual holds the rounded sum.
    """
    return add_norm_forward(residual_TD, hidden_TD, weight_D, eps)[:2]


def rms_norm_reference(hidden_TD: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    return _norm_eager(hidden_TD, weight_D, eps)[0]


def add_rms_norm_reference(residual_TD: Tensor, hidden_TD: Tensor, weight_D: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    total_TD = residual_TD + hidden_TD
    return total_TD, rms_norm_reference(total_TD, weight_D, eps)


# Steps of the operators above, and of `norm_qkv` and `feed_forward`.


def norm_forward(hidden_TD: Tensor, weight_D: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """(norm [T, D], scale s of each row [T] in float32)."""
    return (_norm if runs_triton(hidden_TD) else _norm_eager)(hidden_TD, weight_D, eps)


def add_norm_forward(residual_TD: Tensor, hidden_TD: Tensor, weight_D: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """(residual + hidden [T, D], its norm [T, D], scale s of each row [T] in float32)."""
    if runs_triton(residual_TD):
        return _add_norm(residual_TD, hidden_TD, weight_D, eps)
    total_TD = residual_TD + hidden_TD
    return total_TD, *_norm_eager(total_TD, weight_D, eps)


def norm_codes(hidden_TD: Tensor, weight_D: Tensor, eps: float) -> tuple[Codes, Tensor]:
    """(E4M3 codes of the norm, scale s of each row [T] in float32), in one pass; the norm itself is not written."""
    if runs_triton(hidden_TD):
        *codes, scale_T = _norm_codes(hidden_TD, weight_D, eps)
        return Codes(*codes), scale_T
    out_TD, scale_T = _norm_eager(hidden_TD, weight_D, eps)
    return row_codes(out_TD), scale_T


def add_norm_codes(residual_TD: Tensor, hidden_TD: Tensor, weight_D: Tensor, eps: float) -> tuple[Tensor, Codes, Tensor]:
    """(residual + hidden [T, D], E4M3 codes of its norm, scale s of each row [T] in float32)."""
    if runs_triton(residual_TD):
        total_TD, *codes, scale_T = _add_norm_codes(residual_TD, hidden_TD, weight_D, eps)
        return total_TD, Codes(*codes), scale_T
    total_TD = residual_TD + hidden_TD
    return total_TD, *norm_codes(total_TD, weight_D, eps)


def norm_columns(
    total_TD: Tensor,  # the input rows
    weight_D: Tensor,
    scale_T: Tensor,  # s of each row
    code_scale_T: Tensor,  # of the codes
) -> Tensor:
    """The codes of `norm_codes` again, transposed: [D, P] (see `kernels.fp8`)."""
    if runs_triton(total_TD):
        return _norm_columns(total_TD, weight_D, scale_T, code_scale_T)
    return column_codes((total_TD.to(scale_T.dtype) * scale_T[:, None] * weight_D).to(total_TD.dtype), code_scale_T)


def norm_backward(
    grad_TD: Tensor, grad_total_TD: Tensor | None, total_TD: Tensor, weight_D: Tensor, scale_T: Tensor
) -> tuple[Tensor, Tensor]:
    """(gradient of the input rows [T, D], gradient of the weight [D]).

    Args:
        grad_TD: gradient of the norm. grad_total_TD: gradient of the input rows from their other use, or None.
        total_TD: the input rows. scale_T: s of each row.
    """
    step = _norm_backward if runs_triton(total_TD) else _norm_backward_eager
    return step(grad_TD, grad_total_TD, total_TD, weight_D, scale_T)


def norm_backward_codes(
    grad_TD: Tensor, grad_total_TD: Tensor | None, total_TD: Tensor, weight_D: Tensor, scale_T: Tensor
) -> tuple[Tensor, Tensor, Codes]:
    """`norm_backward`, and the E4M3 codes of the gradient of the input rows, in one pass."""
    given = (grad_TD, grad_total_TD, total_TD, weight_D, scale_T)
    if runs_triton(total_TD):
        grad_input_TD, grad_weight_D, *codes = _norm_backward_codes(*given)
        return grad_input_TD, grad_weight_D, Codes(*codes)
    grad_input_TD, grad_weight_D = _norm_backward_eager(*given)
    return grad_input_TD, grad_weight_D, row_codes(grad_input_TD)


@operator("komainu::rms_norm")
def _norm(hidden_TD: Tensor, weight_D: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    out_TD, scale_T = _norm_outputs(hidden_TD)
    _launch_forward(None, hidden_TD, weight_D, eps, None, out_TD, scale_T)
    return out_TD, scale_T


@operator("komainu::add_rms_norm")
def _add_norm(residual_TD: Tensor, hidden_TD: Tensor, weight_D: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    out_TD, scale_T = _norm_outputs(residual_TD)
    total_TD = torch.empty_like(out_TD)
    _launch_forward(residual_TD, hidden_TD, weight_D, eps, total_TD, out_TD, scale_T)
    return total_TD, out_TD, scale_T


@operator("komainu::rms_norm_backward")
def _norm_backward(
    grad_TD: Tensor, grad_total_TD: Tensor | None, total_TD: Tensor, weight_D: Tensor, scale_T: Tensor
) -> tuple[Tensor, Tensor]:
    return _launch_backward(grad_TD, grad_total_TD, total_TD, weight_D, scale_T, None)


@operator("komainu::rms_norm_backward_codes")
def _norm_backward_codes(
    grad_TD: Tensor, grad_total_TD: Tensor | None, total_TD: Tensor, weight_D: Tensor, scale_T: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    codes = empty_row_codes(total_TD, total_TD.shape[1])
    return *_launch_backward(grad_TD, grad_total_TD, total_TD, weight_D, scale_T, codes), *codes


def _launch_backward(
    grad_TD: Tensor,
    grad_total_TD: Tensor | None,
    total_TD: Tensor,
    weight_D: Tensor,
    scale_T: Tensor,
    codes: tuple[Tensor, Tensor] | None,  # results: codes of the first result, and their scales
) -> tuple[Tensor, Tensor]:
    tokens, width = total_TD.shape
    device = total_TD.device
    config = configuration("rms_norm_backward", device)
    programs = min(tokens, config.programs * multiprocessors(device))
    grad_input_TD = torch.empty((tokens, width), dtype=total_TD.dtype, device=device)
    partial_PD = torch.empty((programs, width), dtype=torch.float32, device=device)
    grad_TD, total_TD, weight_D = unit_stride(grad_TD), unit_stride(total_TD), unit_stride(weight_D)
    added = grad_total_TD is not None
    grad_total_TD = unit_stride(grad_total_TD) if grad_total_TD is not None else grad_TD
    block, warps = config.whole_row(width)
    launch(
        _backward_kernel,
        (programs,),
        grad_TD,
        grad_total_TD,
        total_TD,
        weight_D,
        scale_T,
        grad_input_TD,
        *(codes or (grad_input_TD, scale_T)),
        partial_PD,
        tokens,
        grad_TD.stride(0),
        grad_total_TD.stride(0),
        total_TD.stride(0),
        WIDTH=width,
        BLOCK=block,
        ADDED=added,
        CODES=codes is not None,
        device=device,
        warps=warps,
    )
    return grad_input_TD, sum_rows(partial_PD, weight_D.dtype)


def sum_rows(partial_PD: Tensor, dtype: torch.dtype) -> Tensor:
    """Sum over the rows of a contiguous float32 [P, D], in a fixed order: [D] in `dtype`."""
    programs, width = partial_PD.shape
    config = configuration("sum_rows", partial_PD.device)
    out_D = torch.empty(width, dtype=dtype, device=partial_PD.device)
    launch(
        _sum_rows_kernel,
        (triton.cdiv(width, config.block),),
        partial_PD,
        out_D,
        programs,
        WIDTH=width,
        BLOCK=config.block,
        ROWS=config.rows,
        device=partial_PD.device,
        warps=config.warps,
    )
    return out_D


@operator("komainu::norm_codes")
def _norm_codes(hidden_TD: Tensor, weight_D: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    code_TD, code_scale_T, scale_T = _code_outputs(hidden_TD)
    _launch_forward(None, hidden_TD, weight_D, eps, None, code_TD, scale_T, code_scale_T)
    return code_TD, code_scale_T, scale_T


@operator("komainu::add_norm_codes")
def _add_norm_codes(
    residual_TD: Tensor, hidden_TD: Tensor, weight_D: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    code_TD, code_scale_T, scale_T = _code_outputs(residual_TD)
    total_TD = torch.empty(residual_TD.shape, dtype=residual_TD.dtype, device=residual_TD.device)
    _launch_forward(residual_TD, hidden_TD, weight_D, eps, total_TD, code_TD, scale_T, code_scale_T)
    return total_TD, code_TD, code_scale_T, scale_T


@operator("komainu::norm_columns")
def _norm_columns(total_TD: Tensor, weight_D: Tensor, scale_T: Tensor, code_scale_T: Tensor) -> Tensor:
    total_TD, weight_D = unit_stride(total_TD), unit_stride(weight_D)
    given = (total_TD, weight_D, scale_T, code_scale_T, total_TD.stride(0))
    return launch_columns(_columns_kernel, given, total_TD, total_TD.shape[1])


def _code_outputs(hidden_TD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(codes, scales of the codes, scales of the norm), without values."""
    code_TD, code_scale_T = empty_row_codes(hidden_TD, hidden_TD.shape[1])
    return code_TD, code_scale_T, torch.empty_like(code_scale_T)


def _norm_outputs(hidden_TD: Tensor) -> tuple[Tensor, Tensor]:
    scale_T = torch.empty(hidden_TD.shape[0], dtype=accumulation_dtype(hidden_TD.dtype), device=hidden_TD.device)
    return torch.empty(hidden_TD.shape, dtype=hidden_TD.dtype, device=hidden_TD.device), scale_T


def _launch_forward(
    residual_TD: Tensor | None,
    hidden_TD: Tensor,
    weight_D: Tensor,
    eps: float,
    total_TD: Tensor | None,  # result, with a residual
    out_TD: Tensor,  # result: the norm, or its codes
    scale_T: Tensor,  # result, float32
    code_scale_T: Tensor | None = None,  # result, with codes
) -> None:
    tokens, width = hidden_TD.shape
    hidden_TD, weight_D = unit_stride(hidden_TD), unit_stride(weight_D)
    added = residual_TD is not None
    residual_TD = hidden_TD if residual_TD is None else unit_stride(residual_TD)
    block, warps = configuration("rms_norm", hidden_TD.device).whole_row(width)
    launch(
        _forward_kernel,
        (tokens,),
        residual_TD,
        hidden_TD,
        weight_D,
        out_TD if total_TD is None else total_TD,
        out_TD,
        scale_T,
        scale_T if code_scale_T is None else code_scale_T,
        residual_TD.stride(0),
        hidden_TD.stride(0),
        eps,
        WIDTH=width,
        BLOCK=block,
        ADDED=added,
        CODES=code_scale_T is not None,
        device=hidden_TD.device,
        warps=warps,
        fusion=False,
    )


@_norm.register_fake
def _(hidden_TD, weight_D, eps):
    return _norm_outputs(hidden_TD)


@_add_norm.register_fake
def _(residual_TD, hidden_TD, weight_D, eps):
    out_TD, scale_T = _norm_outputs(residual_TD)
    return torch.empty_like(out_TD), out_TD, scale_T


@_norm_codes.register_fake
def _(hidden_TD, weight_D, eps):
    return _code_outputs(hidden_TD)


@_add_norm_codes.register_fake
def _(residual_TD, hidden_TD, weight_D, eps):
    return torch.empty(residual_TD.shape, dtype=residual_TD.dtype, device=residual_TD.device), *_code_outputs(residual_TD)


@_norm_columns.register_fake
def _(total_TD, weight_D, scale_T, code_scale_T):
    return empty_codes(total_TD, total_TD.shape[1], padded(len(total_TD)))


@_norm_backward.register_fake
def _(grad_TD, grad_total_TD, total_TD, weight_D, scale_T):
    return torch.empty(total_TD.shape, dtype=total_TD.dtype, device=total_TD.device), torch.empty_like(weight_D)


@_norm_backward_codes.register_fake
def _(grad_TD, grad_total_TD, total_TD, weight_D, scale_T):
    grad_input_TD = torch.empty(total_TD.shape, dtype=total_TD.dtype, device=total_TD.device)
    return grad_input_TD, torch.empty_like(weight_D), *empty_row_codes(total_TD, total_TD.shape[1])


def _save_norm(ctx, inputs, output) -> None:
    hidden_TD, weight_D, _ = inputs
    ctx.save_for_backward(hidden_TD, weight_D, output[1])


def _save_add_norm(ctx, inputs, output) -> None:
    ctx.save_for_backward(output[0], inputs[2], output[2])


def _differentiate_norm(ctx, grad_TD, _):
    hidden_TD, weight_D, scale_T = ctx.saved_tensors
    return *norm_backward(grad_TD, None, hidden_TD, weight_D, scale_T), None


def _differentiate_add_norm(ctx, grad_total_TD, grad_TD, _):
    grad_input_TD, grad_weight_D = norm_backward(grad_TD, grad_total_TD, *ctx.saved_tensors)
    return grad_input_TD, grad_input_TD, grad_weight_D, None


_norm.register_autograd(_differentiate_norm, setup_context=_save_norm)
_add_norm.register_autograd(_differentiate_add_norm, setup_context=_save_add_norm)


def _norm_eager(hidden_TD: Tensor, weight_D: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    wide_TD = in_dtype(hidden_TD, accumulation_dtype(hidden_TD.dtype))
    scale_T = torch.rsqrt(wide_TD.square().mean(dim=-1) + eps)
    return in_dtype(wide_TD * scale_T[:, None] * weight_D, hidden_TD.dtype), scale_T


def _norm_backward_eager(grad_TD, grad_total_TD, total_TD, weight_D, scale_T) -> tuple[Tensor, Tensor]:
    wide_TD, grad_TD = total_TD.to(scale_T.dtype), grad_TD.to(scale_T.dtype)
    normed_TD = wide_TD * scale_T[:, None]
    weighted_TD = grad_TD * weight_D
    grad_input_TD = (weighted_TD - normed_TD * (weighted_TD * normed_TD).mean(dim=-1, keepdim=True)) * scale_T[:, None]
    if grad_total_TD is not None:
        grad_input_TD = grad_input_TD + grad_total_TD
    return grad_input_TD.to(total_TD.dtype), (grad_TD * normed_TD).sum(dim=0).to(weight_D.dtype)


@triton.jit
def _forward_kernel(
    residual,  # [tokens, WIDTH], read if ADDED
    hidden,  # [tokens, WIDTH]
    weight,  # [WIDTH]
    total,  # [tokens, WIDTH]: residual + hidden, written if ADDED
    out,  # [tokens, WIDTH]: the norm, or its codes if CODES
    scale,  # [tokens] float32
    code_scale,  # [tokens] float32, written if CODES
    residual_stride,  # elements from row to row
    hidden_stride,
    eps,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,  # WIDTH up to a power of two
    ADDED: tl.constexpr,
    CODES: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < WIDTH
    x = tl.load(hidden + row * hidden_stride + column, mask=inside, other=0.0).to(tl.float32)
    if ADDED:
        x += tl.load(residual + row * residual_stride + column, mask=inside, other=0.0).to(tl.float32)
        rounded = x.to(total.dtype.element_ty)
        tl.store(total + row * WIDTH + column, rounded, mask=inside)
        x = rounded.to(tl.float32)
    s = 1 / tl.sqrt(tl.sum(x * x, axis=0) / WIDTH + eps)
    tl.store(scale + row, s)
    w = tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
    # Codes are made of the rounded norm: the same codes as in a pass of their own.
    normed = (x * s * w).to(hidden.dtype.element_ty)
    if CODES:
        store_row(normed.to(tl.float32), out + row * WIDTH, code_scale + row, column, inside)
    else:
        tl.store(out + row * WIDTH + column, normed, mask=inside)


@triton.jit(do_not_specialize=["tokens", "groups"])
def _columns_kernel(
    total,  # [tokens, WIDTH]
    weight,  # [WIDTH]
    scale,  # [tokens] float32: of the norm
    code_scale,  # [tokens] float32
    total_stride,  # elements from row to row
    target,  # [WIDTH, 16 groups]: codes
    tokens,
    groups,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,  # rows of a program's tile
    BLOCK: tl.constexpr,  # columns of a program's tile
):
    row, column, inside = tile_of(tokens, WIDTH, ROWS, BLOCK)
    x = tl.load(total + row.to(tl.int64)[:, None] * total_stride + column[None, :], mask=inside, other=0.0).to(tl.float32)
    s = tl.load(scale + row, mask=row < tokens, other=0.0)
    w = tl.load(weight + column, mask=column < WIDTH, other=0.0).to(tl.float32)
    normed = (x * s[:, None] * w[None, :]).to(total.dtype.element_ty).to(tl.float32)
    inverse = inverse_of(tl.load(code_scale + row, mask=row < tokens, other=1.0))
    store_columns(encode(normed, inverse[:, None]), target, row, column, groups, WIDTH)


@triton.jit(do_not_specialize=["tokens"])
def _backward_kernel(
    grad,  # [tokens, WIDTH]
    grad_total,  # [tokens, WIDTH], read if ADDED
    total,  # [tokens, WIDTH]
    weight,  # [WIDTH]
    scale,  # [tokens] float32
    grad_input,  # [tokens, WIDTH]
    code,  # [tokens, WIDTH]: codes of grad_input, written if CODES
    code_scale,  # [tokens] float32, likewise
    partial,  # [programs, WIDTH] float32: each program's part of the weight's gradient
    tokens,
    grad_stride,  # elements from row to row
    grad_total_stride,
    total_stride,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,  # WIDTH up to a power of two
    ADDED: tl.constexpr,
    CODES: tl.constexpr,
):
    program = tl.program_id(0)
    column = tl.arange(0, BLOCK)
    inside = column < WIDTH
    w = tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
    grad_weight = tl.zeros((BLOCK,), dtype=tl.float32)
    for token in range(program, tokens, tl.num_programs(0)):
        row = tl.cast(token, tl.int64)
        s = tl.load(scale + row)
        g = tl.load(grad + row * grad_stride + column, mask=inside, other=0.0).to(tl.float32)
        normed = tl.load(total + row * total_stride + column, mask=inside, other=0.0).to(tl.float32) * s
        weighted = g * w
        dx = (weighted - normed * (tl.sum(weighted * normed, axis=0) / WIDTH)) * s
        if ADDED:
            dx += tl.load(grad_total + row * grad_total_stride + column, mask=inside, other=0.0).to(tl.float32)
        rounded = dx.to(grad_input.dtype.element_ty)
        tl.store(grad_input + row * WIDTH + column, rounded, mask=inside)
        if CODES:
            store_row(rounded.to(tl.float32), code + row * WIDTH, code_scale + row, column, inside)
        grad_weight += g * normed
    tl.store(partial + program.to(tl.int64) * WIDTH + column, grad_weight, mask=inside)


@triton.jit(do_not_specialize=["programs"])
def _sum_rows_kernel(
    partial,  # [programs, WIDTH] float32
    out,  # [WIDTH]
    programs,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,  # columns of a program
    ROWS: tl.constexpr,  # rows of a step
):
    column = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = column < WIDTH
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    for first in range(0, programs, ROWS):
        row = first + tl.arange(0, ROWS)
        at = row[:, None] * WIDTH + column[None, :]
        total += tl.sum(tl.load(partial + at, mask=(row < programs)[:, None] & inside[None, :], other=0.0), axis=0)
    tl.store(out + column, total.to(out.dtype.element_ty), mask=inside)
