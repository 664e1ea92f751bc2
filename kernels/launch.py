"""Chooses where an operator runs, and launches its Triton kernels.

CUDA tensors go to the Triton kernels, CPU tensors to the eager references. With TRITON_INTERPRET=1 set before Triton is
imported, CPU tensors go to the same kernels in Triton's interpreter. float64 always goes to the references, because the kernels
compute in float32.
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
    """Streaming multiprocessors of a device; 1 for the interpreter."""
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
    """Start a kernel on the current stream of `device`, without waiting for it. An empty grid starts nothing.

    Args:
        grid: programs in each dimension.
        arguments: of the kernel, in its order.
        warps, stages: warps of a program, and loads in flight of a loop with matrix products.
        fusion: whether a product and a sum may share one rounding. It is always given, because Triton's default has changed.
        constants: the kernel's `tl.constexpr` arguments.
    """
    if 0 in grid:
        return
    with torch.cuda.device(device if device.type == "cuda" else -1):
        kernel[tuple(grid)](*arguments, **constants, num_warps=warps, num_stages=stages, enable_fp_fusion=fusion)


def unit_stride(tensor: Tensor) -> Tensor:
    """The tensor, copied only where its last dimension is not contiguous. Kernels take any stride of the other dimensions."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()
