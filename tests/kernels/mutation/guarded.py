"""Tensors beside a page that nobody may touch: a kernel that goes beyond a tensor's end, or before its start, dies of it.

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


def guarded(tensor: Tensor, before: bool = False) -> Tensor:
    """The tensor beside a forbidden page, which is behind its end, or before its start.

    A tensor without memory of its own on a CPU, and one that autograd follows, stays as it is.
    """
    plain = type(tensor) is Tensor and tensor.device.type == "cpu" and tensor.is_contiguous() and not tensor.requires_grad
    if not plain or not 0 < tensor.nbytes <= LARGEST:
        return tensor
    length = -(-tensor.nbytes // mmap.PAGESIZE) * mmap.PAGESIZE
    memory = mmap.mmap(-1, length + mmap.PAGESIZE)
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    if _protect(ctypes.c_void_p(address + (0 if before else length)), ctypes.c_size_t(mmap.PAGESIZE), 0):
        raise OSError(ctypes.get_errno(), "mprotect failed")
    first = mmap.PAGESIZE if before else length - tensor.nbytes
    memory_B = torch.frombuffer(memory, dtype=torch.uint8, count=tensor.nbytes, offset=first)
    return memory_B.view(tensor.dtype).view(tensor.shape).copy_(tensor)


def guard_everything(before: bool) -> None:
    """From now on in this process, guard new tensors and the tests' random inputs, behind their end or before their start."""

    def after(make: Any) -> Any:
        return lambda *arguments, **settings: guarded(make(*arguments, **settings), before)

    for name in ("empty", "empty_like", "zeros", "zeros_like", "tensor", "arange", "randint"):
        setattr(torch, name, after(getattr(torch, name)))
    torch.Tensor.clone = after(torch.Tensor.clone)
    sort = torch.sort
    torch.sort = lambda *arguments, **settings: tuple(guarded(tensor, before) for tensor in sort(*arguments, **settings))
    tests.kernels.error_rule.random = after(tests.kernels.error_rule.random)
