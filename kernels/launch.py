"""Where an operator runs, and with what its Triton kernels are launched.

CUDA tensors go to the Triton kernels and CPU tensors to the eager references. Where TRITON_INTERPRET=1 was set before Triton
was imported, CPU tensors go to the same kernels in Triton's interpreter. float64, which the kernels would compute in float32,
always goes to the references.
"""

import functools
from collections.abc import Sequence
from typing import Any

import torch
import triton
from torch import Tensor

INTERPRETED: bool = triton.knobs.runtime.interpret


def runs_triton(tensor: Tensor) -> bool:
    """Whether an operator on this tensor runs its Triton kernels."""
    return tensor.dtype != torch.float64 and (tensor.is_cuda or INTERPRETED)


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """Streaming multiprocessors of a device; the interpreter has one."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def launch(
    kernel: Any,
    grid: Sequence[int],
    *arguments: Any,
    device: torch.device,
    warps: int,
    stages: int = 1,
    fusion: bool = True,
    **constants: Any,
) -> None:
    """Start a kernel on the current stream of `device`; nothing is waited for.

    Args: fusion: whether products and sums may be contracted to one rounding; said always, as Triton's default changes.
    """
    if 0 in grid:
        return
    with torch.cuda.device(device if device.type == "cuda" else -1):
        kernel[tuple(grid)](*arguments, **constants, num_warps=warps, num_stages=stages, enable_fp_fusion=fusion)


def unit_stride(tensor: Tensor) -> Tensor:
    """The tensor, copied only where its last dimension is not contiguous: kernels take any stride of the others."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()
