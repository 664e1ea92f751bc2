"""Tensors whose memory ends at a page that nobody may touch: a kernel that goes beyond a tensor's end kills its process.

Triton's interpreter reads and writes by address, so an access beyond the end would otherwise go unnoticed.
"""

import ctypes
import mmap
from typing import Any

import torch
from torch import Tensor

import tests.kernels.error_rule

LARGEST = 2**26  # bytes; larger tensors stand for memory that is never touched
_protect = ctypes.CDLL(None, use_errno=True).mprotect


def guarded(tensor: Tensor) -> Tensor:
    """The tensor in memory that ends at a forbidden page; unchanged where it has no memory of its own on a CPU."""
    plain = type(tensor) is Tensor and tensor.device.type == "cpu" and tensor.is_contiguous()
    if not plain or not 0 < tensor.nbytes <= LARGEST:
        return tensor
    length = -(-tensor.nbytes // mmap.PAGESIZE) * mmap.PAGESIZE
    memory = mmap.mmap(-1, length + mmap.PAGESIZE)
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    if _protect(ctypes.c_void_p(address + length), ctypes.c_size_t(mmap.PAGESIZE), 0):
        raise OSError(ctypes.get_errno(), "mprotect failed")
    memory_B = torch.frombuffer(memory, dtype=torch.uint8, count=length)
    copy = memory_B[length - tensor.nbytes :].view(tensor.dtype).view(tensor.shape)
    return copy.copy_(tensor.detach())


def guard_everything() -> None:
    """From now on in this process, guard tensors from torch.empty, torch.zeros and torch.sort, and the tests' random inputs."""

    def after(make: Any) -> Any:
        return lambda *arguments, **settings: guarded(make(*arguments, **settings))

    torch.empty, torch.zeros, torch.empty_like = map(after, (torch.empty, torch.zeros, torch.empty_like))
    sort = torch.sort
    torch.sort = lambda *arguments, **settings: tuple(map(guarded, sort(*arguments, **settings)))
    tests.kernels.error_rule.random = after(tests.kernels.error_rule.random)
