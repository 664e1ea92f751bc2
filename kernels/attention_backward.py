"""Attention by ranges, backward, in a fixed order without atomics: one pass by tiles of queries, one by tiles of keys.

With P the weights, D = rowsum(dO * O), dP = dO V^T and dS = P * (dP - D):  dQ = s dS K,  dK = s dS^T Q,  dV = P^T dO, s the
scale of the scores (Dao 2023, https://arxiv.org/abs/2307.08691, algorithm 2). Weights are computed again from the log-sum-exp in
both passes. The query heads of a key/value head are added up inside of one program.

Shapes: T tokens, H query heads, K key/value heads, E head size.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.attention_forward import LOG2_E, columns, load_rows, sections, tile_rows
from kernels.configurations import configuration
from kernels.launch import launch


def attention_backward(
    grad_THE: Tensor, query_THE: Tensor, key_TKE: Tensor, value_TKE: Tensor, out_THE: Tensor, log_sum_exp_HT: Tensor,
    work: Tensor, query_tiles: int, key_tiles: int, window: int, tile: int,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of query [T, H, E], key and value [T, K, E] for that of the output."""
    tokens, heads, size = query_THE.shape
    kv_heads, device = key_TKE.shape[1], query_THE.device
    grad_query_THE = torch.empty((tokens, heads, size), dtype=query_THE.dtype, device=device)
    grad_key_TKE, grad_value_TKE = (torch.empty((tokens, kv_heads, size), dtype=query_THE.dtype, device=device) for _ in "kv")
    delta_HT = torch.empty((heads, tokens), dtype=torch.float32, device=device)
    scale = size**-0.5
    strides = [stride for tensor in (query_THE, key_TKE, value_TKE, grad_THE) for stride in tensor.stride()[:2]]
    shape: dict[str, Any] = {
        "HEADS": heads, "GROUP": heads // kv_heads, "SIZE": size, "COLUMNS": columns(size), "TILE": tile_rows(tile),
    }  # fmt: skip
    ranges = query_tiles + key_tiles
    config = configuration("attention_queries", device)
    launch(
        _query_kernel, (query_tiles * heads,), query_THE, key_TKE, value_TKE, grad_THE, out_THE, log_sum_exp_HT, delta_HT,
        grad_query_THE, work, ranges, tokens, window, scale, scale * LOG2_E, *strides, *out_THE.stride()[:2],
        **shape, BLOCK=config.block, device=device, warps=config.warps, stages=config.stages,
    )  # fmt: skip
    config = configuration("attention_keys", device)
    launch(
        _key_kernel, (key_tiles * kv_heads,), query_THE, key_TKE, value_TKE, grad_THE, log_sum_exp_HT, delta_HT,
        grad_key_TKE, grad_value_TKE, work, query_tiles, ranges, tokens, window, scale, scale * LOG2_E,
        *strides, **shape, BLOCK=config.block, device=device, warps=config.warps, stages=config.stages,
    )  # fmt: skip
    return grad_query_THE, grad_key_TKE, grad_value_TKE


@triton.jit
def _query_step(
    acc, q, g, log_sum_exp, delta, key, value, first, row, column, key_stride, value_stride, kv_end, shift, window, scale,
    SIZE: tl.constexpr, COLUMNS: tl.constexpr, BLOCK: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    place = first + tl.arange(0, BLOCK)
    k = load_rows(key, place, key_stride, column, kv_end, SIZE, COLUMNS)
    v = load_rows(value, place, value_stride, column, kv_end, SIZE, COLUMNS)
    weights = tl.exp2(tl.dot(q, tl.trans(k), input_precision="ieee") * scale - log_sum_exp[:, None])
    if MASKED:
        distance = row[:, None] - place[None, :] - shift
        weights = tl.where((distance >= 0) & (distance < window) & (place < kv_end)[None, :], weights, 0.0)
    grad_scores = weights * (tl.dot(g, tl.trans(v), input_precision="ieee") - delta[:, None])
    return tl.dot(grad_scores.to(k.dtype), k, acc, input_precision="ieee")


@triton.jit(do_not_specialize=["ranges", "tokens", "window"])
def _query_kernel(
    query, key, value, grad, out, log_sum_exp, delta, grad_query, work, ranges, tokens, window, scale, scale_log2, query_stride,
    query_head_stride, key_stride, key_head_stride, value_stride, value_head_stride, grad_stride, grad_head_stride, out_stride,
    out_head_stride, HEADS: tl.constexpr, GROUP: tl.constexpr, SIZE: tl.constexpr, COLUMNS: tl.constexpr, TILE: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Gradient of a tile of queries; D of its rows is left for the other pass."""
    tile = tl.program_id(0) // HEADS
    head = tl.program_id(0) % HEADS
    start = tl.load(work + tile * 4)
    end = tl.load(work + tile * 4 + 1)
    if start == end:
        return
    row = start + tl.arange(0, TILE)
    column = tl.arange(0, COLUMNS)
    inside = row < end
    q = load_rows(query + head * query_head_stride, row, query_stride, column, end, SIZE, COLUMNS)
    g = load_rows(grad + head * grad_head_stride, row, grad_stride, column, end, SIZE, COLUMNS)
    o = load_rows(out + head * out_head_stride, row, out_stride, column, end, SIZE, COLUMNS)
    d = tl.sum(g.to(tl.float32) * o.to(tl.float32), axis=1)
    at = head.to(tl.int64) * tokens + row
    tl.store(delta + at, d, mask=inside)
    # Infinity where a row sees nothing, or is none: its weights are then 0.
    lse = tl.load(log_sum_exp + at, mask=inside, other=float("inf"))
    lse = tl.where(lse == float("-inf"), float("inf"), lse) * 1.4426950408889634
    key += head // GROUP * key_head_stride
    value += head // GROUP * value_head_stride
    acc = tl.zeros((TILE, COLUMNS), dtype=tl.float32)
    for listed in range(tl.load(work + tile * 4 + 2), tl.load(work + tile * 4 + 3)):
        found = work + (ranges + listed) * 4
        kv_start, kv_end, shift = tl.load(found), tl.load(found + 1), tl.load(found + 2)
        left, whole, blocks = sections(start, end, kv_start, kv_end, shift, window, BLOCK)
        for block in range(left):
            acc = _query_step(
                acc, q, g, lse, d, key, value, kv_start + block * BLOCK, row, column, key_stride, value_stride, kv_end, shift,
                window, scale_log2, SIZE, COLUMNS, BLOCK, True,
            )  # fmt: skip
        for block in range(left, whole):
            acc = _query_step(
                acc, q, g, lse, d, key, value, kv_start + block * BLOCK, row, column, key_stride, value_stride, kv_end, shift,
                window, scale_log2, SIZE, COLUMNS, BLOCK, False,
            )  # fmt: skip
        for block in range(whole, blocks):
            acc = _query_step(
                acc, q, g, lse, d, key, value, kv_start + block * BLOCK, row, column, key_stride, value_stride, kv_end, shift,
                window, scale_log2, SIZE, COLUMNS, BLOCK, True,
            )  # fmt: skip
    target = grad_query + row.to(tl.int64)[:, None] * (HEADS * SIZE) + head * SIZE + column[None, :]
    tl.store(target, (acc * scale).to(grad_query.dtype.element_ty), mask=inside[:, None] & (column < SIZE)[None, :])


@triton.jit
def _key_step(
    grad_key, grad_value, k, v, query, grad, log_sum_exp, delta, first, place, column, query_stride, grad_stride, query_end,
    shift, window, scale, SIZE: tl.constexpr, COLUMNS: tl.constexpr, BLOCK: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    row = first + tl.arange(0, BLOCK)
    q = load_rows(query, row, query_stride, column, query_end, SIZE, COLUMNS)
    g = load_rows(grad, row, grad_stride, column, query_end, SIZE, COLUMNS)
    inside = row < query_end
    lse = tl.load(log_sum_exp + row, mask=inside, other=float("inf")) * 1.4426950408889634
    d = tl.load(delta + row, mask=inside, other=0.0)
    weights = tl.exp2(tl.dot(k, tl.trans(q), input_precision="ieee") * scale - lse[None, :])
    if MASKED:
        distance = row[None, :] - place[:, None] - shift
        weights = tl.where((distance >= 0) & (distance < window), weights, 0.0)
    grad_value = tl.dot(weights.to(g.dtype), g, grad_value, input_precision="ieee")
    grad_scores = weights * (tl.dot(v, tl.trans(g), input_precision="ieee") - d[None, :])
    return tl.dot(grad_scores.to(q.dtype), q, grad_key, input_precision="ieee"), grad_value


@triton.jit(do_not_specialize=["first_tile", "ranges", "tokens", "window"])
def _key_kernel(
    query, key, value, grad, log_sum_exp, delta, grad_key, grad_value, work, first_tile, ranges, tokens, window, scale,
    scale_log2, query_stride, query_head_stride, key_stride, key_head_stride, value_stride, value_head_stride, grad_stride,
    grad_head_stride, HEADS: tl.constexpr, GROUP: tl.constexpr, SIZE: tl.constexpr, COLUMNS: tl.constexpr, TILE: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Gradients of a tile of keys and values, over all query heads that read them."""
    KV_HEADS: tl.constexpr = HEADS // GROUP
    tile = first_tile + tl.program_id(0) // KV_HEADS
    kv_head = tl.program_id(0) % KV_HEADS
    start = tl.load(work + tile * 4)
    end = tl.load(work + tile * 4 + 1)
    if start == end:
        return
    place = start + tl.arange(0, TILE)
    column = tl.arange(0, COLUMNS)
    k = load_rows(key + kv_head * key_head_stride, place, key_stride, column, end, SIZE, COLUMNS)
    v = load_rows(value + kv_head * value_head_stride, place, value_stride, column, end, SIZE, COLUMNS)
    dk = tl.zeros((TILE, COLUMNS), dtype=tl.float32)
    dv = tl.zeros((TILE, COLUMNS), dtype=tl.float32)
    for member in range(GROUP):
        head = kv_head * GROUP + member
        queries, grads = query + head * query_head_stride, grad + head * grad_head_stride
        sums, deltas = log_sum_exp + head.to(tl.int64) * tokens, delta + head.to(tl.int64) * tokens
        for listed in range(tl.load(work + tile * 4 + 2), tl.load(work + tile * 4 + 3)):
            found = work + (ranges + listed) * 4
            query_start, query_end, shift = tl.load(found), tl.load(found + 1), tl.load(found + 2)
            blocks = tl.cdiv(query_end - query_start, BLOCK)
            # The diagonal cuts a block with a query before the last key, the window's edge one with a query beyond the first.
            left = tl.minimum(tl.cdiv(tl.maximum(end - 1 + shift - query_start, 0), BLOCK), blocks)
            whole = tl.maximum(left, tl.maximum(tl.minimum(start + shift + window, query_end) - query_start, 0) // BLOCK)
            for block in range(left):
                dk, dv = _key_step(
                    dk, dv, k, v, queries, grads, sums, deltas, query_start + block * BLOCK, place, column, query_stride,
                    grad_stride, query_end, shift, window, scale_log2, SIZE, COLUMNS, BLOCK, True,
                )  # fmt: skip
            for block in range(left, whole):
                dk, dv = _key_step(
                    dk, dv, k, v, queries, grads, sums, deltas, query_start + block * BLOCK, place, column, query_stride,
                    grad_stride, query_end, shift, window, scale_log2, SIZE, COLUMNS, BLOCK, False,
                )  # fmt: skip
            for block in range(whole, blocks):
                dk, dv = _key_step(
                    dk, dv, k, v, queries, grads, sums, deltas, query_start + block * BLOCK, place, column, query_stride,
                    grad_stride, query_end, shift, window, scale_log2, SIZE, COLUMNS, BLOCK, True,
                )  # fmt: skip
    target = place.to(tl.int64)[:, None] * (KV_HEADS * SIZE) + kv_head * SIZE + column[None, :]
    inside = (place < end)[:, None] & (column < SIZE)[None, :]
    tl.store(grad_key + target, (dk * scale).to(grad_key.dtype.element_ty), mask=inside)
    tl.store(grad_value + target, dv.to(grad_value.dtype.element_ty), mask=inside)
