"""Attention by ranges of keys, forward: one program for each head and tile of queries, or part of a tile (Dao 2023,
https://arxiv.org/abs/2307.08691). A part narrows its tile's ranges to the keys that its own queries see.

Each range is walked in three sections (`tiles.sections`), so that only its ends pay for masks.

Shapes: T tokens, H query heads, K key/value heads, E head size.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.attention.tiles import (
    LOG2_E,
    NO_PEAK,
    columns,
    cut,
    launch_tiles,
    load_rows,
    own_range,
    own_tile,
    sections,
    softmax_step,
    store_rows,
    within,
)
from kernels.configurations import configuration


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
    """Attention driven by work lists.

    Args: query_THE, key_TKE, value_TKE: of any strides. The rest: fields of `kernels.attention.work.AttentionWork`.
    Returns: (output [T, H, E]; natural log-sum-exp of the scaled scores [H, T] in float32, -inf for a query that sees nothing).
    """
    tokens, heads, size = query_THE.shape
    out_THE = torch.empty((tokens, heads, size), dtype=query_THE.dtype, device=query_THE.device)
    log_sum_exp_HT = torch.empty((heads, tokens), dtype=torch.float32, device=query_THE.device)
    if configuration("attention_forward", work.device).warpgroups:
        from kernels.attention import warpgroups  # imports experimental parts of Triton, which few runs need

        if warpgroups.can_run(query_THE, key_TKE, value_TKE, tile):
            lists = (work, query_tiles, query_tiles + key_tiles, window, tile)
            warpgroups.forward_by_warpgroups(query_THE, key_TKE, value_TKE, *lists, out_THE, log_sum_exp_HT)
            return out_THE, log_sum_exp_HT
    launch_tiles(
        _forward_kernel,
        "attention_forward",
        query_tiles,
        work,
        query_tiles + key_tiles,
        window,
        tile,
        by_tile=(query_THE,),
        by_block=(key_TKE, value_TKE),
        rest=(out_THE, log_sum_exp_HT),
    )
    return out_THE, log_sum_exp_HT


@triton.jit(do_not_specialize=["ranges", "tokens", "window"])
def _forward_kernel(
    query,  # [tokens, HEADS, SIZE]
    key,  # [tokens, HEADS / GROUP, SIZE]: a descriptor, or a pointer
    value,  # [tokens, HEADS / GROUP, SIZE], likewise
    query_stride,  # elements from token to token
    key_stride,
    value_stride,
    work,  # [rows, 4] int32: the work lists
    ranges,  # row of `work` where ranges begin
    tokens,
    window,
    scale_log2,  # SIZE^(-1/2) log2(e)
    out,  # [tokens, HEADS, SIZE]
    log_sum_exp,  # [HEADS, tokens] float32
    HEADS: tl.constexpr,  # query heads
    GROUP: tl.constexpr,  # query heads for each key/value head
    SIZE: tl.constexpr,  # elements of a head
    TILE: tl.constexpr,  # queries of a program
    PARTS: tl.constexpr,  # programs for a tile of the lists
    BLOCK: tl.constexpr,  # keys of a step
    DESCRIPTORS: tl.constexpr,  # whether key and value are descriptors
):
    head, start, end, first_range, last_range = own_tile(tl.program_id(0), work, 0, HEADS, TILE, PARTS)
    if start >= end:
        return
    kv_head = head // GROUP
    row = start + tl.arange(0, TILE)
    q = load_rows(query, query_stride, head, start, end, TILE, SIZE, False)
    total = tl.zeros((TILE,), dtype=tl.float32)
    peak = tl.full((TILE,), NO_PEAK, dtype=tl.float32)
    acc = tl.zeros((TILE, columns(SIZE)), dtype=tl.float32)
    for listed in range(first_range, last_range):
        kv_start, kv_end, shift = own_range(work, ranges + listed, start, end, window)
        bounds = sections(start, end, kv_start, kv_end, shift, window, BLOCK)
        for section in tl.static_range(3):
            for block in range(bounds[section], bounds[section + 1]):
                first = kv_start + block * BLOCK
                k = load_rows(key, key_stride, kv_head, first, kv_end, BLOCK, SIZE, DESCRIPTORS)
                scores = tl.dot(q, tl.trans(k), input_precision="ieee")
                if section != 1:
                    place = first + tl.arange(0, BLOCK)
                    visible = within((row - shift)[:, None] - place[None, :], window) & (place < kv_end)[None, :]
                    scores = tl.where(visible, scores, float("-inf"))
                total, peak, weights, kept = softmax_step(total, peak, scores, scale_log2)
                v = load_rows(value, value_stride, kv_head, first, kv_end, BLOCK, SIZE, DESCRIPTORS)
                if section != 1:
                    v = cut(v, first, kv_end, BLOCK, DESCRIPTORS)
                acc = tl.dot(weights.to(v.dtype), v, acc * kept[:, None], input_precision="ieee")
    # Only padding sees nothing, and it has no ranges. A sum of weights that is 0 or NaN is no sign of it.
    padding = first_range == last_range
    divisor = tl.where(padding, 1.0, total)
    lse = tl.where(padding, float("-inf"), (peak * scale_log2 + tl.log2(divisor)) / LOG2_E)
    tl.store(log_sum_exp + head.to(tl.int64) * tokens + row, lse, mask=row < end)
    store_rows(out, acc / divisor[:, None], start, end, head, TILE, HEADS, SIZE)
