"""Attention, backward: what to compile offline, and mutants."""

import torch

from kernels.attention import backward as attention_backward
from tests.kernels.cases import empty
from tests.kernels.cases.attention_forward import HEADS, SIZE, packed, work


def backward(dtype, tokens):
    grad, out = (empty(tokens, HEADS, SIZE, dtype=dtype) for _ in range(2))
    sums = empty(HEADS, tokens, dtype=torch.float32)
    attention_backward.attention_backward(grad, *packed(dtype, tokens), out, sums, *work(tokens))


LAUNCHES = {"attention backward": backward}
MUTANTS = [
    ("within((row - shift)[:, None] - place", "within(row[:, None] - place"),
    ("within((row - shift)[None, :] - place", "within(row[None, :] - place"),
    (" & (place < kv_end)[None, :]", ""),
    ('other=float("inf")) * LOG2_E', "other=0.0) * LOG2_E"),
    ("weights = tl.where(within((row - shift)[None, :] - place[:, None], window), weights, 0.0)", "pass"),
    ("d = tl.sum(g.to(tl.float32) * o.to(tl.float32), axis=1)", "d = tl.sum(g.to(tl.float32), axis=1)"),
    ("tl.store(delta + at, d, mask=inside)", "tl.store(delta + at, d * 0, mask=inside)"),
    ("head = kv_head * GROUP + member", "head = kv_head * GROUP"),
    ("for member in range(GROUP):", "for member in range(GROUP - 1):"),
    ("kv_head = head // GROUP", "kv_head = head % (HEADS // GROUP)"),
    ("(acc * scale).to(", "acc.to("),
    ("(dk * scale).to(", "dk.to("),
    ("- d[None, :])", ")"),
    ("- delta[:, None])", ")"),
    ("tl.maximum(tl.load(found), start + shift)", "tl.maximum(tl.load(found), start + shift + 1)"),
    ("end - 1 + shift + window)", "end - 2 + shift + window)"),
    ("own_tile(work, first_tile, KV_HEADS,", "own_tile(work, 0, KV_HEADS,"),
]
