"""AdamW (Loshchilov and Hutter 2019, https://arxiv.org/abs/1711.05101, algorithm 2) with exact float32 master weights.

A bfloat16 parameter is stored with the 16 bits that rounding cut off, together the float32 master bit for bit, in 2 + 2 bytes.
The parameter is the master rounded half away from zero: the high half of the bits, plus one where the low half's top bit
is set. That bit tells the way back, so no tie is ambiguous; rounding half to even would not be reversible.

Moments are float32, or bfloat16 rounded stochastically, so that what is too small for bfloat16 counts on average. One Philox
call is made for each four elements: its key is (seed, step), its counter (low and high word of index / 4, parameter, 0), where
index is the element's in the unsharded tensor. Word w is of element 4 * (index / 4) + w: its low half rounds the first moment,
its high half the second.

Kernel and reference do the same operations in the same order, each rounded by itself, and give the same bits.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.configurations import configuration
from kernels.launch import launch, runs_triton
from kernels.philox import philox

# Elements of one pass of the reference on a CPU: few enough that a block's arrays stay in the cache between operations. A GPU
# takes 128 times as many, or it would wait for the host.
_BLOCK = 1 << 17
_QUIET_NAN = 0x7FC0
_WORD = 0xFFFFFFFF


def split_master(master: Tensor) -> tuple[Tensor, Tensor]:
    """A float32 master as (bfloat16 parameter, int16 remainder).

    Exact for every finite value, -0, denormals, infinities, and finite values that round to infinity; a NaN stays a NaN.
    """
    bits = master.view(torch.int32)
    high = (bits + 0x8000) >> 16
    remainder = bits.to(torch.int16)
    nan = master.isnan()
    high = torch.where(nan, _QUIET_NAN, high)
    remainder = torch.where(nan, 0, remainder)
    return high.to(torch.int16).view(torch.bfloat16), remainder.to(torch.int16)


def join_master(parameter: Tensor, remainder: Tensor) -> Tensor:
    """The float32 master of a bfloat16 parameter and its int16 remainder; the inverse of `split_master`."""
    low = remainder.to(torch.int32) & 0xFFFF
    high = parameter.view(torch.int16).to(torch.int32) - (low >> 15)
    return ((high << 16) | low).view(torch.float32)


def adamw_(
    parameter: Tensor,
    remainder: Tensor | None,
    gradient: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    *,
    learning_rate: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    step: int,
    gradient_scale: Tensor,
    seed: int = 0,
    parameter_id: int = 0,
    first_index: int = 0,
) -> None:
    """One AdamW update in place.

    Args:
        parameter: contiguous; float32 with remainder None, or bfloat16 with its int16 remainder of equal shape.
        gradient: of the parameter's shape, float32 or bfloat16.
        exp_avg, exp_avg_sq: moments of the parameter's shape, both float32 or both bfloat16; the latter are rounded
            stochastically, and the update is computed from what they were before that.
        step: of this update, from 1, for the bias corrections. weight_decay: decoupled, times the learning rate.
        gradient_scale: float32 scalar tensor that multiplies the gradient (the clip factor), read where the data is. Below 0 it
            says that there is to be no update: everything stays as it is, and no host had to know.
        seed, parameter_id: what keys the stochastic rounding together with the step; 32 bits of each are used.
        first_index: of this shard's first element in the unsharded tensor, so that shards are rounded as the whole is.
    Raises: ValueError for other dtypes, for shapes that differ, and for what is updated but not contiguous.
    """
    _check(parameter, remainder, gradient, exp_avg, exp_avg_sq, gradient_scale)
    if runs_triton(parameter):
        _adamw(
            parameter, remainder, gradient, exp_avg, exp_avg_sq, gradient_scale, learning_rate, betas[0], betas[1], eps,
            weight_decay, step, seed & _WORD, parameter_id & _WORD, first_index,
        )  # fmt: skip
    else:
        adamw_reference_(
            parameter, remainder, gradient, exp_avg, exp_avg_sq, learning_rate=learning_rate, betas=betas, eps=eps,
            weight_decay=weight_decay, step=step, gradient_scale=gradient_scale, seed=seed, parameter_id=parameter_id,
            first_index=first_index,
        )  # fmt: skip


def _check(parameter, remainder, gradient, exp_avg, exp_avg_sq, gradient_scale) -> None:
    allowed = (torch.float32, torch.bfloat16)
    if parameter.dtype not in allowed or gradient.dtype not in allowed:
        raise ValueError(f"parameter {parameter.dtype}, gradient {gradient.dtype}: each must be float32 or bfloat16")
    if exp_avg.dtype not in allowed or exp_avg.dtype != exp_avg_sq.dtype:
        raise ValueError(f"moments {exp_avg.dtype} and {exp_avg_sq.dtype}: must be both float32 or both bfloat16")
    needed, found = torch.int16 if parameter.dtype == torch.bfloat16 else None, None if remainder is None else remainder.dtype
    if found != needed:
        raise ValueError(f"remainder {found} of a {parameter.dtype} parameter: must be {needed}")
    if gradient_scale.dtype != torch.float32 or gradient_scale.numel() != 1:
        raise ValueError(f"gradient_scale {list(gradient_scale.shape)} {gradient_scale.dtype}: must be a single float32 number")
    tensors = {"parameter": parameter, "remainder": remainder, "exp_avg": exp_avg, "exp_avg_sq": exp_avg_sq}
    for name, tensor in {**tensors, "gradient": gradient}.items():
        if tensor is not None and tensor.shape != parameter.shape:
            raise ValueError(f"{name} {list(tensor.shape)}: must have the parameter's shape, {list(parameter.shape)}")
    for name, tensor in tensors.items():
        if tensor is not None and not tensor.is_contiguous():
            raise ValueError(f"{name} has strides {tensor.stride()}: must be contiguous, as it is updated in place")


class _Factors(NamedTuple):
    """The numbers of an update that are the same for every element, in the precision of Python's float."""

    decay: float
    step_size: float
    eps: float
    first_weight: float
    second_decay: float
    second_weight: float


def _factors(learning_rate, betas, eps, weight_decay, step) -> _Factors:
    beta1, beta2 = betas
    # Both bias corrections become scalars: m / c1 / (sqrt(v / c2) + eps) = m * (r / c1) / (sqrt(v) + eps * r), r = sqrt(c2).
    root = (1 - beta2**step) ** 0.5
    step_size = learning_rate * root / (1 - beta1**step)
    return _Factors(1 - learning_rate * weight_decay, step_size, eps * root, 1 - beta1, beta2, 1 - beta2)


@torch.library.custom_op("komainu::adamw_", mutates_args=("parameter", "remainder", "exp_avg", "exp_avg_sq"))
def _adamw(
    parameter: Tensor, remainder: Tensor | None, gradient: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, gradient_scale: Tensor,
    learning_rate: float, beta1: float, beta2: float, eps: float, weight_decay: float, step: int, seed: int, parameter_id: int,
    first_index: int,
) -> None:  # fmt: skip
    elements, device = parameter.numel(), parameter.device
    factors = _factors(learning_rate, (beta1, beta2), eps, weight_decay, step)
    config = configuration("adamw", device)
    # Programs are aligned to groups of four of the absolute index.
    shift = first_index % 4
    # As a signed number, which is what 64-bit arguments are.
    key = (step & _WORD) << 32 | seed
    key -= (key >> 63) << 64
    launch(
        _adamw_kernel, (triton.cdiv(elements + shift, config.block),), _bits(parameter), remainder,
        _bits(gradient.contiguous()), _bits(exp_avg), _bits(exp_avg_sq), gradient_scale, *factors, key, parameter_id,
        first_index // 4, elements, SHIFT=shift, BLOCK=config.block, device=device, warps=config.warps, fusion=False,
    )  # fmt: skip


@_adamw.register_fake
def _(
    parameter, remainder, gradient, exp_avg, exp_avg_sq, gradient_scale, learning_rate, beta1, beta2, eps, weight_decay, step,
    seed, parameter_id, first_index,
):  # fmt: skip
    return None


def _bits(tensor: Tensor) -> Tensor:
    """bfloat16 as integers, which kernels convert themselves: casts of a backend may round as they like."""
    return tensor.view(torch.int16) if tensor.dtype == torch.bfloat16 else tensor


def adamw_reference_(
    parameter, remainder, gradient, exp_avg, exp_avg_sq, *, learning_rate, betas, eps, weight_decay, step, gradient_scale,
    seed=0, parameter_id=0, first_index=0,
) -> None:  # fmt: skip
    if gradient_scale < 0:
        return
    factors = _factors(learning_rate, betas, eps, weight_decay, step)
    arrays = [parameter.view(-1), gradient.reshape(-1), exp_avg.view(-1), exp_avg_sq.view(-1)]
    if remainder is not None:
        arrays.append(remainder.view(-1))
    size = _BLOCK if parameter.device.type == "cpu" else 128 * _BLOCK
    for number, block in enumerate(zip(*(array.split(size) for array in arrays), strict=True)):
        value, grad, first, second = block[:4]
        master = value if remainder is None else join_master(value, block[4])
        wide_first, wide_second = first.float(), second.float()
        grad = grad.float() * gradient_scale
        wide_first.add_((grad - wide_first).mul_(factors.first_weight))
        wide_second.mul_(factors.second_decay).add_(grad.mul_(grad).mul_(factors.second_weight))
        # By way of float64, as float32 roots of the CPU's library are not correctly rounded.
        root = wide_second.double().sqrt_().float()
        change = (wide_first * factors.step_size).div_(root.add_(factors.eps))
        master.mul_(factors.decay).sub_(change)
        if remainder is not None:
            rounded, low = split_master(master)
            value.copy_(rounded)
            block[4].copy_(low)
        if first.dtype == torch.bfloat16:
            start = first_index + number * size
            noise = _noise(start, start + len(first), parameter_id & _WORD, (seed & _WORD, step & _WORD), first.device)
            first.copy_(_round_stochastically(wide_first, noise & 0xFFFF))
            second.copy_(_round_stochastically(wide_second, noise >> 16))


def _noise(start: int, stop: int, parameter_id: int, key: tuple[int, int], device: torch.device) -> Tensor:
    """32 random bits of each of the elements `start` to `stop` of a parameter."""
    group = torch.arange(start // 4, triton.cdiv(stop, 4), device=device)
    zero = torch.zeros_like(group)
    words = philox((group & _WORD, group >> 32, zero + parameter_id, zero), key)
    return torch.stack(words, dim=1).view(-1)[start % 4 :][: stop - start]


def _round_stochastically(value: Tensor, noise: Tensor) -> Tensor:
    """float32 to bfloat16, up or down with the probability that keeps the mean, by 16 random bits of each."""
    bits = value.view(torch.int32)
    # Computed NaNs are quiet ones, of which the high half alone is a NaN as well.
    high = torch.where(value.isfinite(), bits + noise.to(torch.int32), bits) >> 16
    return high.to(torch.int16).view(torch.bfloat16)


@triton.jit(do_not_specialize=["key", "parameter_id", "first_group", "elements"])
def _adamw_kernel(
    parameter, remainder, gradient, exp_avg, exp_avg_sq, gradient_scale, decay, step_size, eps, first_weight, second_decay,
    second_weight, key: tl.int64, parameter_id: tl.int64, first_group: tl.int64, elements: tl.int64,
    SHIFT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    if tl.load(gradient_scale) < 0:
        return
    block = tl.program_id(0).to(tl.int64)
    start = block * BLOCK - SHIFT
    offset = start + tl.arange(0, BLOCK)
    group = first_group + block * (BLOCK // 4) + tl.arange(0, BLOCK // 4)
    # A mask of a number of elements that the compiler does not know would make every access narrow.
    if (start >= 0) & (start + BLOCK <= elements):
        _update(
            parameter, remainder, gradient, exp_avg, exp_avg_sq, gradient_scale, decay, step_size, eps, first_weight,
            second_decay, second_weight, key, parameter_id, group, offset, None,
        )  # fmt: skip
    else:
        _update(
            parameter, remainder, gradient, exp_avg, exp_avg_sq, gradient_scale, decay, step_size, eps, first_weight,
            second_decay, second_weight, key, parameter_id, group, offset, (offset >= 0) & (offset < elements),
        )  # fmt: skip


@triton.jit
def _update(
    parameter, remainder, gradient, exp_avg, exp_avg_sq, gradient_scale, decay, step_size, eps, first_weight, second_decay,
    second_weight, key, parameter_id, group, offset, inside,
):  # fmt: skip
    grad = _load(gradient + offset, inside) * tl.load(gradient_scale)
    first = _load(exp_avg + offset, inside)
    first += (grad - first) * first_weight
    second = _load(exp_avg_sq + offset, inside) * second_decay
    second += grad * grad * second_weight
    if remainder is None:
        master = _load(parameter + offset, inside)
    else:
        low = tl.load(remainder + offset, mask=inside).to(tl.int32) & 0xFFFF
        high = tl.load(parameter + offset, mask=inside).to(tl.int32) - (low >> 15)
        master = ((high << 16) | low).to(tl.float32, bitcast=True)
    change = tl.div_rn(first * step_size, tl.sqrt_rn(second) + eps)
    master = master * decay - change
    if remainder is None:
        tl.store(parameter + offset, master, mask=inside)
    else:
        bits = master.to(tl.int32, bitcast=True)
        nan = (bits & 0x7FFFFFFF) > 0x7F800000
        rounded = tl.where(nan, 0x7FC0, (bits + 0x8000) >> 16)
        tl.store(parameter + offset, rounded.to(tl.int16), mask=inside)
        tl.store(remainder + offset, tl.where(nan, 0, bits).to(tl.int16), mask=inside)
    if exp_avg.dtype.element_ty == tl.float32:
        tl.store(exp_avg + offset, first, mask=inside)
        tl.store(exp_avg_sq + offset, second, mask=inside)
    else:
        word0, word1, word2, word3 = tl.philox(
            key, group.to(tl.uint32), (group >> 32).to(tl.uint32), parameter_id.to(tl.uint32), 0
        )
        noise = tl.interleave(tl.interleave(word0, word2), tl.interleave(word1, word3))
        tl.store(exp_avg + offset, _round(first, noise & 0xFFFF), mask=inside)
        tl.store(exp_avg_sq + offset, _round(second, noise >> 16), mask=inside)


@triton.jit
def _load(pointer, inside):
    """Float32 of float32, or of the bits of bfloat16."""
    value = tl.load(pointer, mask=inside)
    if value.dtype == tl.int16:
        value = (value.to(tl.int32) << 16).to(tl.float32, bitcast=True)
    return value


@triton.jit
def _round(value, noise):
    bits = value.to(tl.int32, bitcast=True)
    high = tl.where((bits & 0x7FFFFFFF) < 0x7F800000, bits + noise.to(tl.int32), bits) >> 16
    return high.to(tl.int16)
