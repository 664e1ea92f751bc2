"""Attention, forward: what to compile offline, and mutants."""

import torch
import triton

from kernels import TILE
from kernels.attention import forward as attention_forward
from tests.kernels.cases import CONFIG, empty

HEADS, KV_HEADS, SIZE = CONFIG.num_attention_heads, CONFIG.num_key_value_heads, CONFIG.head_dim


def packed(dtype, tokens):
    """Query, key and value, views of one packed row."""
    return empty(tokens, HEADS + 2 * KV_HEADS, SIZE, dtype=dtype).split((HEADS, KV_HEADS, KV_HEADS), dim=1)


def work(tokens):
    """Lists without data, and what the kernels must know beside them: a window that grows with the row."""
    tiles = triton.cdiv(tokens, TILE)
    return empty(4 * tiles, 4, dtype=torch.int32), tiles, tiles, 1 + tokens // 2, TILE


def forward(dtype, tokens):
    attention_forward.attention_forward(*packed(dtype, tokens), *work(tokens))


LAUNCHES = {"attention": forward}
MUTANTS = [
    ("left = tl.cdiv(tl.maximum(end - shift - window - kv_start, 0), BLOCK)", "left = blocks * 0"),
    ("tl.minimum(start - shift + 1, kv_end)", "tl.minimum(start - shift + BLOCK, kv_end)"),
    ("distance.to(tl.uint32, bitcast=True) < tl.cast", "distance.to(tl.uint32, bitcast=True) <= tl.cast"),
    ("distance.to(tl.uint32, bitcast=True) < tl.cast(window, tl.uint32)", "distance < window"),
    (" & (place < kv_end)[None, :]", ""),
    ("within((row - shift)[:, None]", "within(row[:, None]"),
    ("tl.load(tile) + part % PARTS * TILE", "tl.load(tile)"),
    ("start - shift - window + 1)", "start - shift - window + 2)"),
    ("tl.minimum(tl.load(found + 1), end - shift)", "tl.minimum(tl.load(found + 1), end - shift - 1)"),
    ("tl.cdiv(tl.maximum(kv_end - kv_start, 0), BLOCK)", "tl.cdiv(kv_end - kv_start, BLOCK)"),
    ("kv_head = head // GROUP", "kv_head = head % (HEADS // GROUP)"),
    ("total = total * kept + tl.sum", "total = total + tl.sum"),
    ("v, acc * kept[:, None],", "v, acc,"),
    ("(peak * scale + tl.log2(divisor)) / LOG2_E", "peak * scale + tl.log2(divisor)"),
    ("range(first_range, last_range):", "range(first_range, first_range + 1):"),
    ("row.to(tl.int64)[:, None] * stride", "row[:, None] * stride"),
    ("heads == 1 or tensor.stride(1) == size", "True"),
    ("source.load([first, head * SIZE])", "source.load([first, 0])"),
]
