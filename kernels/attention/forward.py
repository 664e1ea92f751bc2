"""Attention by ranges of keys, forward: one program a head and a tile of queries, or a part of one (Dao 2023,
https://arxiv.org/abs/2307.08691). A part narrows its tile's ranges to what its own queries see.

Each range is walked in three sections, so that only its ends pay for masks: blocks that the window's edge cuts for some query,
blocks that every query sees whole, blocks that the diagonal or the range's end cuts. Only blocks of those seen whole lie inside
of the range for certain: the others' masks also hide what stands behind its end.

From Hopper on rows come by descriptors (TMA), where their layout allows it, else and elsewhere through pointers.

Shapes: T tokens, H query heads, K key/value heads, E head size.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from kernels.configurations import Configuration, configuration
from kernels.launch import launch

LOG2_E = tl.constexpr(1.4426950408889634)


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

    Args: query_THE, key_TKE, value_TKE of unit stride in E; the rest as in `kernels.attention.work.AttentionWork`.
    """
    tokens, heads, size = query_THE.shape
    device = query_THE.device
    out_THE = torch.empty((tokens, heads, size), dtype=query_THE.dtype, device=device)
    log_sum_exp_HT = torch.empty((heads, tokens), dtype=torch.float32, device=device)
    config = configuration("attention_forward", device)
    rows, parts = tile_rows(tile, config)
    descriptors, (query, key, value) = sources(config, (query_THE, rows), (key_TKE, config.block), (value_TKE, config.block))
    launch(
        _forward_kernel, (query_tiles * parts * heads,), query, key, value, out_THE, log_sum_exp_HT, work,
        query_tiles + key_tiles, tokens, window, size**-0.5 * LOG2_E.value, *strides(query_THE, key_TKE, value_TKE),
        HEADS=heads, GROUP=heads // key_TKE.shape[1], SIZE=size, COLUMNS=columns(size), TILE=rows, PARTS=parts,
        BLOCK=config.block, DESCRIPTORS=descriptors, device=device, warps=config.warps, stages=config.stages,
    )  # fmt: skip
    return out_THE, log_sum_exp_HT


def columns(size: int) -> int:
    """Columns of a head's tile: a power of two of at least 16, which matrix products need."""
    return max(16, triton.next_power_of_2(size))


def tile_rows(tile: int, config: Configuration) -> tuple[int, int]:
    """(rows of a program, programs of a tile of the lists): rows are a power of two of at least 16."""
    whole = max(16, triton.next_power_of_2(tile))
    rows = min(whole, config.rows)
    return rows, whole // rows


def strides(*tensors: Tensor) -> list[int]:
    """(from token to token, from head to head) of each tensor."""
    return [stride for tensor in tensors for stride in tensor.stride()[:2]]


def sources(config: Configuration, *parts: tuple[Tensor, int]) -> tuple[bool, list[Tensor | TensorDescriptor]]:
    """(whether kernels read by descriptors, what they read) of [T, heads, E] tensors, so many rows of each at once.

    All or none: they are described where the configuration asks for it and each can be.
    """
    described = config.descriptors and all(_describable(tensor) for tensor, _ in parts)
    return described, [_described(tensor, rows) if described else tensor for tensor, rows in parts]


def _describable(tensor: Tensor) -> bool:
    """Whether [T, heads, E] is a matrix of T rows that TMA can read, a head of whose columns is as wide as a kernel's tile."""
    tokens, heads, size = tensor.shape
    side_by_side = heads == 1 or tensor.stride(1) == size
    aligned = tensor.stride(0) * tensor.itemsize % 16 == 0 and tensor.data_ptr() % 16 == 0
    return tokens > 0 and side_by_side and aligned and size == columns(size)


def _described(tensor: Tensor, rows: int) -> TensorDescriptor:
    tokens, heads, size = tensor.shape
    return TensorDescriptor(tensor, [tokens, heads * size], [tensor.stride(0), 1], [rows, size])


@triton.jit
def own_tile(work, first_tile, HEADS: tl.constexpr, TILE: tl.constexpr, PARTS: tl.constexpr):
    """(head, start, end, first range, end of its ranges) of this program's part of a tile; start >= end where it has none."""
    # Heads of one tile are neighbours in time: they read the same rows.
    part = tl.program_id(0) // HEADS
    tile = work + (first_tile + part // PARTS) * 4
    start = tl.load(tile) + part % PARTS * TILE
    end = tl.minimum(tl.load(tile + 1), start + TILE)
    return tl.program_id(0) % HEADS, start, end, tl.load(tile + 2), tl.load(tile + 3)


@triton.jit
def own_range(work, number, start, end, window):
    """(start, end, shift) of a listed range of keys, as far as queries [start, end) see it."""
    found = work + number * 4
    shift = tl.load(found + 2)
    return tl.maximum(tl.load(found), start - shift - window + 1), tl.minimum(tl.load(found + 1), end - shift), shift


@triton.jit
def load_rows(
    source, first, limit, stride, head, head_stride, ROWS: tl.constexpr, SIZE: tl.constexpr, COLUMNS: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
):  # fmt: skip
    """ROWS rows of a head; those from `limit` on are zeros, or by descriptor whatever stands there."""
    if DESCRIPTORS:
        rows = source.load([first, head * SIZE])
    else:
        row = first + tl.arange(0, ROWS)
        column = tl.arange(0, COLUMNS)
        inside = (row < limit)[:, None] & (column < SIZE)[None, :]
        offset = tl.cast(head, tl.int64) * head_stride + row.to(tl.int64)[:, None] * stride + column[None, :]
        rows = tl.load(source + offset, mask=inside, other=0.0)
    return rows


@triton.jit
def within(distance, window):
    """0 <= distance < window: below 0 is beyond any window when read without a sign."""
    return distance.to(tl.uint32, bitcast=True) < tl.cast(window, tl.uint32)


@triton.jit
def _blocks(
    total, peak, acc, q, key, value, begin, stop, kv_start, kv_end, row, shift, window, scale, key_stride, value_stride,
    kv_head, key_head_stride, value_head_stride, SIZE: tl.constexpr, COLUMNS: tl.constexpr, BLOCK: tl.constexpr,
    DESCRIPTORS: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Sum of weights, largest score and weighted values after the blocks [begin, stop) of a range of keys."""
    for block in range(begin, stop):
        first = kv_start + block * BLOCK
        k = load_rows(key, first, kv_end, key_stride, kv_head, key_head_stride, BLOCK, SIZE, COLUMNS, DESCRIPTORS)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee")
        if MASKED:
            place = first + tl.arange(0, BLOCK)
            seen = within((row - shift)[:, None] - place[None, :], window) & (place < kv_end)[None, :]
            scores = tl.where(seen, scores, float("-inf"))
        raised = tl.maximum(peak, tl.max(scores, axis=1))
        kept = tl.exp2((peak - raised) * scale)
        weights = tl.exp2(scores * scale - (raised * scale)[:, None])
        v = load_rows(value, first, kv_end, value_stride, kv_head, value_head_stride, BLOCK, SIZE, COLUMNS, DESCRIPTORS)
        acc = tl.dot(weights.to(v.dtype), v, acc * kept[:, None], input_precision="ieee")
        total = total * kept + tl.sum(weights, axis=1)
        peak = raised
    return total, peak, acc


@triton.jit
def sections(start, end, kv_start, kv_end, shift, window, BLOCK: tl.constexpr):
    """(blocks that the window's edge cuts, end of those seen whole, all blocks) of a range, for queries [start, end)."""
    blocks = tl.cdiv(tl.maximum(kv_end - kv_start, 0), BLOCK)
    # The last query sees no key before this one.
    left = tl.cdiv(tl.maximum(end - shift - window - kv_start, 0), BLOCK)
    whole = tl.maximum(tl.minimum(start - shift + 1, kv_end) - kv_start, 0) // BLOCK
    left = tl.minimum(left, blocks)
    return left, tl.maximum(left, whole), blocks


@triton.jit(do_not_specialize=["ranges", "tokens", "window"])
def _forward_kernel(
    query, key, value, out, log_sum_exp, work, ranges, tokens, window, scale, query_stride, query_head_stride, key_stride,
    key_head_stride, value_stride, value_head_stride, HEADS: tl.constexpr, GROUP: tl.constexpr, SIZE: tl.constexpr,
    COLUMNS: tl.constexpr, TILE: tl.constexpr, PARTS: tl.constexpr, BLOCK: tl.constexpr, DESCRIPTORS: tl.constexpr,
):  # fmt: skip
    head, start, end, first_range, last_range = own_tile(work, 0, HEADS, TILE, PARTS)
    if start >= end:
        return
    kv_head = head // GROUP
    row = start + tl.arange(0, TILE)
    q = load_rows(query, start, end, query_stride, head, query_head_stride, TILE, SIZE, COLUMNS, DESCRIPTORS)
    total = tl.zeros((TILE,), dtype=tl.float32)
    # Finite, so that a row which sees nothing of a block is left as it was.
    peak = tl.full((TILE,), -1.0e30, dtype=tl.float32)
    acc = tl.zeros((TILE, COLUMNS), dtype=tl.float32)
    for listed in range(first_range, last_range):
        kv_start, kv_end, shift = own_range(work, ranges + listed, start, end, window)
        left, whole, blocks = sections(start, end, kv_start, kv_end, shift, window, BLOCK)
        total, peak, acc = _blocks(
            total, peak, acc, q, key, value, 0, left, kv_start, kv_end, row, shift, window, scale, key_stride, value_stride,
            kv_head, key_head_stride, value_head_stride, SIZE, COLUMNS, BLOCK, DESCRIPTORS, True,
        )  # fmt: skip
        total, peak, acc = _blocks(
            total, peak, acc, q, key, value, left, whole, kv_start, kv_end, row, shift, window, scale, key_stride, value_stride,
            kv_head, key_head_stride, value_head_stride, SIZE, COLUMNS, BLOCK, DESCRIPTORS, False,
        )  # fmt: skip
        total, peak, acc = _blocks(
            total, peak, acc, q, key, value, whole, blocks, kv_start, kv_end, row, shift, window, scale, key_stride,
            value_stride, kv_head, key_head_stride, value_head_stride, SIZE, COLUMNS, BLOCK, DESCRIPTORS, True,
        )  # fmt: skip
    seen = total > 0
    inside = row < end
    divisor = tl.where(seen, total, 1.0)
    lse = tl.where(seen, (peak * scale + tl.log2(divisor)) / LOG2_E, float("-inf"))
    tl.store(log_sum_exp + head.to(tl.int64) * tokens + row, lse, mask=inside)
    result = tl.where(seen[:, None], acc / divisor[:, None], 0.0)
    column = tl.arange(0, COLUMNS)
    # A store by descriptor would overwrite the first rows of the tile behind a short one.
    target = out + row.to(tl.int64)[:, None] * (HEADS * SIZE) + head * SIZE + column[None, :]
    tl.store(target, result.to(out.dtype.element_ty), mask=inside[:, None] & (column < SIZE)[None, :])
