"""AdamW (Loshchilov and Hutter 2019, https://arxiv.org/abs/1711.05101, algorithm 2) with exact float32 master weights.

Masters. A bfloat16 parameter is stored beside the 16 bits that rounding cut off: 2 + 2 bytes hold the float32 master bit for
bit. The parameter is the master rounded half away from zero: the high half of the master's bits, plus one where the top bit of
the low half is set. The same bit undoes the rounding, so no tie is ambiguous. Rounding half to even could not be undone.

Moments are float32, or bfloat16 with stochastic rounding, which keeps the mean of changes too small for bfloat16. One Philox
call serves four elements. Its key is `philox.key_of(ROUNDING, seed, step)`; its counter is (low word of index / 4, high word,
parameter, 0), where index is the element's place in the unsharded tensor. Word w belongs to element 4 * (index / 4) + w: its
low half rounds the first moment, its high half the second.

Three ways compute the update. The Triton kernel and the eager reference do the same operations in the same order, each rounded
by itself, and give the same bits. On a CPU, float32 moments take torch's fused operator instead: one pass over memory, within
rounding of the reference.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.bfloat16 import bits_of, float32_of
from kernels.configurations import configuration
from kernels.launch import launch, operator, runs_triton
from kernels.philox import ROUNDING, WORD, key_of, philox, philox_words

# Elements of one eager pass on a CPU: a block's arrays stay in the cache between operations. A GPU takes 128 times as many,
# because small blocks would leave it waiting for the host.
_BLOCK = 1 << 17
_QUIET_NAN = 0x7FC0


def split_master(master: Tensor) -> tuple[Tensor, Tensor]:
    """Split a float32 master into (bfloat16 parameter, int16 remainder).

    Exact for every number: -0, denormals, infinities, and finite values that round to infinity. A NaN stays a NaN.
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
    parameter: Tensor,  # contiguous; float32, or bfloat16 with a remainder
    remainder: Tensor | None,  # int16 for a bfloat16 parameter, None for float32
    gradient: Tensor,  # float32 or bfloat16, of any strides
    exp_avg: Tensor,  # contiguous; float32 or bfloat16
    exp_avg_sq: Tensor,  # contiguous; dtype of exp_avg
    *,
    learning_rate: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,  # decoupled; multiplied by the learning rate
    step: int,  # of this update, from 1, for the bias corrections
    gradient_scale: Tensor,  # float32 scalar on the parameter's device
    seed: int = 0,
    parameter_id: int = 0,
    first_index: int = 0,
) -> None:
    """Update a parameter and its moments in place; all five tensors have one shape.

    Args:
        exp_avg, exp_avg_sq: bfloat16 moments are rounded stochastically, after the update has used their exact values.
        gradient_scale: multiplies the gradient (the clip factor). A negative value skips the update: every tensor stays as it
            is. The device reads the value, so the host never waits for it.
        seed, parameter_id: key the stochastic rounding together with the step; 32 bits of each count.
        first_index: place of this shard's first element in the unsharded tensor, so that shards round as the whole does.
    Raises: ValueError for other dtypes, differing shapes, and an updated tensor that is not contiguous.
    """
    _check(parameter, remainder, gradient, exp_avg, exp_avg_sq, gradient_scale)
    tensors = (parameter, remainder, gradient, exp_avg, exp_avg_sq)
    if runs_triton(parameter):
        rounding = (seed, parameter_id & WORD, first_index)
        _adamw(*tensors, gradient_scale, learning_rate, *betas, eps, weight_decay, step, *rounding)
    elif parameter.device.type == "cpu" and exp_avg.dtype == torch.float32:
        _adamw_fused_(*tensors, gradient_scale, learning_rate, betas, eps, weight_decay, step)
    else:
        adamw_reference_(
            *tensors,
            learning_rate=learning_rate,
            betas=betas,
            eps=eps,
            weight_decay=weight_decay,
            step=step,
            gradient_scale=gradient_scale,
            seed=seed,
            parameter_id=parameter_id,
            first_index=first_index,
        )


def _check(
    parameter: Tensor,
    remainder: Tensor | None,
    gradient: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    gradient_scale: Tensor,
) -> None:
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
            raise ValueError(f"{name} has strides {tensor.stride()}: is updated in place, so it must be contiguous")


class _Factors(NamedTuple):
    """The numbers of an update that all elements share, in the precision of Python's float."""

    decay: float
    step_size: float
    eps: float
    first_weight: float
    second_decay: float
    second_weight: float


def _factors(learning_rate: float, betas: tuple[float, float], eps: float, weight_decay: float, step: int) -> _Factors:
    beta1, beta2 = betas
    # Both bias corrections become scalars: m / c1 / (sqrt(v / c2) + eps) = m * (r / c1) / (sqrt(v) + eps * r), r = sqrt(c2).
    root = (1 - beta2**step) ** 0.5
    step_size = learning_rate * root / (1 - beta1**step)
    return _Factors(1 - learning_rate * weight_decay, step_size, eps * root, 1 - beta1, beta2, 1 - beta2)


@operator("komainu::adamw_", mutates=("parameter", "remainder", "exp_avg", "exp_avg_sq"))
def _adamw(
    parameter: Tensor,
    remainder: Tensor | None,
    gradient: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    gradient_scale: Tensor,
    learning_rate: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    step: int,
    seed: int,
    parameter_id: int,
    first_index: int,
) -> None:
    elements, device = parameter.numel(), parameter.device
    config = configuration("adamw", device)
    # Programs are aligned to groups of four of the absolute index.
    shift = first_index % 4
    low, high = key_of(ROUNDING, seed, step)
    # 64-bit arguments are signed.
    key = high << 32 | low
    key -= (key >> 63) << 64
    tensors = (
        bits_of(parameter),
        remainder,
        bits_of(gradient.contiguous()),
        bits_of(exp_avg),
        bits_of(exp_avg_sq),
        gradient_scale,
    )
    launch(
        _adamw_kernel,
        (triton.cdiv(elements + shift, config.block),),
        *tensors,
        *_factors(learning_rate, (beta1, beta2), eps, weight_decay, step),
        key,
        parameter_id,
        first_index // 4,
        elements,
        SHIFT=shift,
        BLOCK=config.block,
        device=device,
        warps=config.warps,
        fusion=False,
    )


@_adamw.register_fake
def _(*_arguments):
    return None


def _adamw_fused_(
    parameter: Tensor,
    remainder: Tensor | None,
    gradient: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    gradient_scale: Tensor,
    learning_rate: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    step: int,
) -> None:
    """The update by torch's fused CPU operator: float32 moments; masters follow the float32 trajectory bit for bit."""
    scale = gradient_scale.item()
    if scale < 0:
        return
    arrays = [parameter.view(-1), gradient.reshape(-1), exp_avg.view(-1), exp_avg_sq.view(-1)]
    size = max(1, parameter.numel())
    if remainder is not None:
        # Blocks are a multiple of the operator's vectors: each element is computed as in one pass over all.
        arrays, size = [*arrays, remainder.view(-1)], _BLOCK
    count = torch.tensor(float(step))
    for value, grad, first, second, *low in zip(*(array.split(size) for array in arrays), strict=True):
        master = join_master(value, low[0]) if low else value
        grad = grad.float() if scale == 1 else grad.float() * gradient_scale
        torch._fused_adamw_(
            [master],
            [grad],
            [first],
            [second],
            [],
            [count],
            lr=learning_rate,
            beta1=betas[0],
            beta2=betas[1],
            weight_decay=weight_decay,
            eps=eps,
            amsgrad=False,
            maximize=False,
        )
        if low:
            _write_master(master, value, low[0])


def adamw_reference_(
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
    if gradient_scale < 0:
        return
    factors = _factors(learning_rate, betas, eps, weight_decay, step)
    arrays = [parameter.view(-1), gradient.reshape(-1), exp_avg.view(-1), exp_avg_sq.view(-1)]
    if remainder is not None:
        arrays.append(remainder.view(-1))
    size = _BLOCK if parameter.device.type == "cpu" else 128 * _BLOCK
    for number, block in enumerate(zip(*(array.split(size) for array in arrays), strict=True)):
        value, grad, first, second, *low = block
        master = join_master(value, low[0]) if low else value
        wide_first, wide_second = first.float(), second.float()
        grad = grad.float() * gradient_scale
        wide_first.add_((grad - wide_first).mul_(factors.first_weight))
        wide_second.mul_(factors.second_decay).add_(grad.mul_(grad).mul_(factors.second_weight))
        # In float64, because float32 roots of the CPU's library are not correctly rounded.
        root = wide_second.double().sqrt_().float()
        change = (wide_first * factors.step_size).div_(root.add_(factors.eps))
        master.mul_(factors.decay).sub_(change)
        if low:
            _write_master(master, value, low[0])
        if first.dtype == torch.bfloat16:
            start = first_index + number * size
            noise = _noise(start, start + len(first), parameter_id & WORD, key_of(ROUNDING, seed, step), first.device)
            first.copy_(_round_stochastically(wide_first, noise & 0xFFFF))
            second.copy_(_round_stochastically(wide_second, noise >> 16))


def _write_master(master: Tensor, parameter: Tensor, remainder: Tensor) -> None:
    rounded, low = split_master(master)
    parameter.copy_(rounded)
    remainder.copy_(low)


def _noise(start: int, stop: int, parameter_id: int, key: tuple[int, int], device: torch.device) -> Tensor:
    """32 random bits for each element from `start` to `stop` of a parameter."""
    group = torch.arange(start // 4, triton.cdiv(stop, 4), device=device)
    zero = torch.zeros_like(group)
    words = philox((group & WORD, group >> 32, zero + parameter_id, zero), key)
    return torch.stack(words, dim=1).view(-1)[start % 4 :][: stop - start]


def _round_stochastically(value: Tensor, noise: Tensor) -> Tensor:
    """float32 to bfloat16, up or down with the probability that keeps the mean; `noise` holds 16 random bits an element."""
    bits = value.view(torch.int32)
    # Computed NaNs are quiet: their high half alone is a NaN too.
    high = torch.where(value.isfinite(), bits + noise.to(torch.int32), bits) >> 16
    return high.to(torch.int16).view(torch.bfloat16)


@triton.jit(do_not_specialize=["key", "parameter_id", "first_group", "elements"])
def _adamw_kernel(
    parameter,  # [elements] float32, or bfloat16 bits in int16; likewise gradient and moments
    remainder,  # [elements] int16, or None for a float32 parameter
    gradient,  # [elements]
    exp_avg,  # [elements]
    exp_avg_sq,  # [elements]
    gradient_scale,  # one float32
    decay,  # this and the next five: `_Factors`
    step_size,
    eps,
    first_weight,
    second_decay,
    second_weight,
    key: tl.int64,  # of Philox
    parameter_id: tl.int64,
    first_group: tl.int64,  # first index / 4
    elements: tl.int64,
    SHIFT: tl.constexpr,  # first index % 4
    BLOCK: tl.constexpr,  # elements of a program
):
    if tl.load(gradient_scale) < 0:
        return
    block = tl.program_id(0).to(tl.int64)
    start = block * BLOCK - SHIFT
    offset = start + tl.arange(0, BLOCK)
    group = first_group + block * (BLOCK // 4) + tl.arange(0, BLOCK // 4)
    tensors = (parameter, remainder, gradient, exp_avg, exp_avg_sq, gradient_scale)
    factors = (decay, step_size, eps, first_weight, second_decay, second_weight)
    # Without a mask where none is needed: the compiler does not know `elements`, and such a mask makes every access narrow.
    if (start >= 0) & (start + BLOCK <= elements):
        _update(tensors, factors, key, parameter_id, group, offset, None)
    else:
        _update(tensors, factors, key, parameter_id, group, offset, (offset >= 0) & (offset < elements))


@triton.jit
def _update(tensors, factors, key, parameter_id, group, offset, inside):
    parameter, remainder, gradient, exp_avg, exp_avg_sq, gradient_scale = tensors
    decay, step_size, eps, first_weight, second_decay, second_weight = factors
    grad = float32_of(tl.load(gradient + offset, mask=inside)) * tl.load(gradient_scale)
    first = float32_of(tl.load(exp_avg + offset, mask=inside))
    first += (grad - first) * first_weight
    second = float32_of(tl.load(exp_avg_sq + offset, mask=inside)) * second_decay
    second += grad * grad * second_weight
    if remainder is None:
        master = float32_of(tl.load(parameter + offset, mask=inside))
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
        noise = philox_words(key, group.to(tl.uint32), (group >> 32).to(tl.uint32), parameter_id.to(tl.uint32), 0)
        tl.store(exp_avg + offset, _round(first, noise & 0xFFFF), mask=inside)
        tl.store(exp_avg_sq + offset, _round(second, noise >> 16), mask=inside)


@triton.jit
def _round(value, noise):
    bits = value.to(tl.int32, bitcast=True)
    high = tl.where((bits & 0x7FFFFFFF) < 0x7F800000, bits + noise.to(tl.int32), bits) >> 16
    return high.to(tl.int16)
