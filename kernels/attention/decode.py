"""Attention of a text's newest tokens to the earlier ones, kept in a ring, and to themselves: one token or a few at a time.

Reading keys and values is the whole cost. The query heads of a key/value head are rows of one tile, which reads the keys once.
Where these tiles are too few for a chip, programs split the tokens of each tile between them (Flash-Decoding, Dao et al. 2023,
https://pytorch.org/blog/flash-decoding), and a second kernel adds up the splits by their log-sum-exps, in a fixed order.

Shapes: T new tokens, C rows of the ring, H query heads, K key/value heads, G = H / K, E head size, Q queries of a piece, J keys
of a piece, P partial results (splits).
"""

import itertools

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.attention.eager import masked_attention
from kernels.attention.tiles import LOG2_E, NO_PEAK, columns, heads_side_by_side, softmax_step, within
from kernels.attention.work import UNBOUNDED
from kernels.configurations import configuration
from kernels.launch import launch, multiprocessors, operator, runs_triton

# New tokens whose scores the reference holds at once.
_PIECE = 128


def decode_attention(
    query_THE: Tensor,
    key_TKE: Tensor,
    value_TKE: Tensor,
    ring_key_CKE: Tensor,
    ring_value_CKE: Tensor,
    seen: int,
    window: int | None,
) -> Tensor:
    """softmax(query key^T / sqrt(E)) value, for each new token over the last `window` tokens of the text, itself included.

    Args:
        query_THE, key_TKE, value_TKE: of tokens seen, seen + 1, ...; H is a multiple of K, and query head h reads key/value
            head h // (H / K).
        ring_key_CKE, ring_value_CKE: earlier token p < seen stands in row p % C. All tensors have one dtype.
        window: in tokens, None for unbounded.
    Returns: [T, H, E] in that dtype, without a gradient. Scores and softmax are computed in float32.
    Raises: ValueError for a ring that has lost tokens which the first new token sees.
    """
    room, reach = ring_key_CKE.shape[0], UNBOUNDED if window is None else window
    if min(seen, reach - 1) > room:
        raise ValueError(
            f"a new token sees {min(seen, reach - 1)} earlier tokens, but the ring has room for {room}: enlarge the ring"
        )
    if runs_triton(query_THE):
        return _decode(query_THE, key_TKE, value_TKE, ring_key_CKE, ring_value_CKE, seen, reach)
    return decode_attention_reference(query_THE, key_TKE, value_TKE, ring_key_CKE, ring_value_CKE, seen, window)


def decode_attention_reference(query_THE, key_TKE, value_TKE, ring_key_CKE, ring_value_CKE, seen, window) -> Tensor:
    device, kv_heads, group = query_THE.device, key_TKE.shape[1], query_THE.shape[1] // key_TKE.shape[1]
    reach = UNBOUNDED if window is None else window
    oldest = max(0, seen - reach + 1)
    slot_J = torch.arange(oldest, seen, device=device) % max(1, ring_key_CKE.shape[0])
    key_KJE = torch.cat((ring_key_CKE[slot_J], key_TKE)).transpose(0, 1)
    value_KJE = torch.cat((ring_value_CKE[slot_J], value_TKE)).transpose(0, 1)
    parts = []
    for piece_QHE, start in zip(query_THE.split(_PIECE), itertools.count(seen, _PIECE), strict=False):
        end, first = start + len(piece_QHE), max(0, start - reach + 1)
        distance_QJ = torch.arange(start, end, device=device)[:, None] - torch.arange(first, end, device=device)
        mask_QJ = (distance_QJ >= 0) & (distance_QJ < reach)
        # The G query heads of a key/value head become G times as many queries of one head, so that no key is copied G times.
        query_KGQE = piece_QHE.unflatten(1, (kv_heads, group)).permute(1, 2, 0, 3)
        piece = slice(first - oldest, end - oldest)
        out_KQE = masked_attention(query_KGQE.flatten(1, 2), key_KJE[:, piece], value_KJE[:, piece], mask_QJ.repeat(group, 1))
        parts.append(out_KQE.unflatten(1, (group, end - start)).permute(2, 0, 1, 3).flatten(1, 2))
    return torch.cat(parts)


@operator("komainu::decode_attention")
def _decode(
    query_THE: Tensor,
    key_TKE: Tensor,
    value_TKE: Tensor,
    ring_key_CKE: Tensor,
    ring_value_CKE: Tensor,
    seen: int,
    window: int,
) -> Tensor:
    tensors = [heads_side_by_side(tensor) for tensor in (query_THE, key_TKE, value_TKE, ring_key_CKE, ring_value_CKE)]
    (tokens, heads, size), (room, kv_heads, _) = query_THE.shape, ring_key_CKE.shape
    device, group = query_THE.device, heads // kv_heads
    config = configuration("attention_decode", device)
    # Float32 products without tensor cores need the registers that more rows would take.
    most = config.rows if query_THE.itemsize == 2 else 16
    tile = max(16, min(most, triton.next_power_of_2(tokens * group)))
    tiles = triton.cdiv(tokens * group, tile) * kv_heads
    wanted = config.programs * multiprocessors(device) // max(1, tiles)
    splits = max(1, min(wanted, triton.cdiv(min(seen + tokens, window), config.block)))
    part_PTHE = torch.empty((splits, tokens, heads, size), dtype=torch.float32, device=device)
    log2_sum_PTH = torch.empty((splits, tokens, heads), dtype=torch.float32, device=device)
    launch(
        _split_kernel,
        (tiles, splits),
        *tensors,
        part_PTHE,
        log2_sum_PTH,
        tokens,
        seen,
        max(1, room),
        window,
        size**-0.5 * LOG2_E.value,
        *(tensor.stride(0) for tensor in tensors),
        KV_HEADS=kv_heads,
        GROUP=group,
        SIZE=size,
        TILE=tile,
        BLOCK=config.block,
        device=device,
        warps=config.warps,
        stages=config.stages,
    )
    return combine_splits(part_PTHE, log2_sum_PTH, query_THE.dtype)


def combine_splits(
    part_PTHE: Tensor,  # float32: output of each split, normalised by its own sum of weights
    log2_sum_PTH: Tensor,  # float32: log2 of that sum, -inf for a split without keys
    dtype: torch.dtype,  # of the result
) -> Tensor:
    """The output over all splits: [T, H, E]."""
    splits, tokens, heads, size = part_PTHE.shape
    out_THE = torch.empty((tokens, heads, size), dtype=dtype, device=part_PTHE.device)
    config = configuration("attention_combine", part_PTHE.device)
    launch(
        _combine_kernel,
        (triton.cdiv(tokens * heads, config.rows),),
        part_PTHE,
        log2_sum_PTH,
        out_THE,
        tokens * heads,
        splits,
        SIZE=size,
        ROWS=config.rows,
        device=part_PTHE.device,
        warps=config.warps,
    )
    return out_THE


@_decode.register_fake
def _(query_THE, key_TKE, value_TKE, ring_key_CKE, ring_value_CKE, seen, window):
    return torch.empty(query_THE.shape, dtype=query_THE.dtype, device=query_THE.device)


@triton.jit(do_not_specialize=["tokens", "seen", "room", "window"])
def _split_kernel(
    query,  # [tokens, KV_HEADS * GROUP, SIZE]
    key,  # [tokens, KV_HEADS, SIZE]
    value,  # [tokens, KV_HEADS, SIZE]
    ring_key,  # [room, KV_HEADS, SIZE]
    ring_value,  # [room, KV_HEADS, SIZE]
    part,  # [splits, tokens, KV_HEADS * GROUP, SIZE] float32
    log2_sum,  # [splits, tokens, KV_HEADS * GROUP] float32
    tokens,  # new tokens
    seen,  # earlier tokens
    room,
    window,
    scale,  # SIZE^(-1/2) log2(e)
    query_stride,  # elements from token to token
    key_stride,
    value_stride,
    ring_key_stride,
    ring_value_stride,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,  # query heads for each key/value head
    SIZE: tl.constexpr,  # elements of a head
    TILE: tl.constexpr,  # rows of a program: the heads of one new token, then those of the next
    BLOCK: tl.constexpr,  # keys of a step
):
    """Normalised output and log2 of the sum of weights, for a tile of rows over a split of the tokens that they see."""
    kv_head = (tl.program_id(0) % KV_HEADS).to(tl.int64)
    split = tl.program_id(1)
    first_row = tl.program_id(0) // KV_HEADS * TILE
    row = first_row + tl.arange(0, TILE)
    new = row // GROUP
    head = kv_head * GROUP + row % GROUP
    inside = new < tokens
    column = tl.arange(0, columns(SIZE))
    exists = (column < SIZE)[None, :]
    at = new.to(tl.int64) * query_stride + head * SIZE
    q = tl.load(query + at[:, None] + column[None, :], mask=inside[:, None] & exists, other=0.0)
    low = tl.maximum(seen + first_row // GROUP - window + 1, 0)
    high = seen + tl.minimum((first_row + TILE - 1) // GROUP + 1, tokens)
    length = tl.cdiv(tl.cdiv(high - low, tl.num_programs(1)), BLOCK) * BLOCK
    begin = low + split * length
    stop = tl.minimum(begin + length, high)
    position = seen + new
    total = tl.zeros((TILE,), dtype=tl.float32)
    peak = tl.full((TILE,), NO_PEAK, dtype=tl.float32)
    acc = tl.zeros((TILE, columns(SIZE)), dtype=tl.float32)
    sources = (
        # keys, values, their strides, tokens from and up to, token of row 0, rows
        (ring_key, ring_value, ring_key_stride, ring_value_stride, begin, tl.minimum(stop, seen), 0, room),
        (key, value, key_stride, value_stride, tl.maximum(begin, seen), stop, seen, tokens),
    )
    for source in tl.static_range(2):
        keys, values, key_step, value_step, first_token, last_token, base, rows = sources[source]
        for first in range(first_token, last_token, BLOCK):
            token = first + tl.arange(0, BLOCK)
            slot = ((token - base) % rows).to(tl.int64)[:, None]
            there = (token < last_token)[:, None] & exists
            k = tl.load(keys + kv_head * SIZE + slot * key_step + column[None, :], mask=there, other=0.0)
            scores = tl.dot(q, tl.trans(k), input_precision="ieee")
            visible = within(position[:, None] - token[None, :], window) & (token < last_token)[None, :]
            scores = tl.where(visible, scores, float("-inf"))
            total, peak, weights, kept = softmax_step(total, peak, scores, scale)
            v = tl.load(values + kv_head * SIZE + slot * value_step + column[None, :], mask=there, other=0.0)
            acc = tl.dot(weights.to(v.dtype), v, acc * kept[:, None], input_precision="ieee")
    divisor = tl.where(total > 0, total, 1.0)
    result = (split.to(tl.int64) * tokens + new) * (KV_HEADS * GROUP) + head
    tl.store(log2_sum + result, tl.where(total > 0, peak * scale + tl.log2(divisor), float("-inf")), mask=inside)
    tl.store(part + result[:, None] * SIZE + column[None, :], acc / divisor[:, None], mask=inside[:, None] & exists)


@triton.jit(do_not_specialize=["rows", "splits"])
def _combine_kernel(
    part,  # [splits, rows, SIZE] float32
    log2_sum,  # [splits, rows] float32
    out,  # [rows, SIZE]
    rows,  # a row is a head of a token
    splits,
    SIZE: tl.constexpr,
    ROWS: tl.constexpr,  # rows of a program
):
    """Add up the splits, each weighted by its share of the softmax's denominator."""
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    inside = row < rows
    column = tl.arange(0, columns(SIZE))
    cells = inside[:, None] & (column < SIZE)[None, :]
    offset = row[:, None] * SIZE + column[None, :]
    # Some split is above -inf, because a token sees itself.
    peak = tl.full((ROWS,), float("-inf"), dtype=tl.float32)
    for split in range(splits):
        peak = tl.maximum(peak, tl.load(log2_sum + split * rows.to(tl.int64) + row, mask=inside, other=0.0))
    total = tl.zeros((ROWS,), dtype=tl.float32)
    acc = tl.zeros((ROWS, columns(SIZE)), dtype=tl.float32)
    for split in range(splits):
        before = split * rows.to(tl.int64)
        weight = tl.exp2(tl.load(log2_sum + before + row, mask=inside, other=0.0) - peak)
        acc += weight[:, None] * tl.load(part + before * SIZE + offset, mask=cells, other=0.0)
        total += weight
    tl.store(out + offset, (acc / total[:, None]).to(out.dtype.element_ty), mask=cells)
