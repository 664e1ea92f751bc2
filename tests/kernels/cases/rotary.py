"""Rotary embedding: what to compile offline, and mutants."""

import torch

from kernels import rotary
from tests.kernels.cases import CONFIG, empty

HEADS, KV_HEADS, SIZE = CONFIG.num_attention_heads, CONFIG.num_key_value_heads, CONFIG.head_dim
PARTS = (HEADS, KV_HEADS, KV_HEADS)


def table(tokens):
    return [empty(tokens, SIZE // 2, dtype=torch.float32) for _ in range(2)]


def forward(dtype, tokens):
    rotary._rotate_._init_fn(empty(tokens, sum(PARTS), SIZE, dtype=dtype), *table(tokens), HEADS + KV_HEADS)


def backward(dtype, tokens):
    rotary._rotate_back._init_fn(*(empty(tokens, heads, SIZE, dtype=dtype) for heads in PARTS), *table(tokens))
    packed = empty(tokens, sum(PARTS), SIZE, dtype=dtype)
    rotary._rotate_back._init_fn(*packed.split(PARTS, dim=1), *table(tokens))


LAUNCHES = {"rotary": forward, "rotary backward": backward}
MUTANTS = [
    ("row = tl.program_id(0).to(tl.int64) * ROWS", "row = tl.program_id(0) * ROWS"),
    ("        s = -s\n", "        s = s\n"),
    ("turned_first = tl.where(rotated, first * c - second * s, first)", "turned_first = first * c - second * s"),
    ("second * c + first * s, second)", "second * c - first * s, second)"),
    ("angle = token[:, None] * HALF + column", "angle = token[:, None] * BLOCK + column"),
    ("& (column < HALF)", "& (column < HALF - 1)"),
    ("inside = (token < tokens)[:, None]", "inside = (token < tokens - 1)[:, None]"),
    ("rotated = inside & (head < ROTATED)[:, None]", "rotated = inside & (head < QUERY_HEADS)[:, None]"),
    ("rotated = inside & (head < ROTATED)[:, None]", "rotated = inside"),
    ("(head - QUERY_HEADS) * key_head_stride", "(head - QUERY_HEADS) * query_head_stride"),
    ("value + token * value_token_stride", "value + token * key_token_stride"),
    ("(head - ROTATED) * value_head_stride", "head * value_head_stride"),
    ("    if rows_TSE is not qkv_TSE:\n        qkv_TSE.copy_(rows_TSE)\n", ""),
]  # fmt: skip
