"""What the head does with rows of logits, beside the matrix products: statistics, gradients, and the rows' way in and out.

For a row x of logits with target y, P = softmax(x) and Y = 1 at y: log_prob = x_y - log_sum_exp(x), whose gradient by x is
Y - P; entropy = -sum(P log P).

Statistics are made in one pass: each lane holds the largest logit m that it has seen and the sum s of exp(x - m), after Milakov
and Gimelshein 2018, https://arxiv.org/abs/1805.02867, algorithm 3; lanes are joined at the end of the row. The lane's
t = sum((x - m) exp(x - m)) gives the entropy, log(S) - T / S, which does not cancel where all logits are far from 0.

Rows of a chunk are places of a list `rows_N`: number n of the list belongs to token rows_N[n], or to none where that is -1.

Shapes: T tokens, N listed rows, V columns of logits, of which the first `vocab_size` are real, D width.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.configurations import configuration
from kernels.launch import launch, multiprocessors, runs_triton, unit_stride


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
    """Write each listed token's log-prob, log-sum-exp and, where given, entropy; and where given (P - Y) * scale.

    Args: logits_NV float32 (float64), may be overwritten. target_T integer, contiguous. rows_N int32, contiguous. The results
        [T] in the logits' dtype, contiguous, hold 0 at the listed tokens; others' places stay as they are. gradient_NV in any
        floating dtype: 0 in padding columns, and in rows that belong to no token. scale_T like the results; None: 1.
    """
    step = _launch_rows if runs_triton(logits_NV) else _rows_eager
    step(logits_NV, target_T, rows_N, log_prob_T, log_sum_exp_T, entropy_T, gradient_NV, scale_T, vocab_size, statistics=True)


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
    """The gradients alone, to the bit those of `row_statistics`, from its log-sum-exp."""
    step = _launch_rows if runs_triton(logits_NV) else _rows_eager
    step(logits_NV, target_T, rows_N, None, log_sum_exp_T, None, gradient_NV, scale_T, vocab_size, statistics=False)


def gather_rows(source_TD: Tensor, rows_N: Tensor, scale_T: Tensor | None = None) -> Tensor:
    """The listed tokens' rows, times the token's scale: [N, D] in the dtype of the source; 0 where there is no token."""
    if runs_triton(source_TD):
        out_ND = torch.empty((len(rows_N), source_TD.shape[1]), dtype=source_TD.dtype, device=source_TD.device)
        _launch_moved(source_TD, out_ND, rows_N, scale_T, scatter=False)
        return out_ND
    factor_N = _scale_of(rows_N, scale_T, torch.promote_types(source_TD.dtype, torch.float32))
    return (source_TD[rows_N.clamp(min=0)] * factor_N[:, None]).to(source_TD.dtype)


def scatter_rows(source_ND: Tensor, rows_N: Tensor, tokens: int, scale_T: Tensor | None = None) -> Tensor:
    """The rows at their tokens' places, times the token's scale: [tokens, D] in the dtype of the source, 0 elsewhere.

    Each token is listed at most once.
    """
    out_TD = torch.zeros((tokens, source_ND.shape[1]), dtype=source_ND.dtype, device=source_ND.device)
    if runs_triton(source_ND):
        _launch_moved(source_ND, out_TD, rows_N, scale_T, scatter=True)
        return out_TD
    factor_N = _scale_of(rows_N, scale_T, torch.promote_types(source_ND.dtype, torch.float32))
    # As in `_rows_eager`, what belongs to no token adds 0 to the first.
    return out_TD.index_add_(0, rows_N.clamp(min=0), (source_ND * factor_N[:, None]).to(source_ND.dtype))


@torch.library.custom_op("komainu::scale_in_place", mutates_args=("tensor",))
def scale_in_place(tensor: Tensor, factor: Tensor) -> None:
    """tensor *= factor, of which nothing is read or written where the factor, a scalar on the device, is 1.

    Args: tensor: floating [R, D], contiguous. factor: of one element.
    """
    if not runs_triton(tensor):
        tensor.mul_(factor)
        return
    config = configuration("scale_in_place", tensor.device)
    rows, width = tensor.shape
    launch(
        _scale_kernel, (min(rows, config.programs * multiprocessors(tensor.device)),), tensor, factor, rows, WIDTH=width,
        BLOCK=min(config.block, triton.next_power_of_2(width)), device=tensor.device, warps=config.warps,
    )  # fmt: skip


@scale_in_place.register_fake
def _(tensor, factor):
    return None


def _launch_rows(
    logits_NV, target_T, rows_N, log_prob_T, log_sum_exp_T, entropy_T, gradient_NV, scale_T, vocab_size, *, statistics
) -> None:
    rows, columns = logits_NV.shape
    config = configuration("row_log_prob", logits_NV.device)

    def or_any(tensor: Tensor | None) -> Tensor:
        return log_sum_exp_T if tensor is None else tensor

    launch(
        _row_kernel, (rows,), logits_NV, target_T, rows_N, or_any(log_prob_T), log_sum_exp_T, or_any(entropy_T),
        or_any(gradient_NV), or_any(scale_T), logits_NV.stride(0), 0 if gradient_NV is None else gradient_NV.stride(0),
        COLUMNS=columns, VOCAB=vocab_size, BLOCK=min(config.block, triton.next_power_of_2(columns)), STATISTICS=statistics,
        ENTROPY=entropy_T is not None, GRADIENT=gradient_NV is not None, SCALED=scale_T is not None, device=logits_NV.device,
        warps=config.warps,
    )  # fmt: skip


def _launch_moved(source: Tensor, out: Tensor, rows_N: Tensor, scale_T: Tensor | None, *, scatter: bool) -> None:
    width = source.shape[1]
    config = configuration("move_rows", source.device)
    source = unit_stride(source)
    block = min(config.block, triton.next_power_of_2(width))
    launch(
        _move_kernel, (len(rows_N), triton.cdiv(width, block)), source, out, rows_N, rows_N if scale_T is None else scale_T,
        source.stride(0), out.stride(0), WIDTH=width, BLOCK=block, SCATTER=scatter, SCALED=scale_T is not None,
        device=source.device, warps=config.warps,
    )  # fmt: skip


def _rows_eager(
    logits_NV, target_T, rows_N, log_prob_T, log_sum_exp_T, entropy_T, gradient_NV, scale_T, vocab_size, *, statistics
) -> None:
    listed_N, row_N = rows_N >= 0, rows_N.clamp(min=0)
    target_N1 = target_T[row_N].long().where(listed_N, 0)[:, None]

    def put(result_T: Tensor, values_N: Tensor) -> None:
        # What belongs to no token adds 0 to the first: choosing by a mask would wait for the device.
        result_T.index_add_(0, row_N, values_N.where(listed_N, 0))

    # In place, as one exponential of a logit must serve both.
    weight_NV = logits_NV[:, :vocab_size]
    peak_N = weight_NV.amax(dim=-1)
    weight_NV.sub_(peak_N[:, None])
    target_N = weight_NV.gather(1, target_N1)[:, 0]
    shifted_NV = None if entropy_T is None else weight_NV.clone()
    total_N = weight_NV.exp_().sum(dim=-1)
    if statistics:
        put(log_prob_T, target_N - total_N.log())
        put(log_sum_exp_T, peak_N + total_N.log())
    if shifted_NV is not None:
        put(entropy_T, total_N.log() - shifted_NV.mul_(weight_NV).sum(dim=-1) / total_N)
    if gradient_NV is not None:
        scale_N = _scale_of(rows_N, scale_T, logits_NV.dtype)
        weight_NV.mul_((scale_N / total_N)[:, None])
        weight_NV[torch.arange(len(rows_N), device=rows_N.device), target_N1[:, 0]] -= scale_N
        gradient_NV[:, :vocab_size] = weight_NV
        gradient_NV[:, vocab_size:] = 0


def _scale_of(rows_N: Tensor, scale_T: Tensor | None, dtype: torch.dtype) -> Tensor:
    """The factor of each listed row, 0 where there is no token."""
    listed_N = rows_N >= 0
    if scale_T is None:
        return listed_N.to(dtype)
    return scale_T[rows_N.clamp(min=0)].to(dtype).where(listed_N, 0)


@triton.jit
def _row_kernel(
    logits, target, rows, log_prob, log_sum_exp, entropy, gradient, scale, logits_stride, gradient_stride,
    COLUMNS: tl.constexpr, VOCAB: tl.constexpr, BLOCK: tl.constexpr, STATISTICS: tl.constexpr, ENTROPY: tl.constexpr,
    GRADIENT: tl.constexpr, SCALED: tl.constexpr,
):  # fmt: skip
    number = tl.program_id(0).to(tl.int64)
    row = tl.load(rows + number).to(tl.int64)
    listed = row >= 0
    y = tl.load(target + row, mask=listed, other=0).to(tl.int32)
    logits += number * logits_stride
    lane = tl.arange(0, BLOCK)
    if STATISTICS:
        # Finite, as the difference of two infinities is not a number; no logit comes near.
        nothing = -1e38
        m = tl.full((BLOCK,), nothing, dtype=tl.float32)
        s = tl.zeros((BLOCK,), dtype=tl.float32)
        t = tl.zeros((BLOCK,), dtype=tl.float32)
        for first in range(0, VOCAB, BLOCK):
            column = first + lane
            # The mask of the load ends where the row does: a vocabulary of any size would forbid wide loads.
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
    source, out, rows, scale, source_stride, out_stride,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr, SCATTER: tl.constexpr, SCALED: tl.constexpr,
):  # fmt: skip
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
def _scale_kernel(tensor, factor, rows, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    f = tl.load(factor).to(tl.float32)
    if f != 1:
        for number in range(tl.program_id(0), rows, tl.num_programs(0)):
            row = tensor + tl.cast(number, tl.int64) * WIDTH
            for first in range(0, WIDTH, BLOCK):
                column = first + tl.arange(0, BLOCK)
                x = tl.load(row + column, mask=column < WIDTH)
                tl.store(row + column, (x.to(tl.float32) * f).to(x.dtype), mask=column < WIDTH)
