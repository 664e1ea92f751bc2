"""bfloat16 as 16-bit integers, which kernels convert themselves: a backend's own casts may round as they like."""

import torch
import triton
import triton.language as tl
from torch import Tensor


def bits_of(tensor: Tensor) -> Tensor:
    """A bfloat16 tensor as int16; any other tensor unchanged."""
    return tensor.view(torch.int16) if tensor.dtype == torch.bfloat16 else tensor


@triton.jit
def float32_of(value):
    """float32 of a float, or of bfloat16 bits in int16."""
    if value.dtype == tl.int16:
        value = (value.to(tl.int32) << 16).to(tl.float32, bitcast=True)
    return value.to(tl.float32)
