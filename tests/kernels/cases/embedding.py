"""Embedding: what to compile offline, and mutants."""

import torch

from kernels import embedding
from tests.kernels.cases import CONFIG, empty

WEIGHT = (CONFIG.vocab_size, CONFIG.hidden_size)


def forward(dtype, tokens):
    ids, weight = empty(tokens, dtype=torch.int64), empty(*WEIGHT, dtype=dtype)
    embedding._embedding._init_fn(ids, weight, None, None, None, 0, 0)
    # Keys change with every step, and are compiled for none.
    keys = (2 * tokens, tokens + 2**31)
    embedding._embedding._init_fn(ids, weight, empty(tokens, dtype=torch.float32), ids, ids, *keys)


def backward(dtype, tokens):
    grad = empty(tokens, CONFIG.hidden_size, dtype=dtype)
    embedding._embedding_backward._init_fn(grad, empty(tokens, dtype=torch.int64), CONFIG.vocab_size)


LAUNCHES = {"embedding": forward, "embedding backward": backward}
MUTANTS = [
    ("tl.interleave(w0, w2), tl.interleave(w1, w3)", "tl.interleave(w0, w1), tl.interleave(w2, w3)"),
    ("key = (tl.cast(step, tl.int64) << 32) | seed", "key = (tl.cast(seed, tl.int64) << 32) | step"),
    ("number.to(tl.int32), (number >> 32).to(tl.int32)", "number.to(tl.int32), number.to(tl.int32)"),
    ("tl.load(position + place).to(tl.int32)", "place.to(tl.int32)"),
    ("word.to(tl.int32, bitcast=True) >> 8", "word.to(tl.int32, bitcast=True) >> 7"),
    (".to(tl.float32) + 0.5)", ".to(tl.float32))"),
    ("group = tl.program_id(1) * (BLOCK // 4) + tl.arange", "group = tl.arange"),
    ("uniform * tl.load(scale + place)\n", "(uniform * tl.load(scale + place)).to(tl.float16).to(tl.float32)\n"),
    ("tl.load(scale + place)", "tl.load(scale)"),
    ("mask=place > 0, other=-1)", "mask=place > 0, other=0)"),
    ("    if token != before:", "    if True:"),
    ("            same = at < tokens\n", "            same = at < tokens - 1\n"),
    ("total += tl.sum(", "total = tl.sum("),
    ("while found == ROWS:", "while place == tl.program_id(0):"),
    ("            place += ROWS\n", "            place += ROWS + 1\n"),
    ("mask=same[:, None] & inside[None, :]", "mask=inside[None, :]"),
    ("grad_TD.stride(0),\n", "width,\n"),
]  # fmt: skip
