"""How each kernel is launched on each chip: fixed tables, nothing is tuned while training."""

import functools
from dataclasses import dataclass

import torch
import triton


@dataclass(frozen=True)
class Configuration:
    """How a kernel is launched.

    block: elements of a row that a program holds at once; 0 for a kernel that holds whole rows. per_thread: elements of a whole
    row that a thread holds, which decides the warps. rows: of a program's tile. warps: where `per_thread` does not decide.
    programs: of a multiprocessor, for kernels whose programs walk through the rows. stages: loads in flight of a loop with
    products. descriptors: whether rows are read by the chip's tensor memory accelerator (TMA).
    """

    block: int = 0
    per_thread: int = 0
    rows: int = 1
    warps: int = 4
    programs: int = 0
    stages: int = 1
    descriptors: bool = False

    def whole_row(self, width: int) -> tuple[int, int]:
        """(block, warps) for rows of `width` elements."""
        block = triton.next_power_of_2(width)
        return block, min(16, max(1, block // (32 * self.per_thread)))


_HOPPER = {
    "rms_norm": Configuration(per_thread=16),
    "rms_norm_backward": Configuration(per_thread=8, programs=2),
    "sum_rows": Configuration(block=64, rows=32, warps=4),
    "adamw": Configuration(block=1024, warps=4),
    "gradient_norm": Configuration(block=16384, warps=16),
    "gradient_norm_total": Configuration(block=8192, warps=16),
    "attention_forward": Configuration(block=64, rows=64, warps=4, stages=3, descriptors=True),
    "attention_queries": Configuration(block=64, rows=128, warps=8, stages=3, descriptors=True),
    "attention_keys": Configuration(block=64, rows=64, warps=4, stages=2, descriptors=True),
    "attention_decode": Configuration(block=64, rows=64, warps=4, programs=1, stages=3),
    "attention_combine": Configuration(rows=1, warps=1),
    "swiglu": Configuration(block=2048, warps=4),
    "swiglu_backward": Configuration(block=1024, warps=4),
    "embedding": Configuration(block=1024, warps=4),
    "embedding_backward": Configuration(block=1024, rows=8, warps=4),
    "rotary": Configuration(rows=32, warps=4),
    "row_log_prob": Configuration(block=4096, warps=8),
    "move_rows": Configuration(block=2048, warps=4),
    "scale_in_place": Configuration(block=2048, warps=4, programs=8),
}
# By compute capability: sm_80 (A100), sm_90 (H100, H200), sm_100 (B200).
_AMPERE = _HOPPER | {
    "attention_forward": Configuration(block=64, rows=128, warps=8, stages=2),
    "attention_queries": Configuration(block=64, rows=128, warps=8, stages=2),
    "attention_keys": Configuration(block=32, rows=128, warps=8, stages=2),
}
_BLACKWELL = _HOPPER | {
    "attention_forward": Configuration(block=64, rows=128, warps=8, stages=3, descriptors=True),
    "attention_keys": Configuration(block=32, rows=128, warps=8, stages=2, descriptors=True),
}
TABLES: dict[int, dict[str, Configuration]] = {80: _AMPERE, 90: _HOPPER, 100: _BLACKWELL}


def configuration(kernel: str, device: torch.device) -> Configuration:
    """The configuration of a kernel on a device."""
    return TABLES[chip(device)][kernel]


@functools.cache
def chip(device: torch.device) -> int:
    """The table that a device is served from: the newest chip not newer than it. The interpreter has Hopper's."""
    if device.type != "cuda":
        return 90
    major, _ = torch.cuda.get_device_capability(device)
    return 80 if major < 9 else 90 if major == 9 else 100
