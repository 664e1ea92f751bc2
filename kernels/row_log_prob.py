"""The head's work on rows of logits beside the matrix products: statistics, gradients, gathering and scattering rows.

For a row x of logits with target y, P = softmax(x) and Y = 1 at y:

    log_prob = x_y - log_sum_exp(x), with the gradient Y - P by x;   entropy = -sum(P log P)

Statistics take one pass (Milakov and Gimelshein 2018, https://arxiv.org/abs/1805.02867, algorithm 3): each lane holds its
largest logit m and the sum s of exp(x - m), and the lanes are joined at the end of the row. With t = sum((x - m) exp(x - m)),
entropy = log(s) - t / s, which does not cancel for logits far from 0.

`rows_N` lists the trained tokens: row n of the list is token rows_N[n]; -1 is padding.

Shapes: T tokens, N listed rows, V columns of logits (the first `vocab_size` are real), D width.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.configurations import configuration
from kernels.launch import launch, multiprocessors, operator, runs_triton, unit_stride


def row_statistics(
    logits_NV: Tensor,
    target_T: Tensor,
    rows_N: Tensor,
    log_prob_T: Tensor,
    log_sum_exp_T: Tensor,
    *,
    vocab_size: int,
    entropy_T: Tensor | None = None,
    gradient_NV: Tensor | None = None,
    scale_T: Tensor | None = None,
) -> None:
    """Write each listed token's log-prob and log-sum-exp, and if given its entropy and the gradient (P - Y) * scale.

    Args:
        logits_NV: float32 (float64); may be overwritten.
        target_T: integer, contiguous.
        rows_N: int32, contiguous.
        log_prob_T, log_sum_exp_T, entropy_T: results in the logits' dtype, contiguous. They must hold 0 at the listed tokens;
            other tokens keep their values.
        gradient_NV: result in any floating dtype, 0 in padding columns and padding rows.
        scale_T: factors of the gradient, in the logits' dtype; None for 1.
    """
    work = _RowWork(logits_NV, target_T, rows_N, log_prob_T, log_sum_exp_T, entropy_T, gradient_NV, scale_T, vocab_size)
    (_launch_rows if runs_triton(logits_NV) else _rows_eager)(work)


def row_gradients(
    logits_NV: Tensor,
    target_T: Tensor,
    rows_N: Tensor,
    log_sum_exp_T: Tensor,
    gradient_NV: Tensor,
    scale_T: Tensor | None,
    *,
    vocab_size: int,
) -> None:
    """The gradients alone, from the log-sum-exp of `row_statistics`, to the bit as `row_statistics` gives them."""
    work = _RowWork(logits_NV, target_T, rows_N, None, log_sum_exp_T, None, gradient_NV, scale_T, vocab_size)
    (_launch_rows if runs_triton(logits_NV) else _rows_eager)(work)


def gather_rows(source_TD: Tensor, rows_N: Tensor, scale_T: Tensor | None = None) -> Tensor:
    """The listed tokens' rows, times the tokens' scale: [N, D] in the dtype of the source, 0 in padding rows."""
    if runs_triton(source_TD):
        out_ND = torch.empty((len(rows_N), source_TD.shape[1]), dtype=source_TD.dtype, device=source_TD.device)
        _launch_moved(source_TD, out_ND, rows_N, scale_T, scatter=False)
        return out_ND
    factor_N = _scale_of(rows_N, scale_T, torch.promote_types(source_TD.dtype, torch.float32))
    return (source_TD[rows_N.clamp(min=0)] * factor_N[:, None]).to(source_TD.dtype)


def scatter_rows(source_ND: Tensor, rows_N: Tensor, tokens: int, scale_T: Tensor | None = None) -> Tensor:
    """The rows at their tokens' places, times the tokens' scale: [tokens, D] in the dtype of the source, 0 elsewhere.

    Each token may be listed only once.
    """
    out_TD = torch.zeros((tokens, source_ND.shape[1]), dtype=source_ND.dtype, device=source_ND.device)
    if runs_triton(source_ND):
        _launch_moved(source_ND, out_TD, rows_N, scale_T, scatter=True)
        return out_TD
    factor_N = _scale_of(rows_N, scale_T, torch.promote_types(source_ND.dtype, torch.float32))
    # Padding adds 0 to token 0; a boolean mask would force a host sync.
    return out_TD.index_add_(0, rows_N.clamp(min=0), (source_ND * factor_N[:, None]).to(source_ND.dtype))


@operator("komainu::scale_in_place", mutates=("tensor",))
def scale_in_place(tensor: Tensor, factor: Tensor) -> None:
    """tensor *= factor. A factor of 1, a scalar on the device, reads and writes nothing of the tensor.

    Args: tensor: floating [R, D], contiguous. factor: one element.
    """
    if not runs_triton(tensor):
        # Reading the factor is no wait on a CPU.
        if tensor.device.type != "cpu" or factor != 1:
            tensor.mul_(factor)
        return
    config = configuration("scale_in_place", tensor.device)
    rows, width = tensor.shape
    launch(
        _scale_kernel,
        (min(rows, config.programs * multiprocessors(tensor.device)),),
        tensor,
        factor,
        rows,
        WIDTH=width,
        BLOCK=min(config.block, triton.next_power_of_2(width)),
        device=tensor.device,
        warps=config.warps,
    )


@scale_in_place.register_fake
def _(tensor, factor):
    return None


class _RowWork(NamedTuple):
    """The tensors of `row_statistics` and `row_gradients`."""

    logits_NV: Tensor
    target_T: Tensor
    rows_N: Tensor
    log_prob_T: Tensor | None  # None: no statistics, the log-sum-exp is given
    log_sum_exp_T: Tensor
    entropy_T: Tensor | None
    gradient_NV: Tensor | None
    scale_T: Tensor | None
    vocab_size: int


def _launch_rows(work: _RowWork) -> None:
    logits_NV, target_T, rows_N, log_prob_T, log_sum_exp_T, entropy_T, gradient_NV, scale_T, vocab_size = work
    rows, columns = logits_NV.shape
    config = configuration("row_log_prob", logits_NV.device)

    def or_any(tensor: Tensor | None) -> Tensor:
        return log_sum_exp_T if tensor is None else tensor

    launch(
        _row_kernel,
        (rows,),
        logits_NV,
        target_T,
        rows_N,
        or_any(log_prob_T),
        log_sum_exp_T,
        or_any(entropy_T),
        or_any(gradient_NV),
        or_any(scale_T),
        logits_NV.stride(0),
        0 if gradient_NV is None else gradient_NV.stride(0),
        COLUMNS=columns,
        VOCAB=vocab_size,
        BLOCK=min(config.block, triton.next_power_of_2(columns)),
        STATISTICS=log_prob_T is not None,
        ENTROPY=entropy_T is not None,
        GRADIENT=gradient_NV is not None,
        SCALED=scale_T is not None,
        device=logits_NV.device,
        warps=config.warps,
    )


def _launch_moved(source: Tensor, out: Tensor, rows_N: Tensor, scale_T: Tensor | None, *, scatter: bool) -> None:
    width = source.shape[1]
    config = configuration("move_rows", source.device)
    source = unit_stride(source)
    block = min(config.block, triton.next_power_of_2(width))
    launch(
        _move_kernel,
        (len(rows_N), triton.cdiv(width, block)),
        source,
        out,
        rows_N,
        rows_N if scale_T is None else scale_T,
        source.stride(0),
        out.stride(0),
        WIDTH=width,
        BLOCK=block,
        SCATTER=scatter,
        SCALED=scale_T is not None,
        device=source.device,
        warps=config.warps,
    )


def _rows_eager(work: _RowWork) -> None:
    logits_NV, target_T, rows_N, log_prob_T, log_sum_exp_T, entropy_T, gradient_NV, scale_T, vocab_size = work
    listed_N, row_N = rows_N >= 0, rows_N.clamp(min=0)
    target_N1 = target_T[row_N].long().where(listed_N, 0)[:, None]

    def put(result_T: Tensor, values_N: Tensor) -> None:
        # Padding adds 0 to token 0; a boolean mask would force a host sync.
        result_T.index_add_(0, row_N, values_N.where(listed_N, 0))

    # In place: a pass over [N, V] costs a CPU as much as a product.
    real_NV = logits_NV[:, :vocab_size]
    logit_N = real_NV.gather(1, target_N1)[:, 0]
    torch.log_softmax(real_NV, dim=-1, out=real_NV)
    target_N = real_NV.gather(1, target_N1)[:, 0]
    if log_prob_T is not None:
        put(log_prob_T, target_N)
        put(log_sum_exp_T, logit_N - target_N)
    if entropy_T is not None:
        put(entropy_T, -(real_NV.exp() * real_NV).sum(dim=-1))
    if gradient_NV is not None:
        real_NV.exp_()
        real_NV.scatter_add_(1, target_N1, torch.full_like(target_N1, -1, dtype=logits_NV.dtype))
        if scale_T is not None or rows_N.device.type != "cpu" or not listed_N.all():
            real_NV.mul_(_scale_of(rows_N, scale_T, logits_NV.dtype)[:, None])
        # torch copies nothing where the gradients overwrite the logits.
        gradient_NV[:, :vocab_size] = real_NV
        gradient_NV[:, vocab_size:] = 0


def _scale_of(rows_N: Tensor, scale_T: Tensor | None, dtype: torch.dtype) -> Tensor:
    """The factor of each listed row, 0 for padding."""
    listed_N = rows_N >= 0
    if scale_T is None:
        return listed_N.to(dtype)
    return scale_T[rows_N.clamp(min=0)].to(dtype).where(listed_N, 0)


@triton.jit
def _row_kernel(
    logits,  # [N, COLUMNS] float32
    target,  # [T] integer
    rows,  # [N] int32: the token of each row, -1 for padding
    log_prob,  # [T] float32, written if STATISTICS
    log_sum_exp,  # [T] float32, written if STATISTICS, else read
    entropy,  # [T] float32, written if ENTROPY
    gradient,  # [N, COLUMNS], written if GRADIENT
    scale,  # [T] float32, read if SCALED
    logits_stride,  # elements from row to row
    gradient_stride,
    COLUMNS: tl.constexpr,
    VOCAB: tl.constexpr,  # real columns
    BLOCK: tl.constexpr,  # columns of a step
    STATISTICS: tl.constexpr,
    ENTROPY: tl.constexpr,
    GRADIENT: tl.constexpr,
    SCALED: tl.constexpr,
):
    number = tl.program_id(0).to(tl.int64)
    row = tl.load(rows + number).to(tl.int64)
    listed = row >= 0
    y = tl.load(target + row, mask=listed, other=0).to(tl.int32)
    logits += number * logits_stride
    lane = tl.arange(0, BLOCK)
    if STATISTICS:
        # Below any logit, and finite: the difference of two infinities is NaN.
        nothing = -1e38
        m = tl.full((BLOCK,), nothing, dtype=tl.float32)
        s = tl.zeros((BLOCK,), dtype=tl.float32)
        t = tl.zeros((BLOCK,), dtype=tl.float32)
        for first in range(0, VOCAB, BLOCK):
            column = first + lane
            # The mask of the load ends with the row, whose padded size allows wide loads; VOCAB may be any number.
            x = tl.load(logits + column, mask=column < COLUMNS, other=nothing)
            x = tl.where(column < VOCAB, x, nothing)
            d = x - m
            e = tl.exp(-tl.abs(d))
            higher = d > 0
            if ENTROPY:
                t = tl.where(higher, (t - s * d) * e, t + d * e)
            s = tl.where(higher, s * e + 1, s + e)
            m = tl.maximum(m, x)
        peak = tl.max(m, axis=0)
        e = tl.exp(m - peak)
        total = tl.sum(s * e, axis=0)
        rest = tl.log(total)
        lse = peak + rest
        tl.store(log_prob + row, (tl.load(logits + y) - peak) - rest, mask=listed)
        tl.store(log_sum_exp + row, lse, mask=listed)
        if ENTROPY:
            tl.store(entropy + row, rest - tl.sum((t + s * (m - peak)) * e, axis=0) / total, mask=listed)
    else:
        lse = tl.load(log_sum_exp + row, mask=listed, other=0.0)
    if GRADIENT:
        gradient += number * gradient_stride
        factor = tl.load(scale + row, mask=listed, other=0.0) if SCALED else 1.0
        for first in range(0, COLUMNS, BLOCK):
            column = first + lane
            inside = column < COLUMNS
            p = tl.exp(tl.load(logits + column, mask=inside, other=0.0) - lse)
            g = (p - tl.where(column == y, 1.0, 0.0)) * factor
            g = tl.where((column < VOCAB) & listed, g, 0.0)
            tl.store(gradient + column, g.to(gradient.dtype.element_ty), mask=inside)


@triton.jit
def _move_kernel(
    source,  # [N, WIDTH] if SCATTER, else [T, WIDTH]
    out,  # [T, WIDTH] if SCATTER, else [N, WIDTH]
    rows,  # [N] int32: the token of each row, -1 for padding
    scale,  # [T], read if SCALED
    source_stride,  # elements from row to row
    out_stride,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,  # columns of a program
    SCATTER: tl.constexpr,
    SCALED: tl.constexpr,
):
    number = tl.program_id(0).to(tl.int64)
    row = tl.load(rows + number).to(tl.int64)
    listed = row >= 0
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < WIDTH
    if SCATTER:
        source += number * source_stride
        out += row * out_stride
    else:
        source += tl.maximum(row, 0) * source_stride
        out += number * out_stride
    x = tl.load(source + column, mask=inside, other=0.0)
    if SCALED:
        x = (x.to(tl.float32) * tl.load(scale + row, mask=listed, other=0.0)).to(x.dtype)
    if not SCATTER:
        tl.store(out + column, tl.where(listed, x, 0.0), mask=inside)
    elif listed:
        tl.store(out + column, x, mask=inside)


@triton.jit(do_not_specialize=["rows"])
def _scale_kernel(
    tensor,  # [rows, WIDTH]
    factor,  # one element
    rows,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,  # columns of a step
):
    f = tl.load(factor).to(tl.float32)
    if f != 1:
        for number in range(tl.program_id(0), rows, tl.num_programs(0)):
            row = tensor + tl.cast(number, tl.int64) * WIDTH
            for first in range(0, WIDTH, BLOCK):
                column = first + tl.arange(0, BLOCK)
                x = tl.load(row + column, mask=column < WIDTH)
                tl.store(row + column, (x.to(tl.float32) * f).to(x.dtype), mask=column < WIDTH)
