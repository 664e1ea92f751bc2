"""Attention by ranges of keys, forward: one program a tile of queries and head (Dao 2023, https://arxiv.org/abs/2307.08691).

Each range is walked in three sections, so that only its ends pay for masks: blocks that the window's edge cuts for some query,
blocks that every query sees whole, blocks that the diagonal or the range's end cuts.

Shapes: T tokens, H query heads, K key/value heads, E head size.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.configurations import configuration
from kernels.launch import launch

LOG2_E = 1.4426950408889634


def attention_forward(
    query_THE: Tensor,
    key_TKE: Tensor,
    value_TKE: Tensor,
    work: Tensor,
    query_tiles: int,
    key_tiles: int,
    window: int,
    tile: int,
) -> tuple[Tensor, Tensor]:
    """(attention's output [T, H, E], natural log-sum-exp of the scaled scores [H, T] in float32, -inf where nothing is seen).

    Args: query_THE, key_TKE, value_TKE of unit stride in E; the rest as in `kernels.attention_work.AttentionWork`.
    """
    tokens, heads, size = query_THE.shape
    device = query_THE.device
    out_THE = torch.empty((tokens, heads, size), dtype=query_THE.dtype, device=device)
    log_sum_exp_HT = torch.empty((heads, tokens), dtype=torch.float32, device=device)
    config = configuration("attention_forward", device)
    launch(
        _forward_kernel, (query_tiles * heads,), query_THE, key_TKE, value_TKE, out_THE, log_sum_exp_HT, work,
        query_tiles + key_tiles, tokens, window, size**-0.5 * LOG2_E, query_THE.stride(0), query_THE.stride(1),
        key_TKE.stride(0), key_TKE.stride(1), value_TKE.stride(0), value_TKE.stride(1), HEADS=heads,
        GROUP=heads // key_TKE.shape[1], SIZE=size, COLUMNS=columns(size), TILE=tile_rows(tile), BLOCK=config.block,
        DESCRIPTORS=describable(query_THE, key_TKE, value_TKE), device=device, warps=config.warps, stages=config.stages,
    )  # fmt: skip
    return out_THE, log_sum_exp_HT


def columns(size: int) -> int:
    """Columns of a head's tile: a power of two of at least 16, which matrix products need."""
    return max(16, triton.next_power_of_2(size))


def tile_rows(tile: int) -> int:
    """Rows of a kernel's tile: a power of two of at least 16."""
    return max(16, triton.next_power_of_2(tile))


def describable(*tensors: Tensor) -> bool:
    """Whether Hopper's tensor memory accelerator can read [T, heads, E] as a matrix of T rows: heads side by side, rows at
    multiples of 16 bytes, a head size that is a tile's."""
    return False


@triton.jit
def load_rows(source, row, stride, column, limit, SIZE: tl.constexpr, COLUMNS: tl.constexpr):
    """Rows of a head, zeros beyond `limit`."""
    inside = (row < limit)[:, None] & (column < SIZE)[None, :]
    return tl.load(source + row.to(tl.int64)[:, None] * stride + column[None, :], mask=inside, other=0.0)


@triton.jit
def _step(
    total, peak, acc, q, key, value, first, row, column, key_stride, value_stride, kv_end, shift, window, scale,
    SIZE: tl.constexpr, COLUMNS: tl.constexpr, BLOCK: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    place = first + tl.arange(0, BLOCK)
    k = load_rows(key, place, key_stride, column, kv_end, SIZE, COLUMNS)
    scores = tl.dot(q, tl.trans(k), input_precision="ieee")
    if MASKED:
        distance = row[:, None] - place[None, :] - shift
        seen = (distance >= 0) & (distance < window) & (place < kv_end)[None, :]
        scores = tl.where(seen, scores, float("-inf"))
    raised = tl.maximum(peak, tl.max(scores, axis=1))
    kept = tl.exp2((peak - raised) * scale)
    weights = tl.exp2(scores * scale - (raised * scale)[:, None])
    v = load_rows(value, place, value_stride, column, kv_end, SIZE, COLUMNS)
    acc = tl.dot(weights.to(v.dtype), v, acc * kept[:, None], input_precision="ieee")
    return total * kept + tl.sum(weights, axis=1), raised, acc


@triton.jit
def sections(start, end, kv_start, kv_end, shift, window, BLOCK: tl.constexpr):
    """(blocks that the window's edge cuts, end of those seen whole, all blocks) of a range, for queries [start, end)."""
    blocks = tl.cdiv(kv_end - kv_start, BLOCK)
    # The last query sees no key before this one.
    left = tl.cdiv(tl.maximum(end - shift - window - kv_start, 0), BLOCK)
    whole = tl.maximum(tl.minimum(start - shift + 1, kv_end) - kv_start, 0) // BLOCK
    left = tl.minimum(left, blocks)
    return left, tl.maximum(left, whole), blocks


@triton.jit(do_not_specialize=["ranges", "tokens", "window"])
def _forward_kernel(
    query, key, value, out, log_sum_exp, work, ranges, tokens, window, scale, query_stride, query_head_stride, key_stride,
    key_head_stride, value_stride, value_head_stride, HEADS: tl.constexpr, GROUP: tl.constexpr, SIZE: tl.constexpr,
    COLUMNS: tl.constexpr, TILE: tl.constexpr, BLOCK: tl.constexpr, DESCRIPTORS: tl.constexpr,
):  # fmt: skip
    # Heads of one tile are neighbours in time: they read the same keys and values.
    tile = tl.program_id(0) // HEADS
    head = tl.program_id(0) % HEADS
    start = tl.load(work + tile * 4)
    end = tl.load(work + tile * 4 + 1)
    if start == end:
        return
    row = start + tl.arange(0, TILE)
    column = tl.arange(0, COLUMNS)
    q = load_rows(query + head * query_head_stride, row, query_stride, column, end, SIZE, COLUMNS)
    key += head // GROUP * key_head_stride
    value += head // GROUP * value_head_stride
    total = tl.zeros((TILE,), dtype=tl.float32)
    # Finite, so that a row which sees nothing of a block is left as it was.
    peak = tl.full((TILE,), -1.0e30, dtype=tl.float32)
    acc = tl.zeros((TILE, COLUMNS), dtype=tl.float32)
    for listed in range(tl.load(work + tile * 4 + 2), tl.load(work + tile * 4 + 3)):
        found = work + (ranges + listed) * 4
        kv_start, kv_end, shift = tl.load(found), tl.load(found + 1), tl.load(found + 2)
        left, whole, blocks = sections(start, end, kv_start, kv_end, shift, window, BLOCK)
        for block in range(left):
            total, peak, acc = _step(
                total, peak, acc, q, key, value, kv_start + block * BLOCK, row, column, key_stride, value_stride, kv_end, shift,
                window, scale, SIZE, COLUMNS, BLOCK, True,
            )  # fmt: skip
        for block in range(left, whole):
            total, peak, acc = _step(
                total, peak, acc, q, key, value, kv_start + block * BLOCK, row, column, key_stride, value_stride, kv_end, shift,
                window, scale, SIZE, COLUMNS, BLOCK, False,
            )  # fmt: skip
        for block in range(whole, blocks):
            total, peak, acc = _step(
                total, peak, acc, q, key, value, kv_start + block * BLOCK, row, column, key_stride, value_stride, kv_end, shift,
                window, scale, SIZE, COLUMNS, BLOCK, True,
            )  # fmt: skip
    seen = total > 0
    inside = row < end
    tl.store(
        log_sum_exp + head.to(tl.int64) * tokens + row,
        tl.where(seen, peak * scale + tl.log2(total), float("-inf")) * 0.6931471805599453,
        mask=inside,
    )
    result = tl.where(seen[:, None], acc / tl.where(seen, total, 1.0)[:, None], 0.0)
    target = out + row.to(tl.int64)[:, None] * (HEADS * SIZE) + head * SIZE + column[None, :]
    tl.store(target, result.to(out.dtype.element_ty), mask=inside[:, None] & (column < SIZE)[None, :])
