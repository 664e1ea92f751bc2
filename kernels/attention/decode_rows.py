"""Attention of many texts' newest tokens, one a text, each to the keys and values that its own row of a cache holds.

The new token's key and value are already in the row. A row of the cache is a ring of at most one window, so a token sees all
that its row holds, and the order in the row does not matter: softmax is a sum. A row that is not full holds its first `count`
keys.

As in `kernels.attention.decode`, reading is the whole cost: the query heads of a key/value head share one tile, and programs
split the keys of a row between them. Each program splits its own row's count, so a row's result depends on no other row.

Shapes: B rows, C slots of a row, H query heads, K key/value heads, G = H / K, E head size, P partial results (splits).
"""

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from kernels.attention.decode import combine_splits
from kernels.attention.tiles import LOG2_E, NO_PEAK, columns, softmax_step
from kernels.configurations import configuration
from kernels.launch import launch, multiprocessors, operator, runs_triton

_MULTIPLE = 16


def decode_rows_attention(
    query_BHE: Tensor,
    key_BCKE: Tensor,  # H is a multiple of K; query head h reads key/value head h // (H / K)
    value_BCKE: Tensor,
    count_B: Tensor,  # int32: keys in each row, 1 .. C; the slots behind them are never looked at by the kernels
    longest: int,  # the largest count, known to the host
) -> Tensor:
    """softmax(query key^T / sqrt(E)) value of each row: [B, H, E] in the dtype of the query, without a gradient.

    Args: key_BCKE, value_BCKE: of the query's dtype, E contiguous; slots behind a row's count must be finite.
    Scores and softmax are computed in float32 (float64 for float64).
    Raises: ValueError where `longest` is below 1 or above the slots of a row.
    """
    if not 1 <= longest <= key_BCKE.shape[1]:
        raise ValueError(f"rows of up to {longest} keys: must be at least 1 and at most the cache's {key_BCKE.shape[1]} slots")
    if runs_triton(query_BHE):
        return _decode_rows(query_BHE, key_BCKE, value_BCKE, count_B, longest)
    return decode_rows_attention_reference(query_BHE, key_BCKE, value_BCKE, count_B, longest)


def decode_rows_attention_reference(query_BHE, key_BCKE, value_BCKE, count_B, longest) -> Tensor:
    kv_heads = key_BCKE.shape[2]
    # Whole vectors of a CPU: how the keys of a row are added up then does not depend on the longest row.
    longest = min(-(-longest // _MULTIPLE) * _MULTIPLE, key_BCKE.shape[1])
    # The G query heads of a key/value head become G queries of one head, so that no key is copied G times.
    query_BKGE = query_BHE.unflatten(1, (kv_heads, -1))
    key_BKCE, value_BKCE = (tensor[:, :longest].transpose(1, 2) for tensor in (key_BCKE, value_BCKE))
    seen_B11C = (torch.arange(longest, device=count_B.device) < count_B[:, None])[:, None, None]
    return F.scaled_dot_product_attention(query_BKGE, key_BKCE, value_BKCE, attn_mask=seen_B11C).flatten(1, 2)


@operator("komainu::decode_rows_attention")
def _decode_rows(query_BHE: Tensor, key_BCKE: Tensor, value_BCKE: Tensor, count_B: Tensor, longest: int) -> Tensor:
    rows, heads, size = query_BHE.shape
    kv_heads, device = key_BCKE.shape[2], query_BHE.device
    query_BHE = query_BHE.contiguous()
    # Slots and rows may lie anywhere; heads stand side by side in a slot.
    key_BCKE, value_BCKE = (_heads_side_by_side(tensor) for tensor in (key_BCKE, value_BCKE))
    config = configuration("attention_decode", device)
    tiles = rows * kv_heads
    # A function of the launch's shape alone, not of the counts of other rows.
    wanted = triton.cdiv(config.programs * multiprocessors(device), max(1, tiles))
    splits = max(1, min(wanted, triton.cdiv(key_BCKE.shape[1], config.block)))
    part_PBHE = torch.empty((splits, rows, heads, size), dtype=torch.float32, device=device)
    log2_sum_PBH = torch.empty((splits, rows, heads), dtype=torch.float32, device=device)
    launch(
        _rows_kernel,
        (tiles, splits),
        query_BHE,
        key_BCKE,
        value_BCKE,
        count_B,
        part_PBHE,
        log2_sum_PBH,
        rows,
        size**-0.5 * LOG2_E.value,
        *key_BCKE.stride()[:2],
        *value_BCKE.stride()[:2],
        KV_HEADS=kv_heads,
        GROUP=heads // kv_heads,
        SIZE=size,
        TILE=max(16, triton.next_power_of_2(heads // kv_heads)),
        BLOCK=config.block,
        device=device,
        warps=config.warps,
        stages=config.stages,
    )
    return combine_splits(part_PBHE, log2_sum_PBH, query_BHE.dtype)


@_decode_rows.register_fake
def _(query_BHE, key_BCKE, value_BCKE, count_B, longest):
    return torch.empty(query_BHE.shape, dtype=query_BHE.dtype, device=query_BHE.device)


def _heads_side_by_side(tensor_BCKE: Tensor) -> Tensor:
    heads, size = tensor_BCKE.shape[2:]
    contiguous = tensor_BCKE.stride(3) == 1 and (heads == 1 or tensor_BCKE.stride(2) == size)
    return tensor_BCKE if contiguous else tensor_BCKE.contiguous()


@triton.jit(do_not_specialize=["rows"])
def _rows_kernel(
    query,  # [rows, KV_HEADS * GROUP, SIZE]
    key,  # [rows, slots, KV_HEADS, SIZE]
    value,  # [rows, slots, KV_HEADS, SIZE]
    count,  # [rows] int32
    part,  # [splits, rows, KV_HEADS * GROUP, SIZE] float32
    log2_sum,  # [splits, rows, KV_HEADS * GROUP] float32
    rows,
    scale,  # SIZE^(-1/2) log2(e)
    key_row_stride,  # elements from row to row
    key_slot_stride,  # elements from slot to slot
    value_row_stride,
    value_slot_stride,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,  # query heads for each key/value head
    SIZE: tl.constexpr,  # elements of a head
    TILE: tl.constexpr,  # query heads of a program, padded
    BLOCK: tl.constexpr,  # keys of a step
):
    """Normalised output and log2 of the sum of weights, for the heads of a row that share keys, over a split of its keys."""
    row = (tl.program_id(0) // KV_HEADS).to(tl.int64)
    kv_head = (tl.program_id(0) % KV_HEADS).to(tl.int64)
    split = tl.program_id(1)
    member = tl.arange(0, TILE)
    inside = member < GROUP
    column = tl.arange(0, columns(SIZE))
    exists = (column < SIZE)[None, :]
    at = (row * KV_HEADS + kv_head) * GROUP + member
    q = tl.load(query + at[:, None] * SIZE + column[None, :], mask=inside[:, None] & exists, other=0.0)
    seen = tl.load(count + row)
    length = tl.cdiv(tl.cdiv(seen, tl.num_programs(1)), BLOCK) * BLOCK
    begin = split * length
    stop = tl.minimum(begin + length, seen)
    keys = key + row * key_row_stride + kv_head * SIZE
    values = value + row * value_row_stride + kv_head * SIZE
    total = tl.zeros((TILE,), dtype=tl.float32)
    peak = tl.full((TILE,), NO_PEAK, dtype=tl.float32)
    acc = tl.zeros((TILE, columns(SIZE)), dtype=tl.float32)
    for first in range(begin, stop, BLOCK):
        slot = first + tl.arange(0, BLOCK)
        held = slot < stop
        there = held[:, None] & exists
        place = slot.to(tl.int64)[:, None]
        k = tl.load(keys + place * key_slot_stride + column[None, :], mask=there, other=0.0)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee")
        scores = tl.where(held[None, :], scores, float("-inf"))
        total, peak, weights, kept = softmax_step(total, peak, scores, scale)
        v = tl.load(values + place * value_slot_stride + column[None, :], mask=there, other=0.0)
        acc = tl.dot(weights.to(v.dtype), v, acc * kept[:, None], input_precision="ieee")
    divisor = tl.where(total > 0, total, 1.0)
    result = split.to(tl.int64) * rows * (KV_HEADS * GROUP) + at
    tl.store(log2_sum + result, tl.where(total > 0, peak * scale + tl.log2(divisor), float("-inf")), mask=inside)
    tl.store(part + result[:, None] * SIZE + column[None, :], acc / divisor[:, None], mask=inside[:, None] & exists)
