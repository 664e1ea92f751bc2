"""Attention by ranges, backward, in a fixed order without atomics: one pass by tiles of queries, one by tiles of keys.

With P the weights, D = rowsum(dO * O), dP = dO V^T and dS = P * (dP - D):  dQ = s dS K,  dK = s dS^T Q,  dV = P^T dO, s the
scale of the scores (Dao 2023, https://arxiv.org/abs/2307.08691, algorithm 2). Weights are computed again from the log-sum-exp
in both passes. The query heads of a key/value head are added up inside of one program.

Shapes: T tokens, H query heads, K key/value heads, E head size.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.attention.forward import (
    LOG2_E,
    columns,
    load_rows,
    own_range,
    own_tile,
    sections,
    sources,
    strides,
    tile_rows,
    within,
)
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
    scale_log2 = scale * LOG2_E.value
    shape: dict[str, Any] = {"HEADS": heads, "GROUP": heads // kv_heads, "SIZE": size, "COLUMNS": columns(size)}
    ranges = query_tiles + key_tiles
    config = configuration("attention_queries", device)
    block, (rows, parts) = config.block, tile_rows(tile, config)
    descriptors, (query, key, value, grad, out) = sources(
        config, (query_THE, rows), (key_TKE, block), (value_TKE, block), (grad_THE, rows), (out_THE, rows)
    )
    launch(
        _query_kernel, (query_tiles * parts * heads,), query, key, value, grad, out, log_sum_exp_HT, delta_HT, grad_query_THE,
        work, ranges, tokens, window, scale, scale_log2, *strides(query_THE, key_TKE, value_TKE, grad_THE, out_THE), **shape,
        TILE=rows, PARTS=parts, BLOCK=block, DESCRIPTORS=descriptors, device=device, warps=config.warps, stages=config.stages,
    )  # fmt: skip
    config = configuration("attention_keys", device)
    block, (rows, parts) = config.block, tile_rows(tile, config)
    descriptors, (query, key, value, grad) = sources(
        config, (query_THE, block), (key_TKE, rows), (value_TKE, rows), (grad_THE, block)
    )
    launch(
        _key_kernel, (key_tiles * parts * kv_heads,), query, key, value, grad, log_sum_exp_HT, delta_HT, grad_key_TKE,
        grad_value_TKE, work, query_tiles, ranges, tokens, window, scale, scale_log2,
        *strides(query_THE, key_TKE, value_TKE, grad_THE), **shape, TILE=rows, PARTS=parts, BLOCK=block,
        DESCRIPTORS=descriptors, device=device, warps=config.warps, stages=config.stages,
    )  # fmt: skip
    return grad_query_THE, grad_key_TKE, grad_value_TKE


@triton.jit
def _key_blocks(
    acc, q, g, log_sum_exp, delta, key, value, begin, stop, kv_start, kv_end, row, shift, window, scale, key_stride,
    value_stride, kv_head, key_head_stride, value_head_stride, SIZE: tl.constexpr, COLUMNS: tl.constexpr, BLOCK: tl.constexpr,
    DESCRIPTORS: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """dS K, with that of the blocks [begin, stop) of a range of keys."""
    for block in range(begin, stop):
        first = kv_start + block * BLOCK
        k = load_rows(key, first, kv_end, key_stride, kv_head, key_head_stride, BLOCK, SIZE, COLUMNS, DESCRIPTORS)
        v = load_rows(value, first, kv_end, value_stride, kv_head, value_head_stride, BLOCK, SIZE, COLUMNS, DESCRIPTORS)
        weights = tl.exp2(tl.dot(q, tl.trans(k), input_precision="ieee") * scale - log_sum_exp[:, None])
        if MASKED:
            place = first + tl.arange(0, BLOCK)
            seen = within((row - shift)[:, None] - place[None, :], window) & (place < kv_end)[None, :]
            weights = tl.where(seen, weights, 0.0)
        grad_scores = weights * (tl.dot(g, tl.trans(v), input_precision="ieee") - delta[:, None])
        acc = tl.dot(grad_scores.to(k.dtype), k, acc, input_precision="ieee")
    return acc


@triton.jit(do_not_specialize=["ranges", "tokens", "window"])
def _query_kernel(
    query, key, value, grad, out, log_sum_exp, delta, grad_query, work, ranges, tokens, window, scale, scale_log2, query_stride,
    query_head_stride, key_stride, key_head_stride, value_stride, value_head_stride, grad_stride, grad_head_stride, out_stride,
    out_head_stride, HEADS: tl.constexpr, GROUP: tl.constexpr, SIZE: tl.constexpr, COLUMNS: tl.constexpr, TILE: tl.constexpr,
    PARTS: tl.constexpr, BLOCK: tl.constexpr, DESCRIPTORS: tl.constexpr,
):  # fmt: skip
    """Gradient of a tile of queries; D of its rows is left for the other pass."""
    head, start, end, first_range, last_range = own_tile(work, 0, HEADS, TILE, PARTS)
    if start >= end:
        return
    kv_head = head // GROUP
    row = start + tl.arange(0, TILE)
    inside = row < end
    q = load_rows(query, start, end, query_stride, head, query_head_stride, TILE, SIZE, COLUMNS, DESCRIPTORS)
    g = load_rows(grad, start, end, grad_stride, head, grad_head_stride, TILE, SIZE, COLUMNS, DESCRIPTORS)
    o = load_rows(out, start, end, out_stride, head, out_head_stride, TILE, SIZE, COLUMNS, DESCRIPTORS)
    d = tl.sum(g.to(tl.float32) * o.to(tl.float32), axis=1)
    at = head.to(tl.int64) * tokens + row
    tl.store(delta + at, d, mask=inside)
    # Infinity where a row sees nothing, or is none: its weights are then 0.
    lse = tl.load(log_sum_exp + at, mask=inside, other=float("inf"))
    lse = tl.where(lse == float("-inf"), float("inf"), lse) * LOG2_E
    acc = tl.zeros((TILE, COLUMNS), dtype=tl.float32)
    for listed in range(first_range, last_range):
        kv_start, kv_end, shift = own_range(work, ranges + listed, start, end, window)
        left, whole, blocks = sections(start, end, kv_start, kv_end, shift, window, BLOCK)
        acc = _key_blocks(
            acc, q, g, lse, d, key, value, 0, left, kv_start, kv_end, row, shift, window, scale_log2, key_stride, value_stride,
            kv_head, key_head_stride, value_head_stride, SIZE, COLUMNS, BLOCK, DESCRIPTORS, True,
        )  # fmt: skip
        acc = _key_blocks(
            acc, q, g, lse, d, key, value, left, whole, kv_start, kv_end, row, shift, window, scale_log2, key_stride,
            value_stride, kv_head, key_head_stride, value_head_stride, SIZE, COLUMNS, BLOCK, DESCRIPTORS, False,
        )  # fmt: skip
        acc = _key_blocks(
            acc, q, g, lse, d, key, value, whole, blocks, kv_start, kv_end, row, shift, window, scale_log2, key_stride,
            value_stride, kv_head, key_head_stride, value_head_stride, SIZE, COLUMNS, BLOCK, DESCRIPTORS, True,
        )  # fmt: skip
    column = tl.arange(0, COLUMNS)
    target = grad_query + row.to(tl.int64)[:, None] * (HEADS * SIZE) + head * SIZE + column[None, :]
    tl.store(target, (acc * scale).to(grad_query.dtype.element_ty), mask=inside[:, None] & (column < SIZE)[None, :])


@triton.jit(do_not_specialize=["first_tile", "ranges", "tokens", "window"])
def _key_kernel(
    query, key, value, grad, log_sum_exp, delta, grad_key, grad_value, work, first_tile, ranges, tokens, window, scale,
    scale_log2, query_stride, query_head_stride, key_stride, key_head_stride, value_stride, value_head_stride, grad_stride,
    grad_head_stride, HEADS: tl.constexpr, GROUP: tl.constexpr, SIZE: tl.constexpr, COLUMNS: tl.constexpr, TILE: tl.constexpr,
    PARTS: tl.constexpr, BLOCK: tl.constexpr, DESCRIPTORS: tl.constexpr,
):  # fmt: skip
    """Gradients of a tile of keys and values, over all query heads that read them."""
    KV_HEADS: tl.constexpr = HEADS // GROUP
    kv_head, start, end, first_range, last_range = own_tile(work, first_tile, KV_HEADS, TILE, PARTS)
    if start >= end:
        return
    place = start + tl.arange(0, TILE)
    k = load_rows(key, start, end, key_stride, kv_head, key_head_stride, TILE, SIZE, COLUMNS, DESCRIPTORS)
    v = load_rows(value, start, end, value_stride, kv_head, value_head_stride, TILE, SIZE, COLUMNS, DESCRIPTORS)
    dk = tl.zeros((TILE, COLUMNS), dtype=tl.float32)
    dv = tl.zeros((TILE, COLUMNS), dtype=tl.float32)
    for member in range(GROUP):
        head = kv_head * GROUP + member
        base = head.to(tl.int64) * tokens
        for listed in range(first_range, last_range):
            found = work + (ranges + listed) * 4
            shift = tl.load(found + 2)
            # As far as its queries see these keys.
            query_start = tl.maximum(tl.load(found), start + shift)
            query_end = tl.minimum(tl.load(found + 1), end - 1 + shift + window)
            for block in range(tl.cdiv(tl.maximum(query_end - query_start, 0), BLOCK)):
                first = query_start + block * BLOCK
                row = first + tl.arange(0, BLOCK)
                inside = row < query_end
                q = load_rows(query, first, query_end, query_stride, head, query_head_stride, BLOCK, SIZE, COLUMNS, DESCRIPTORS)
                g = load_rows(grad, first, query_end, grad_stride, head, grad_head_stride, BLOCK, SIZE, COLUMNS, DESCRIPTORS)
                # Infinity beyond the range: weights are 0 there, whatever the rows hold.
                lse = tl.load(log_sum_exp + base + row, mask=inside, other=float("inf")) * LOG2_E
                d = tl.load(delta + base + row, mask=inside, other=0.0)
                weights = tl.exp2(tl.dot(k, tl.trans(q), input_precision="ieee") * scale_log2 - lse[None, :])
                # Masked in every block: sections as in the other passes need more registers than there are.
                weights = tl.where(within((row - shift)[None, :] - place[:, None], window), weights, 0.0)
                dv = tl.dot(weights.to(g.dtype), g, dv, input_precision="ieee")
                grad_scores = weights * (tl.dot(v, tl.trans(g), input_precision="ieee") - d[None, :])
                dk = tl.dot(grad_scores.to(q.dtype), q, dk, input_precision="ieee")
    column = tl.arange(0, COLUMNS)
    target = place.to(tl.int64)[:, None] * (KV_HEADS * SIZE) + kv_head * SIZE + column[None, :]
    inside = (place < end)[:, None] & (column < SIZE)[None, :]
    tl.store(grad_key + target, (dk * scale).to(grad_key.dtype.element_ty), mask=inside)
    tl.store(grad_value + target, dv.to(grad_value.dtype.element_ty), mask=inside)
