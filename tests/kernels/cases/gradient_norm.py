"""The gradient's norm: what to compile offline, and mutants."""

from kernels import gradient_norm
from tests.kernels.cases import empty


def norm(dtype, elements):
    gradient_norm._norm._init_fn([empty(elements, dtype=dtype), empty(elements, dtype=dtype)])


LAUNCHES = {"gradient_norm": norm}
MUTANTS = [
    ("block = tl.program_id(0).to(tl.int64)", "block = tl.program_id(0)"),
    ("if (block + 1) * BLOCK <= elements:", "if block * BLOCK <= elements:"),
    ("mask=offset < elements, other=0", "mask=offset < elements - 1, other=0"),
    ("value.to(tl.int32) << 16", "value.to(tl.int32) << 15"),
    ("tl.store(sums + first_sum + block,", "tl.store(sums + block,"),
    ("tl.sum(value * value, axis=0)", "tl.sum(tl.abs(value), axis=0)"),
    ("total += tl.load(sums", "total = tl.load(sums"),
    ("for first in range(0, count, BLOCK):", "for first in range(0, count - BLOCK, BLOCK):"),
    ("tl.sum(total, axis=0)", "tl.sum(total.to(tl.float32), axis=0)"),
]
