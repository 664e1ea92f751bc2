"""Attention by ranges, backward, in a fixed order: one pass over tiles of keys, or one of queries and one of keys.

With weights P, D = rowsum(dO * O), dP = dO V^T, dS = P * (dP - D) and the scale s of the scores (Dao 2023,
https://arxiv.org/abs/2307.08691, algorithm 2):

    dQ = s dS K,   dK = s dS^T Q,   dV = P^T dO

A program owns a tile of keys of one key/value head. It computes the weights again from the log-sum-exp, for all queries that
see the tile and all query heads of its head, and adds up dK and dV in registers.

**Where dQ comes from.** In one pass, each block of scores serves all three gradients: 5 matrix products a pair. dQ of a block
of queries is then a sum over programs. They add to it in float32, one after the other, from the first key of the text to the
last: the sum has one order, and its bits do not depend on how the chip schedules programs. In two passes, a kernel of its own
owns tiles of queries: scores and dP are computed twice, 7 products a pair, and no program waits for another. The field `passes`
of the configuration "attention_backward" chooses; `kernels.configurations` says why it is 2.

**How programs take turns.** `left` holds, for each block of queries and head, how many tiles of keys still have to add to it; 0
before the first has. A program knows from the lists how many tiles follow its own, and waits until `left` says that it is next.
It cannot wait for ever. The number that a program draws at its start says which tile it owns, tiles are listed so that an
earlier tile of a text has an earlier number (`kernels.attention.work`), and so a program only waits for programs that run
already. It walks through queries from the last to the first: in a window, neighbouring tiles that start together then reach a
block of queries one step after another, and nobody waits.

**Why turns, and not a sum of partial dQs.** A tile of 128 keys adds to all queries of a window of 4,096: without turns each
query has 33 partial sums, 33 x 16 KiB a token for 32 heads of 128 in float32. Turns need one, 16 KiB a token. A step (128 keys,
32 queries) reads and writes 32 KiB of it, mostly in the chip's L2 cache, beside 5.2 MFLOP of products: 1.9 TB/s at 300 TFLOP/s,
where copies out of L2 reach about 5.5 (predicted by this arithmetic; not measured).

**Values that are not finite.** Blocks of queries are read by masked pointers: zeros stand behind a range's end, not the next
document. Descriptors for the inner blocks alone need a second loop, whose registers spill (536 B on sm_90).

Shapes: T tokens, H query heads, K key/value heads, E head size.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels import TILE
from kernels.attention.tiles import (
    LOG2_E,
    announce,
    columns,
    cut,
    heads_side_by_side,
    launch_tiles,
    load_rows,
    own_range,
    own_tile,
    rows_and_parts,
    sections,
    store_rows,
    stored_rows,
    wait_for,
    within,
)
from kernels.configurations import configuration
from kernels.launch import INTERPRETED, launch

# A place that no query sees.
NOWHERE = tl.constexpr(2**31 - 1)


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
    (tokens, heads, size), device = query_THE.shape, query_THE.device
    results = [torch.empty(part.shape, dtype=query_THE.dtype, device=device) for part in (query_THE, key_TKE, value_TKE)]
    grad_query_THE, grad_key_TKE, grad_value_TKE = results
    delta_HT = _delta(grad_THE, out_THE)
    one_pass = in_one_pass(device, query_THE.dtype, tile)
    sum_THE = torch.empty(query_THE.shape, dtype=torch.float32, device=device) if one_pass else None
    # A number for each row that a block of queries may begin with, and the number of the next program.
    left = torch.zeros(heads * tokens + 1, dtype=torch.int32, device=device) if one_pass else None
    if not one_pass:
        launch_tiles(
            _query_kernel,
            "attention_queries",
            query_tiles,
            work,
            query_tiles + key_tiles,
            window,
            tile,
            by_tile=(query_THE, grad_THE),
            by_block=(key_TKE, value_TKE),
            rest=(size**-0.5, log_sum_exp_HT, delta_HT, grad_query_THE),
        )
    launch_tiles(
        _key_kernel,
        "attention_backward" if one_pass else "attention_keys",
        key_tiles,
        work,
        query_tiles + key_tiles,
        window,
        tile,
        by_tile=(key_TKE, value_TKE),
        by_block=(query_THE, grad_THE),
        blocks_by_pointer=True,
        rest=(size**-0.5, query_tiles, log_sum_exp_HT, delta_HT, grad_key_TKE, grad_value_TKE, sum_THE, left),
        ONE_PASS=one_pass,
    )
    if sum_THE is not None:
        _scale(sum_THE, size**-0.5, grad_query_THE)
    return grad_query_THE, grad_key_TKE, grad_value_TKE


def in_one_pass(device: torch.device, dtype: torch.dtype, tile: int = TILE) -> bool:
    """Whether the pass over keys also adds up dQ: where the configuration asks for one pass, and one pass can be.

    float32 tiles do not fit into a chip's shared memory. The lists' tiles, programs and blocks must lie in one grid.
    """
    config = configuration("attention_backward", device)
    rows, parts = rows_and_parts(tile, config)
    return config.passes == 1 and (dtype.itemsize == 2 or INTERPRETED) and rows * parts == tile and rows % config.block == 0


def _delta(grad_THE: Tensor, out_THE: Tensor) -> Tensor:
    """D: the sum of dO * O over each row, [H, T] in float32."""
    tokens, heads, size = out_THE.shape
    config = configuration("attention_tokens", out_THE.device)
    grad_THE, out_THE = heads_side_by_side(grad_THE), heads_side_by_side(out_THE)
    delta_HT = torch.empty((heads, tokens), dtype=torch.float32, device=out_THE.device)
    launch(
        _delta_kernel,
        (triton.cdiv(tokens, config.rows) * heads,),
        grad_THE,
        out_THE,
        grad_THE.stride(0),
        out_THE.stride(0),
        tokens,
        delta_HT,
        HEADS=heads,
        SIZE=size,
        ROWS=config.rows,
        device=out_THE.device,
        warps=config.warps,
    )
    return delta_HT


def _scale(sum_THE: Tensor, scale: float, out_THE: Tensor) -> None:
    """sum * scale, in the dtype of `out_THE`."""
    tokens, heads, size = out_THE.shape
    config = configuration("attention_tokens", out_THE.device)
    launch(
        _scale_kernel,
        (triton.cdiv(tokens, config.rows) * heads,),
        sum_THE,
        scale,
        tokens,
        out_THE,
        HEADS=heads,
        SIZE=size,
        ROWS=config.rows,
        device=out_THE.device,
        warps=config.warps,
    )


@triton.jit(do_not_specialize=["tokens"])
def _delta_kernel(
    grad,  # [tokens, HEADS, SIZE]: gradient of the output
    out,  # [tokens, HEADS, SIZE]
    grad_stride,  # elements from token to token
    out_stride,
    tokens,
    delta,  # [HEADS, tokens] float32
    HEADS: tl.constexpr,
    SIZE: tl.constexpr,
    ROWS: tl.constexpr,  # tokens of a program
):
    head = tl.program_id(0) % HEADS
    first = tl.program_id(0) // HEADS * ROWS
    row = first + tl.arange(0, ROWS)
    g = load_rows(grad, grad_stride, head, first, tokens, ROWS, SIZE, False)
    o = load_rows(out, out_stride, head, first, tokens, ROWS, SIZE, False)
    d = tl.sum(g.to(tl.float32) * o.to(tl.float32), axis=1)
    tl.store(delta + head.to(tl.int64) * tokens + row, d, mask=row < tokens)


@triton.jit(do_not_specialize=["ranges", "tokens", "window"])
def _query_kernel(
    query,  # [tokens, HEADS, SIZE]
    grad,  # [tokens, HEADS, SIZE]: gradient of the output
    key,  # [tokens, HEADS / GROUP, SIZE]: a descriptor, or a pointer
    value,  # [tokens, HEADS / GROUP, SIZE], likewise
    query_stride,  # elements from token to token
    grad_stride,
    key_stride,
    value_stride,
    work,  # [rows, 4] int32: the work lists
    ranges,  # row of `work` where ranges begin
    tokens,
    window,
    scale_log2,  # scale log2(e)
    scale,  # SIZE^(-1/2)
    log_sum_exp,  # [HEADS, tokens] float32
    delta,  # [HEADS, tokens] float32: D
    grad_query,  # [tokens, HEADS, SIZE]
    HEADS: tl.constexpr,  # query heads
    GROUP: tl.constexpr,  # query heads for each key/value head
    SIZE: tl.constexpr,  # elements of a head
    TILE: tl.constexpr,  # queries of a program
    PARTS: tl.constexpr,  # programs for a tile of the lists
    BLOCK: tl.constexpr,  # keys of a step
    DESCRIPTORS: tl.constexpr,  # whether key and value are descriptors
):
    """Gradient of a tile of queries: the first of two passes."""
    head, start, end, first_range, last_range = own_tile(tl.program_id(0), work, 0, HEADS, TILE, PARTS)
    if start >= end:
        return
    kv_head = head // GROUP
    row = start + tl.arange(0, TILE)
    inside = row < end
    q = load_rows(query, query_stride, head, start, end, TILE, SIZE, False)
    g = load_rows(grad, grad_stride, head, start, end, TILE, SIZE, False)
    at = head.to(tl.int64) * tokens + row
    d = tl.load(delta + at, mask=inside, other=0.0)
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
    store_rows(grad_query, acc * scale, start, end, head, TILE, HEADS, SIZE)


@triton.jit(do_not_specialize=["first_tile", "ranges", "tokens", "window"])
def _key_kernel(
    key,  # [tokens, HEADS, SIZE]
    value,  # [tokens, HEADS, SIZE]
    query,  # [tokens, HEADS * GROUP, SIZE]
    grad,  # [tokens, HEADS * GROUP, SIZE]: gradient of the output
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
    delta,  # [HEADS * GROUP, tokens] float32: D
    grad_key,  # [tokens, HEADS, SIZE]
    grad_value,  # [tokens, HEADS, SIZE]
    grad_query,  # [tokens, HEADS * GROUP, SIZE] float32: dQ / scale; None, like `left`, without ONE_PASS
    left,  # [HEADS * GROUP * tokens + 1] int32: tiles that still add to a block; behind them, programs started so far
    HEADS: tl.constexpr,  # key/value heads
    GROUP: tl.constexpr,  # query heads for each key/value head
    SIZE: tl.constexpr,  # elements of a head
    TILE: tl.constexpr,  # keys of a program
    PARTS: tl.constexpr,  # programs for a tile of the lists
    BLOCK: tl.constexpr,  # queries of a step
    DESCRIPTORS: tl.constexpr,  # never: see above
    ONE_PASS: tl.constexpr,  # whether dQ is made as well
):
    """Gradients of a tile of keys and values, over all query heads that read them, and the tile's part of the queries'."""
    number = tl.program_id(0)
    if ONE_PASS:
        number = tl.atomic_add(left + tl.cast(tokens, tl.int64) * (HEADS * GROUP), 1, sem="relaxed")
    kv_head, start, end, first_range, last_range = own_tile(number, work, first_tile, HEADS, TILE, PARTS)
    if start >= end:
        return
    place = start + tl.arange(0, TILE)
    # Where a key can be seen: nowhere, for rows behind the tile's end.
    place = tl.where(place < end, place, NOWHERE)
    k = load_rows(key, key_stride, kv_head, start, end, TILE, SIZE, False)
    v = load_rows(value, value_stride, kv_head, start, end, TILE, SIZE, False)
    dk = tl.zeros((TILE, columns(SIZE)), dtype=tl.float32)
    dv = tl.zeros((TILE, columns(SIZE)), dtype=tl.float32)
    for member in range(GROUP):
        head = kv_head * GROUP + member
        base = head.to(tl.int64) * tokens
        if ONE_PASS and first_range == last_range:
            # Only padding is seen by nobody: no tile adds to its queries.
            store_rows(grad_query, dk, start, end, head, TILE, HEADS * GROUP, SIZE)
        for listed in range(first_range, last_range):
            found = work + (ranges + listed) * 4
            segment_end = tl.load(found + 1)
            shift = tl.load(found + 2)
            # The range, narrowed to the queries that see these keys.
            query_start = tl.maximum(tl.load(found), start + shift)
            query_end = tl.minimum(segment_end, end - 1 + shift + window)
            # The first key of the text, and the tiles of keys from this tile to the tile of the range's first query.
            text_start = tl.load(found + 3)
            ahead = tl.cdiv(query_start - shift - start, TILE)
            blocks = tl.cdiv(tl.maximum(query_end - query_start, 0), BLOCK)
            for step in range(blocks):
                first = query_start + (blocks - 1 - step) * BLOCK
                row = first + tl.arange(0, BLOCK)
                inside = row < query_end
                q = load_rows(query, query_stride, head, first, query_end, BLOCK, SIZE, False)
                g = load_rows(grad, grad_stride, head, first, query_end, BLOCK, SIZE, False)
                # Infinity behind the range's end: the weights are 0 there, because the rows are zeros.
                lse = tl.load(log_sum_exp + base + row, mask=inside, other=float("inf")) / scale
                d = tl.load(delta + base + row, mask=inside, other=0.0)
                # The products begin at -lse and -d, which takes fewer registers than to subtract from their results.
                scores = tl.dot(k, tl.trans(q), tl.broadcast_to(-lse[None, :], (TILE, BLOCK)), input_precision="ieee")
                grad_weights = tl.dot(v, tl.trans(g), tl.broadcast_to(-d[None, :], (TILE, BLOCK)), input_precision="ieee")
                weights = tl.exp2(scores * scale_log2)
                weights = tl.where(within((row - shift)[None, :] - place[:, None], window), weights, 0.0)
                grad_scores = (weights * grad_weights).to(q.dtype)
                dv = tl.dot(weights.to(g.dtype), g, dv, input_precision="ieee")
                dk = tl.dot(grad_scores, q, dk, input_precision="ieee")
                if ONE_PASS:
                    # By K^T dS^T: the other way round, dS would have to change its layout.
                    dq = tl.trans(tl.dot(tl.trans(k), grad_scores, input_precision="ieee"))
                    # Tiles that add to this block after this tile, up to the tile of the block's own places.
                    follow = ahead + (first - query_start) // TILE
                    # The first key that the block sees lies in the first tile that adds to it.
                    begins = tl.maximum(text_start, first - shift - window + 1) >= start
                    turn = wait_for(left + base + first, tl.where(begins, 0, follow + 1))
                    # `turn` decides what is loaded, so that no compiler loads before the wait.
                    filled = tl.where(turn > 0, segment_end, first)
                    at, earlier = stored_rows(grad_query, first, filled, head, BLOCK, HEADS * GROUP, SIZE)
                    dq += tl.load(at, mask=earlier, other=0.0)
                    store_rows(grad_query, dq, first, segment_end, head, BLOCK, HEADS * GROUP, SIZE)
                    announce(left + base + first, follow)
    store_rows(grad_key, dk * scale, start, end, kv_head, TILE, HEADS, SIZE)
    store_rows(grad_value, dv, start, end, kv_head, TILE, HEADS, SIZE)


@triton.jit(do_not_specialize=["tokens"])
def _scale_kernel(
    given,  # [tokens, HEADS, SIZE] float32
    scale,
    tokens,
    out,  # [tokens, HEADS, SIZE]
    HEADS: tl.constexpr,
    SIZE: tl.constexpr,
    ROWS: tl.constexpr,  # tokens of a program
):
    head = tl.program_id(0) % HEADS
    first = tl.program_id(0) // HEADS * ROWS
    at, inside = stored_rows(given, first, tokens, head, ROWS, HEADS, SIZE)
    store_rows(out, tl.load(at, mask=inside) * scale, first, tokens, head, ROWS, HEADS, SIZE)
