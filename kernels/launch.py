"""Chooses where an operator runs, and launches its Triton kernels.

CUDA tensors go to the Triton kernels, CPU tensors to the eager references. With TRITON_INTERPRET=1 set before Triton is
imported, CPU tensors go to the same kernels in Triton's interpreter. float64 always goes to the references, because the kernels
compute in float32.

Functions that launch kernels are `Operator`s: custom operators of torch where autograd or torch.compile looks on, plain
functions where neither does.
"""

import functools
import inspect
from collections.abc import Callable, Sequence
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


class Operator:
    """A custom operator of torch (`torch.library.custom_op`) that costs a plain call where nobody needs an operator.

    Dispatching an operator takes longer on the host than launching most kernels. Inside the model's own autograd functions and
    in generation gradients are off, so the function runs directly. Changes of mutated tensors are counted as the operator would
    count them, so that autograd still notices a saved tensor that was overwritten. Other attributes are the custom operator's.
    """

    def __init__(
        self,
        name: str,
        function: Callable[..., Any],  # of positional arguments
        mutates: Sequence[str] = (),  # names of the tensors that it changes
        schema: str | None = None,
    ) -> None:
        self.function = function
        self.registered = torch.library.custom_op(name, function, mutates_args=mutates, schema=schema)
        parameters = list(inspect.signature(function).parameters)
        self.mutated = [parameters.index(tensor) for tensor in mutates]

    def __call__(self, *arguments: Any) -> Any:
        # A dispatch mode records operators, or traces a graph with tensors that have no data.
        if torch.is_grad_enabled() or torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack():
            return self.registered(*arguments)
        result = self.function(*arguments)
        for place in self.mutated:
            tensor = arguments[place]
            if tensor is not None and not tensor.is_inference():
                torch.autograd.graph.increment_version(tensor)
        return result

    def __getattr__(self, name: str) -> Any:
        return getattr(self.registered, name)


def operator(name: str, *, mutates: Sequence[str] = (), schema: str | None = None) -> Callable[[Callable[..., Any]], Operator]:
    """Decorator that makes an `Operator` of a function."""
    return lambda function: Operator(name, function, mutates, schema)


def launch(
    kernel: Any,
    grid: Sequence[int],
    *arguments: Any,
    device: torch.device,
    warps: int,
    stages: int = 1,
    fusion: bool = True,
    registers: int | None = None,
    **constants: Any,
) -> None:
    """Start a kernel on the current stream of `device`, without waiting for it. An empty grid starts nothing.

    Args:
        grid: programs in each dimension.
        arguments: of the kernel, in its order.
        warps, stages: warps of a program, and loads in flight of a loop with matrix products.
        fusion: whether a product and a sum may share one rounding. It is always given, because Triton's default has changed.
        registers: most registers of a thread; default: as many as it takes.
        constants: the kernel's `tl.constexpr` arguments.
    """
    if 0 in grid:
        return
    options = {"num_warps": warps, "num_stages": stages, "enable_fp_fusion": fusion}
    if registers is not None:
        options["maxnreg"] = registers
    with torch.cuda.device(device if device.type == "cuda" else -1):
        kernel[tuple(grid)](*arguments, **constants, **options)


def unit_stride(tensor: Tensor) -> Tensor:
    """The tensor, copied only where its last dimension is not contiguous. Kernels take any stride of the other dimensions."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()
