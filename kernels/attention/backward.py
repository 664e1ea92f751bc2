"""Attention by ranges, backward, in a fixed order and without atomics: one pass over tiles of queries, one over tiles of keys.

With weights P, D = rowsum(dO * O), dP = dO V^T, dS = P * (dP - D) and the scale s of the scores (Dao 2023,
https://arxiv.org/abs/2307.08691, algorithm 2):

    dQ = s dS K,   dK = s dS^T Q,   dV = P^T dO

Both passes compute the weights again from the log-sum-exp. One program adds up all query heads of a key/value head.

Shapes: T tokens, H query heads, K key/value heads, E head size.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.attention.tiles import (
    LOG2_E,
    columns,
    cut,
    launch_tiles,
    load_rows,
    own_range,
    own_tile,
    sections,
    store_rows,
    within,
)


def attention_backward(
    grad_THE: Tensor,  # gradient of the output
    query_THE: Tensor,
    key_TKE: Tensor,
    value_TKE: Tensor,
    out_THE: Tensor,
    log_sum_exp_HT: Tensor,  # float32
    work: Tensor,  # this and the rest: fields of `kernels.attention.work.AttentionWork`
    query_tiles: int,
    key_tiles: int,
    window: int,
    tile: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of the query [T, H, E], the key and the value [T, K, E], each contiguous and in the dtype of the query."""
    tokens, heads, size = query_THE.shape
    kv_heads, device = key_TKE.shape[1], query_THE.device
    grad_query_THE = torch.empty((tokens, heads, size), dtype=query_THE.dtype, device=device)
    grad_key_TKE, grad_value_TKE = (torch.empty((tokens, kv_heads, size), dtype=query_THE.dtype, device=device) for _ in "kv")
    delta_HT = torch.empty((heads, tokens), dtype=torch.float32, device=device)
    launch_tiles(
        _query_kernel,
        "attention_queries",
        query_tiles,
        work,
        query_tiles + key_tiles,
        window,
        tile,
        by_tile=(query_THE, grad_THE, out_THE),
        by_block=(key_TKE, value_TKE),
        rest=(size**-0.5, log_sum_exp_HT, delta_HT, grad_query_THE),
    )
    launch_tiles(
        _key_kernel,
        "attention_keys",
        key_tiles,
        work,
        query_tiles + key_tiles,
        window,
        tile,
        by_tile=(key_TKE, value_TKE),
        by_block=(query_THE, grad_THE),
        blocks_by_pointer=True,
        rest=(size**-0.5, query_tiles, log_sum_exp_HT, delta_HT, grad_key_TKE, grad_value_TKE),
    )
    return grad_query_THE, grad_key_TKE, grad_value_TKE


@triton.jit(do_not_specialize=["ranges", "tokens", "window"])
def _query_kernel(
    query,  # [tokens, HEADS, SIZE]: a descriptor, or a pointer
    grad,  # [tokens, HEADS, SIZE], likewise: gradient of the output
    out,  # [tokens, HEADS, SIZE], likewise
    key,  # [tokens, HEADS / GROUP, SIZE], likewise
    value,  # [tokens, HEADS / GROUP, SIZE], likewise
    query_stride,  # elements from token to token
    grad_stride,
    out_stride,
    key_stride,
    value_stride,
    work,  # [rows, 4] int32: the work lists
    ranges,  # row of `work` where ranges begin
    tokens,
    window,
    scale_log2,  # scale log2(e)
    scale,  # SIZE^(-1/2)
    log_sum_exp,  # [HEADS, tokens] float32
    delta,  # [HEADS, tokens] float32: D, written here for the other pass
    grad_query,  # [tokens, HEADS, SIZE]
    HEADS: tl.constexpr,  # query heads
    GROUP: tl.constexpr,  # query heads for each key/value head
    SIZE: tl.constexpr,  # elements of a head
    TILE: tl.constexpr,  # queries of a program
    PARTS: tl.constexpr,  # programs for a tile of the lists
    BLOCK: tl.constexpr,  # keys of a step
    DESCRIPTORS: tl.constexpr,  # whether the five sources are descriptors
):
    """Gradient of a tile of queries, and D of its rows."""
    head, start, end, first_range, last_range = own_tile(work, 0, HEADS, TILE, PARTS)
    if start >= end:
        return
    kv_head = head // GROUP
    row = start + tl.arange(0, TILE)
    inside = row < end
    q = load_rows(query, query_stride, head, start, end, TILE, SIZE, DESCRIPTORS)
    g = load_rows(grad, grad_stride, head, start, end, TILE, SIZE, DESCRIPTORS)
    o = load_rows(out, out_stride, head, start, end, TILE, SIZE, DESCRIPTORS)
    d = tl.sum(g.to(tl.float32) * o.to(tl.float32), axis=1)
    at = head.to(tl.int64) * tokens + row
    tl.store(delta + at, d, mask=inside)
    lse = tl.load(log_sum_exp + at, mask=inside, other=0.0) * LOG2_E
    acc = tl.zeros((TILE, columns(SIZE)), dtype=tl.float32)
    for listed in range(first_range, last_range):
        kv_start, kv_end, shift = own_range(work, ranges + listed, start, end, window)
        bounds = sections(start, end, kv_start, kv_end, shift, window, BLOCK)
        for section in tl.static_range(3):
            for block in range(bounds[section], bounds[section + 1]):
                first = kv_start + block * BLOCK
                k = load_rows(key, key_stride, kv_head, first, kv_end, BLOCK, SIZE, DESCRIPTORS)
                if section != 1:
                    k = cut(k, first, kv_end, BLOCK, DESCRIPTORS)
                v = load_rows(value, value_stride, kv_head, first, kv_end, BLOCK, SIZE, DESCRIPTORS)
                weights = tl.exp2(tl.dot(q, tl.trans(k), input_precision="ieee") * scale_log2 - lse[:, None])
                grad_scores = weights * (tl.dot(g, tl.trans(v), input_precision="ieee") - d[:, None])
                if section != 1:
                    place = first + tl.arange(0, BLOCK)
                    visible = within((row - shift)[:, None] - place[None, :], window) & (place < kv_end)[None, :]
                    # The product, not the weights: values behind the range's end may be NaN.
                    grad_scores = tl.where(visible, grad_scores, 0.0)
                acc = tl.dot(grad_scores.to(k.dtype), k, acc, input_precision="ieee")
    store_rows(grad_query, acc * scale, row, end, head, HEADS, SIZE)


@triton.jit(do_not_specialize=["first_tile", "ranges", "tokens", "window"])
def _key_kernel(
    key,  # [tokens, HEADS, SIZE]: a descriptor, or a pointer
    value,  # [tokens, HEADS, SIZE], likewise
    query,  # [tokens, HEADS * GROUP, SIZE]: a pointer, so that zeros stand behind a range's end, not the next document
    grad,  # [tokens, HEADS * GROUP, SIZE], likewise: gradient of the output
    key_stride,  # elements from token to token
    value_stride,
    query_stride,
    grad_stride,
    work,  # [rows, 4] int32: the work lists
    ranges,  # row of `work` where ranges begin
    tokens,
    window,
    scale_log2,  # scale log2(e)
    scale,  # SIZE^(-1/2)
    first_tile,  # row of `work` where tiles of keys begin
    log_sum_exp,  # [HEADS * GROUP, tokens] float32
    delta,  # [HEADS * GROUP, tokens] float32: D, from the other pass
    grad_key,  # [tokens, HEADS, SIZE]
    grad_value,  # [tokens, HEADS, SIZE]
    HEADS: tl.constexpr,  # key/value heads
    GROUP: tl.constexpr,  # query heads for each key/value head
    SIZE: tl.constexpr,  # elements of a head
    TILE: tl.constexpr,  # keys of a program
    PARTS: tl.constexpr,  # programs for a tile of the lists
    BLOCK: tl.constexpr,  # queries of a step
    DESCRIPTORS: tl.constexpr,  # whether key and value are descriptors
):
    """Gradients of a tile of keys and values, over all query heads that read them."""
    kv_head, start, end, first_range, last_range = own_tile(work, first_tile, HEADS, TILE, PARTS)
    if start >= end:
        return
    place = start + tl.arange(0, TILE)
    k = load_rows(key, key_stride, kv_head, start, end, TILE, SIZE, DESCRIPTORS)
    v = load_rows(value, value_stride, kv_head, start, end, TILE, SIZE, DESCRIPTORS)
    dk = tl.zeros((TILE, columns(SIZE)), dtype=tl.float32)
    dv = tl.zeros((TILE, columns(SIZE)), dtype=tl.float32)
    for member in range(GROUP):
        head = kv_head * GROUP + member
        base = head.to(tl.int64) * tokens
        for listed in range(first_range, last_range):
            found = work + (ranges + listed) * 4
            shift = tl.load(found + 2)
            # The range, narrowed to the queries that see these keys.
            query_start = tl.maximum(tl.load(found), start + shift)
            query_end = tl.minimum(tl.load(found + 1), end - 1 + shift + window)
            for block in range(tl.cdiv(tl.maximum(query_end - query_start, 0), BLOCK)):
                first = query_start + block * BLOCK
                row = first + tl.arange(0, BLOCK)
                inside = row < query_end
                q = load_rows(query, query_stride, head, first, query_end, BLOCK, SIZE, False)
                g = load_rows(grad, grad_stride, head, first, query_end, BLOCK, SIZE, False)
                # Infinity behind the range's end: the weights are 0 there, because the rows are zeros.
                lse = tl.load(log_sum_exp + base + row, mask=inside, other=float("inf")) * LOG2_E
                d = tl.load(delta + base + row, mask=inside, other=0.0)
                weights = tl.exp2(tl.dot(k, tl.trans(q), input_precision="ieee") * scale_log2 - lse[None, :])
                # Every block is masked: sections as in the other passes need more registers than there are.
                weights = tl.where(within((row - shift)[None, :] - place[:, None], window), weights, 0.0)
                dv = tl.dot(weights.to(g.dtype), g, dv, input_precision="ieee")
                grad_scores = weights * (tl.dot(v, tl.trans(g), input_precision="ieee") - d[None, :])
                dk = tl.dot(grad_scores.to(q.dtype), q, dk, input_precision="ieee")
    store_rows(grad_key, dk * scale, place, end, kv_head, HEADS, SIZE)
    store_rows(grad_value, dv, place, end, kv_head, HEADS, SIZE)
