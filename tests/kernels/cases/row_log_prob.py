"""The head's rows: what to compile offline, and mutants."""

import torch

from kernels import row_log_prob
from tests.kernels.cases import CONFIG, empty

VOCAB = {"vocab_size": CONFIG.unpadded_vocab_size}


def data(tokens):
    """(float32 logits, targets, rows), two results."""
    logits = empty(tokens, CONFIG.vocab_size, dtype=torch.float32)
    target, rows = empty(tokens, dtype=torch.int64), empty(tokens, dtype=torch.int32)
    return (logits, target, rows), [empty(tokens, dtype=torch.float32) for _ in range(2)]


def forward(dtype, tokens):
    given, (log_prob, log_sum_exp) = data(tokens)
    row_log_prob.row_statistics(*given, log_prob, log_sum_exp, **VOCAB)
    row_log_prob.row_statistics(*given, log_prob, log_sum_exp, **VOCAB, entropy_T=log_prob)
    gradient = empty(tokens, CONFIG.vocab_size, dtype=dtype)
    row_log_prob.row_statistics(*given, log_prob, log_sum_exp, **VOCAB, gradient_NV=gradient)
    row_log_prob.row_statistics(*given, log_prob, log_sum_exp, **VOCAB, gradient_NV=gradient, scale_T=log_prob)


def backward(dtype, tokens):
    given, (scale, log_sum_exp) = data(tokens)
    gradient = empty(tokens, CONFIG.vocab_size, dtype=dtype)
    row_log_prob.row_gradients(*given, log_sum_exp, gradient, scale, **VOCAB)


def moved(dtype, tokens):
    (_, _, rows), (scale, _) = data(tokens)
    hidden = empty(tokens, CONFIG.hidden_size, dtype=dtype)
    for scaled in (None, scale):
        row_log_prob.gather_rows(hidden, rows, scaled)
        row_log_prob.scatter_rows(hidden, rows, tokens, scaled)


def scaled(dtype, tokens):
    row_log_prob.scale_in_place._init_fn(empty(tokens, CONFIG.hidden_size, dtype=dtype), empty(dtype=torch.float32))


LAUNCHES = {
    "row_log_prob": forward, "row_log_prob backward": backward, "row_log_prob, moved rows": moved,
    "row_log_prob, scaled rows": scaled,
}  # fmt: skip
MUTANTS = [
    ("x = tl.where(column < VOCAB, x, nothing)", "x = tl.where(column < COLUMNS, x, nothing)"),
    ("s = tl.where(higher, s * e + 1, s + e)", "s = tl.where(higher, s * e, s + e)"),
    ("t = tl.where(higher, (t - s * d) * e, t + d * e)", "t = tl.where(higher, t * e, t + d * e)"),
    ("m = tl.maximum(m, x)", "m = x"),
    ("total = tl.sum(s * e, axis=0)", "total = tl.sum(s, axis=0)"),
    ("tl.sum((t + s * (m - peak)) * e, axis=0)", "tl.sum(t * e, axis=0)"),
    ("tl.store(log_sum_exp + row, lse, mask=listed)", "tl.store(log_sum_exp + number, lse, mask=listed)"),
    ("(tl.load(logits + y) - peak) - rest, mask=listed)", "(tl.load(logits + y) - peak) - rest)"),
    ("- tl.where(column == y, 1.0, 0.0)", ""),
    ("g = tl.where((column < VOCAB) & listed, g, 0.0)", "g = tl.where(column < VOCAB, g, 0.0)"),
    ("g = tl.where((column < VOCAB) & listed, g, 0.0)", "g = tl.where(listed, g, 0.0)"),
    ("for first in range(0, COLUMNS, BLOCK):", "for first in range(0, COLUMNS - BLOCK, BLOCK):"),
    ("logits += number * logits_stride", "logits += (number * logits_stride).to(tl.int32)"),
    ("gradient += number * gradient_stride", "gradient += (number * gradient_stride).to(tl.int32)"),
    ("tl.store(out + column, tl.where(listed, x, 0.0), mask=inside)", "tl.store(out + column, x, mask=inside)"),
    ("    elif listed:\n", "    elif row > 0:\n"),
    ("tl.load(scale + row, mask=listed, other=0.0)).to(x.dtype)", "1.0).to(x.dtype)"),
    ("row = tensor + tl.cast(number, tl.int64) * WIDTH", "row = tensor"),
    ("range(tl.program_id(0), rows, tl.num_programs(0))", "range(tl.program_id(0), rows, 2 * tl.num_programs(0))"),
]
