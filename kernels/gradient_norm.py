"""The Euclidean norm of all gradients together, in two stages of fixed order.

First each program sums the squares of one block of one gradient in float32, then one program sums these sums in float64.
"""

import itertools
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.bfloat16 import bits_of, float32_of
from kernels.configurations import configuration
from kernels.launch import launch, operator, runs_triton


def gradient_norm(gradients: Sequence[Tensor], device: torch.device) -> Tensor:
    """Square root of the sum of the squares of all elements.

    Args: gradients: of any shapes and floating dtypes, all on `device`.
    Returns: a float32 scalar on the device, without waiting for it: 0 for no gradients, infinite or NaN where a gradient is.
    """
    if gradients and runs_triton(gradients[0]):
        return _norm(gradients)
    return gradient_norm_reference(gradients, device)


def gradient_norm_reference(gradients: Sequence[Tensor], device: torch.device) -> Tensor:
    sums = [gradient.float().square().sum() for gradient in gradients]
    return torch.stack(sums).double().sum().sqrt().float() if sums else torch.zeros((), device=device)


# An explicit schema: some versions of torch cannot infer the schema of a sequence.
@operator("komainu::gradient_norm", schema="(Tensor[] gradients) -> Tensor")
def _norm(gradients: Sequence[Tensor]) -> Tensor:
    device = gradients[0].device
    config, total = configuration("gradient_norm", device), configuration("gradient_norm_total", device)
    programs = [triton.cdiv(gradient.numel(), config.block) for gradient in gradients]
    # Padded with zeros to whole blocks, so that the second stage needs no mask.
    sums = torch.zeros(triton.cdiv(sum(programs), total.block) * total.block, dtype=torch.float32, device=device)
    firsts = itertools.accumulate(programs, initial=0)
    for gradient, count, first in zip(gradients, programs, firsts, strict=False):
        if not count:
            continue  # a rank's empty shard
        launch(
            _sum_squares_kernel,
            (count,),
            bits_of(gradient.contiguous()),
            sums,
            gradient.numel(),
            first,
            BLOCK=config.block,
            device=device,
            warps=config.warps,
        )
    norm = torch.empty((), dtype=torch.float32, device=device)
    launch(_total_kernel, (1,), sums, norm, len(sums), BLOCK=total.block, device=device, warps=total.warps)
    return norm


@_norm.register_fake
def _(gradients):
    return torch.empty((), dtype=torch.float32, device=gradients[0].device)


@triton.jit(do_not_specialize=["elements", "first_sum"])
def _sum_squares_kernel(
    gradient,  # [elements]: floats, or bfloat16 bits in int16
    sums,  # float32
    elements: tl.int64,
    first_sum: tl.int64,  # place in `sums` of this gradient's first block
    BLOCK: tl.constexpr,
):
    block = tl.program_id(0).to(tl.int64)
    offset = block * BLOCK + tl.arange(0, BLOCK)
    # Whole blocks load without a mask: a bound that the compiler does not know would make every load narrow.
    if (block + 1) * BLOCK <= elements:
        value = tl.load(gradient + offset)
    else:
        value = tl.load(gradient + offset, mask=offset < elements, other=0)
    value = float32_of(value)
    tl.store(sums + first_sum + block, tl.sum(value * value, axis=0))


@triton.jit(do_not_specialize=["count"])
def _total_kernel(sums, norm, count: tl.int64, BLOCK: tl.constexpr):
    total = tl.zeros((BLOCK,), dtype=tl.float64)
    for first in range(0, count, BLOCK):
        total += tl.load(sums + first + tl.arange(0, BLOCK)).to(tl.float64)
    tl.store(norm, tl.sqrt(tl.sum(total, axis=0)).to(tl.float32))
