"""Attention of new places to a ring: what to compile offline, and mutants."""

from kernels.attention import decode as attention_decode
from tests.kernels.cases import CONFIG, empty
from tests.kernels.cases.attention_forward import KV_HEADS, SIZE, packed


def decode(dtype, seen, tokens):
    ring = empty(2, CONFIG.sliding_window, KV_HEADS, SIZE, dtype=dtype)
    attention_decode._decode._init_fn(*packed(dtype, tokens), *ring, seen, CONFIG.sliding_window)


LAUNCHES = {
    "attention, one token": lambda dtype, seen: decode(dtype, seen, 1),
    "attention, a few tokens": lambda dtype, seen: decode(dtype, seen, 20),
}
MUTANTS = [
    ("if min(seen, reach - 1) > room:", "if seen > reach > room:"),
    ("row = ((place - base) % room)", "row = (place - base)"),
    ("row = ((place - base) % room)", "row = (place % room)"),
    (" & (place < stop)[None, :]", ""),
    ("there = (place < stop)[:, None]", "there = (place >= 0)[:, None]"),
    ("window + 1, 0)", "window + 2, 0)"),
    ('scores = tl.where(visible, scores, float("-inf"))', "pass"),
    ("position = seen + new", "position = seen + 0 * new"),
    ("head = kv_head * GROUP + row % GROUP", "head = kv_head * GROUP"),
    ("new = row // GROUP", "new = row % tokens"),
    ("begin = low + split * length", "begin = low"),
    ("stop = tl.minimum(begin + length, high)", "stop = high"),
    ("tl.minimum((first_row + TILE - 1) // GROUP + 1, tokens)", "1"),
    ("acc * faded[:, None]", "acc"),
    ("total = total * faded", "total = total"),
    ("peak * scale + tl.log2(divisor)", "peak * scale"),
    ("acc / divisor[:, None], mask", "acc, mask"),
    ("acc += weight[:, None] *", "acc +="),
    ("tl.program_id(0) * ROWS + tl.arange", "tl.program_id(0) + tl.arange"),
    ("tl.maximum(begin, seen)", "tl.maximum(begin, seen + 1)"),
]
