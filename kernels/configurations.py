"""Launch configurations: one fixed table for each chip. Nothing is tuned while training."""

import functools
from dataclasses import dataclass

import torch
import triton


@dataclass(frozen=True)
class Configuration:
    """How a kernel is launched; fields that a kernel does not use keep their defaults."""

    block: int = 0  # elements of a row that a program holds at once; 0 for a kernel that holds whole rows
    per_thread: int = 0  # elements of a whole row that a thread holds: they decide the warps
    rows: int = 1  # rows of a program's tile
    warps: int = 4  # warps of a program, for a kernel without `per_thread`
    programs: int = 0  # programs for each multiprocessor, for a kernel whose programs walk through the rows
    stages: int = 1  # loads in flight of a loop with matrix products
    descriptors: bool = False  # whether the chip's tensor memory accelerator (TMA) reads the rows
    warpgroups: bool = False  # attention's forward: by `kernels.attention.warpgroups` where it can; never measured so far
    passes: int = 1  # of attention's backward; 2: by "attention_queries" and "attention_keys"

    def whole_row(self, width: int) -> tuple[int, int]:
        """(block, warps) of a kernel that holds whole rows of `width` elements."""
        block = triton.next_power_of_2(width)
        return block, min(16, max(1, block // (32 * self.per_thread)))


# Attention's backward takes two passes on every chip until one pass has been measured. On an H200 two passes took 6.1 us for
# 128 keys, 64 queries and a head (320 TFLOP/s of 7 products, commit 38fe64a, before their registers stopped spilling). One pass
# is predicted at 5.1 us: 1.9 for its 5 products, of which 3 are bound by reading shared memory, and 3.2 for two steps'
# exponentials, barriers and round trips to L2. This is less than such a prediction's error. Blocks of 64 queries would halve
# the round trips (3.4 us predicted), but spill 240 B. One pass is made for sm_90 alone: on sm_80 and sm_100 it spills 32 and
# 504 B.
_HOPPER = {
    "rms_norm": Configuration(per_thread=16),
    "rms_norm_backward": Configuration(per_thread=8, programs=2),
    "sum_rows": Configuration(block=64, rows=32, warps=4),
    "adamw": Configuration(block=1024, warps=4),
    "gradient_norm": Configuration(block=16384, warps=16),
    "gradient_norm_total": Configuration(block=8192, warps=16),
    "attention_forward": Configuration(block=64, rows=64, warps=4, stages=3, descriptors=True),
    "attention_tokens": Configuration(rows=64, warps=4),
    "attention_backward": Configuration(block=32, rows=128, warps=8, stages=2, passes=2),
    "attention_queries": Configuration(block=64, rows=128, warps=8, stages=3, descriptors=True),
    "attention_keys": Configuration(block=64, rows=64, warps=4, stages=2),
    "attention_decode": Configuration(block=64, rows=64, warps=4, programs=1, stages=3),
    "attention_combine": Configuration(rows=1, warps=1),
    "swiglu": Configuration(block=2048, warps=4),
    "swiglu_backward": Configuration(block=1024, warps=4),
    "swiglu_codes": Configuration(per_thread=16),
    "fp8_rows": Configuration(per_thread=16),
    "fp8_columns": Configuration(block=64, rows=128, warps=4),
    "fp8_largest_scale": Configuration(block=4096, warps=8),
    "embedding": Configuration(block=1024, warps=4),
    "embedding_backward": Configuration(block=1024, rows=8, warps=4),
    "rotary": Configuration(rows=32, warps=4),
    "rotary_codes": Configuration(per_thread=16),
    "row_log_prob": Configuration(block=4096, warps=8),
    "move_rows": Configuration(block=2048, warps=4),
    "scale_in_place": Configuration(block=2048, warps=4, programs=8),
}
# By compute capability: sm_80 (A100), sm_90 (H100, H200), sm_100 (B200).
_AMPERE = _HOPPER | {
    "attention_forward": Configuration(block=64, rows=128, warps=8, stages=2),
    "attention_backward": Configuration(block=32, rows=128, warps=8, stages=2, passes=2),
    "attention_queries": Configuration(block=64, rows=128, warps=8, stages=2),
    "attention_keys": Configuration(block=32, rows=128, warps=8, stages=2),
}
_BLACKWELL = _HOPPER | {
    "attention_forward": Configuration(block=64, rows=128, warps=8, stages=3, descriptors=True),
    "attention_keys": Configuration(block=32, rows=128, warps=8, stages=2),
}
TABLES: dict[int, dict[str, Configuration]] = {80: _AMPERE, 90: _HOPPER, 100: _BLACKWELL}


def configuration(kernel: str, device: torch.device) -> Configuration:
    """The configuration of a kernel on a device."""
    return TABLES[chip(device)][kernel]


@functools.cache
def chip(device: torch.device) -> int:
    """The key in `TABLES` for a device: the newest chip that is not newer than the device; 90 for the interpreter.

    A GPU older than sm_80 gets 80.
    """
    if device.type != "cuda":
        return 90
    major, _ = torch.cuda.get_device_capability(device)
    return 80 if major < 9 else 90 if major == 9 else 100
