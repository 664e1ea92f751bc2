"""RMS norm: what to compile offline, and mutants."""

import torch

from kernels import rms_norm
from tests.kernels.cases import CONFIG, empty

EPS = 1e-5


def forward(dtype, tokens):
    hidden, weight = empty(tokens, CONFIG.hidden_size, dtype=dtype), empty(CONFIG.hidden_size, dtype=dtype)
    rms_norm._norm._init_fn(hidden, weight, EPS)
    rms_norm._add_norm._init_fn(hidden, hidden, weight, EPS)


def backward(dtype, tokens):
    hidden, weight = empty(tokens, CONFIG.hidden_size, dtype=dtype), empty(CONFIG.hidden_size, dtype=dtype)
    scale = empty(tokens, dtype=torch.float32)
    rms_norm._norm_backward._init_fn(hidden, None, hidden, weight, scale)
    rms_norm._norm_backward._init_fn(hidden, hidden, hidden, weight, scale)


LAUNCHES = {"rms_norm": forward, "rms_norm backward": backward}
MUTANTS = [
    ("row = tl.program_id(0).to(tl.int64)", "row = tl.program_id(0)"),
    ("row = tl.cast(token, tl.int64)", "row = token"),
    ("s = 1 / tl.sqrt(tl.sum(x * x, axis=0) / WIDTH + eps)", "s = 1 / tl.sqrt(tl.sum(x * x, axis=0) / BLOCK + eps)"),
    ("/ WIDTH + eps)", "/ WIDTH)"),
    ("        x = rounded.to(tl.float32)\n", ""),
    ("tl.store(total + row * WIDTH + column, rounded, mask=inside)", "pass"),
    ("mask=inside, other=0.0).to(tl.float32) * s", "mask=inside, other=0.0).to(tl.float32)"),
    ("weighted = g * w", "weighted = g"),
    ("(tl.sum(weighted * normed, axis=0) / WIDTH)", "(tl.sum(weighted * normed, axis=0) / BLOCK)"),
    ("dx += tl.load(grad_total + row * grad_total_stride", "dx += tl.load(grad_total + row * grad_stride"),
    ("for token in range(program, tokens,", "for token in range(program + 1, tokens,"),
    ("grad_weight += g * normed", "grad_weight = g * normed"),
    ("for first in range(0, programs, ROWS):", "for first in range(0, programs - ROWS, ROWS):"),
    ("mask=(row < programs)[:, None] & inside[None, :]", "mask=(row < programs + 1)[:, None] & inside[None, :]"),]  # fmt: skip
