"""Attention of a text's newest places to those before them, kept in a ring, and to themselves: one token or a few at a time.

Reading the keys and values is all that this costs, so the query heads of a key/value head are rows of one tile, which reads
them once, and where these tiles are too few for a chip, each one's places are split among programs (Flash-Decoding, Dao et al.
2023, https://pytorch.org/blog/flash-decoding). A second kernel adds up the splits by their log-sum-exps, in their order.

Shapes: T new places, C places that the ring has room for, H query heads, K key/value heads, G = H / K, E head size, J keys of a
piece, S splits.
"""

import itertools

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.attention.forward import LOG2_E, columns, within
from kernels.attention.sliding_window import masked_attention
from kernels.attention.work import UNBOUNDED
from kernels.configurations import configuration
from kernels.launch import launch, multiprocessors, runs_triton, unit_stride

# New places whose scores the reference holds at once.
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
    """softmax(query key^T / sqrt(E)) value over the last `window` places of the text up to each new one, itself included.

    Args: query_THE [T, H, E], key_TKE and value_TKE [T, K, E] of places seen, seen + 1, ...; H a multiple of K, query head h
        reading key/value head h // (H / K). ring_key_CKE and ring_value_CKE [C, K, E]: place p < seen in row p % C. window: in
        places, None for unbounded. All of one dtype.
    Returns: [T, H, E] in that dtype; scores and softmax in float32. Without a gradient.
    Raises: ValueError where the ring has lost places that the first new one sees.
    """
    room, reach = ring_key_CKE.shape[0], UNBOUNDED if window is None else window
    if min(seen, reach - 1) > room:
        raise ValueError(f"a new place sees {min(seen, reach - 1)} earlier ones, the ring has room for {room}: enlarge it")
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
        # The G query heads of a key/value head become G times as many queries of that head: no key is copied G times.
        query_KGQE = piece_QHE.unflatten(1, (kv_heads, group)).permute(1, 2, 0, 3)
        piece = slice(first - oldest, end - oldest)
        out_KQE = masked_attention(query_KGQE.flatten(1, 2), key_KJE[:, piece], value_KJE[:, piece], mask_QJ.repeat(group, 1))
        parts.append(out_KQE.unflatten(1, (group, end - start)).permute(2, 0, 1, 3).flatten(1, 2))
    return torch.cat(parts)


@torch.library.custom_op("komainu::decode_attention", mutates_args=())
def _decode(
    query_THE: Tensor, key_TKE: Tensor, value_TKE: Tensor, ring_key_CKE: Tensor, ring_value_CKE: Tensor, seen: int, window: int
) -> Tensor:
    tensors = [unit_stride(tensor) for tensor in (query_THE, key_TKE, value_TKE, ring_key_CKE, ring_value_CKE)]
    (tokens, heads, size), (room, kv_heads, _) = query_THE.shape, ring_key_CKE.shape
    device, group = query_THE.device, heads // kv_heads
    out_THE = torch.empty((tokens, heads, size), dtype=query_THE.dtype, device=device)
    config, combine = configuration("attention_decode", device), configuration("attention_combine", device)
    # Products of float32 without tensor cores need more registers than more rows would leave.
    most = config.rows if query_THE.itemsize == 2 else 16
    tile = max(16, min(most, triton.next_power_of_2(tokens * group)))
    tiles = triton.cdiv(tokens * group, tile) * kv_heads
    wanted = config.programs * multiprocessors(device) // max(1, tiles)
    splits = max(1, min(wanted, triton.cdiv(min(seen + tokens, window), config.block)))
    part_STHE = torch.empty((splits, tokens, heads, size), dtype=torch.float32, device=device)
    log2_sum_STH = torch.empty((splits, tokens, heads), dtype=torch.float32, device=device)
    strides = [stride for tensor in tensors for stride in tensor.stride()[:2]]
    launch(
        _split_kernel, (tiles, splits), *tensors, part_STHE, log2_sum_STH, tokens, seen, max(1, room), window,
        size**-0.5 * LOG2_E.value, *strides, KV_HEADS=kv_heads, GROUP=group, SIZE=size, COLUMNS=columns(size), TILE=tile,
        BLOCK=config.block, device=device, warps=config.warps, stages=config.stages,
    )  # fmt: skip
    launch(
        _combine_kernel, (triton.cdiv(tokens * heads, combine.rows),), part_STHE, log2_sum_STH, out_THE, tokens * heads, splits,
        SIZE=size, COLUMNS=columns(size), ROWS=combine.rows, device=device, warps=combine.warps,
    )  # fmt: skip
    return out_THE


@_decode.register_fake
def _(query_THE, key_TKE, value_TKE, ring_key_CKE, ring_value_CKE, seen, window):
    return torch.empty(query_THE.shape, dtype=query_THE.dtype, device=query_THE.device)


@triton.jit
def _blocks(
    total, peak, acc, q, key, value, begin, stop, base, room, position, window, scale, key_stride, value_stride,
    SIZE: tl.constexpr, COLUMNS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Sum of weights, largest score and weighted values after the places [begin, stop), p in row (p - base) % room."""
    column = tl.arange(0, COLUMNS)
    for first in range(begin, stop, BLOCK):
        place = first + tl.arange(0, BLOCK)
        row = ((place - base) % room).to(tl.int64)
        there = (place < stop)[:, None] & (column < SIZE)[None, :]
        k = tl.load(key + row[:, None] * key_stride + column[None, :], mask=there, other=0.0)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee")
        visible = within(position[:, None] - place[None, :], window) & (place < stop)[None, :]
        scores = tl.where(visible, scores, float("-inf"))
        raised = tl.maximum(peak, tl.max(scores, axis=1))
        faded = tl.exp2((peak - raised) * scale)
        weights = tl.exp2(scores * scale - (raised * scale)[:, None])
        v = tl.load(value + row[:, None] * value_stride + column[None, :], mask=there, other=0.0)
        acc = tl.dot(weights.to(v.dtype), v, acc * faded[:, None], input_precision="ieee")
        total = total * faded + tl.sum(weights, axis=1)
        peak = raised
    return total, peak, acc


@triton.jit(do_not_specialize=["tokens", "seen", "room", "window"])
def _split_kernel(
    query, key, value, ring_key, ring_value, part, log2_sum, tokens, seen, room, window, scale, query_stride, query_head_stride,
    key_stride, key_head_stride, value_stride, value_head_stride, ring_key_stride, ring_key_head_stride, ring_value_stride,
    ring_value_head_stride, KV_HEADS: tl.constexpr, GROUP: tl.constexpr, SIZE: tl.constexpr, COLUMNS: tl.constexpr,
    TILE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Normalised output and log2 of the sum of weights of a tile of new places and heads, over a part of what it sees."""
    kv_head = (tl.program_id(0) % KV_HEADS).to(tl.int64)
    split = tl.program_id(1)
    # Rows of a tile: the heads of one place, then those of the next.
    first_row = tl.program_id(0) // KV_HEADS * TILE
    row = first_row + tl.arange(0, TILE)
    new = row // GROUP
    head = kv_head * GROUP + row % GROUP
    inside = new < tokens
    column = tl.arange(0, COLUMNS)
    exists = (column < SIZE)[None, :]
    at = new.to(tl.int64) * query_stride + head * query_head_stride
    q = tl.load(query + at[:, None] + column[None, :], mask=inside[:, None] & exists, other=0.0)
    low = tl.maximum(seen + first_row // GROUP - window + 1, 0)
    high = seen + tl.minimum((first_row + TILE - 1) // GROUP + 1, tokens)
    length = tl.cdiv(tl.cdiv(high - low, tl.num_programs(1)), BLOCK) * BLOCK
    begin = low + split * length
    total = tl.zeros((TILE,), dtype=tl.float32)
    # Finite, so that a row which sees nothing of a block is left as it was.
    peak = tl.full((TILE,), -1.0e30, dtype=tl.float32)
    acc = tl.zeros((TILE, COLUMNS), dtype=tl.float32)
    stop = tl.minimum(begin + length, high)
    position = seen + new
    total, peak, acc = _blocks(
        total, peak, acc, q, ring_key + kv_head * ring_key_head_stride, ring_value + kv_head * ring_value_head_stride, begin,
        tl.minimum(stop, seen), 0, room, position, window, scale, ring_key_stride, ring_value_stride, SIZE, COLUMNS, BLOCK,
    )  # fmt: skip
    total, peak, acc = _blocks(
        total, peak, acc, q, key + kv_head * key_head_stride, value + kv_head * value_head_stride, tl.maximum(begin, seen),
        stop, seen, tokens, position, window, scale, key_stride, value_stride, SIZE, COLUMNS, BLOCK,
    )  # fmt: skip
    divisor = tl.where(total > 0, total, 1.0)
    at = (split.to(tl.int64) * tokens + new) * (KV_HEADS * GROUP) + head
    tl.store(log2_sum + at, tl.where(total > 0, peak * scale + tl.log2(divisor), float("-inf")), mask=inside)
    tl.store(part + at[:, None] * SIZE + column[None, :], acc / divisor[:, None], mask=inside[:, None] & exists)


@triton.jit(do_not_specialize=["rows", "splits"])
def _combine_kernel(
    part, log2_sum, out, rows, splits, SIZE: tl.constexpr, COLUMNS: tl.constexpr, ROWS: tl.constexpr
):  # fmt: skip
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    inside = row < rows
    column = tl.arange(0, COLUMNS)
    cells = inside[:, None] & (column < SIZE)[None, :]
    offset = row[:, None] * SIZE + column[None, :]
    # Never all -inf: a place sees itself.
    peak = tl.full((ROWS,), float("-inf"), dtype=tl.float32)
    for split in range(splits):
        peak = tl.maximum(peak, tl.load(log2_sum + split * rows.to(tl.int64) + row, mask=inside, other=0.0))
    total = tl.zeros((ROWS,), dtype=tl.float32)
    acc = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
    for split in range(splits):
        before = split * rows.to(tl.int64)
        weight = tl.exp2(tl.load(log2_sum + before + row, mask=inside, other=0.0) - peak)
        acc += weight[:, None] * tl.load(part + before * SIZE + offset, mask=cells, other=0.0)
        total += weight
    tl.store(out + offset, (acc / total[:, None]).to(out.dtype.element_ty), mask=cells)
