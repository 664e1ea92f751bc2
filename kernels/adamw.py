"""AdamW (Loshchilov and Hutter 2019, https://arxiv.org/abs/1711.05101, algorithm 2) with exact float32 master weights.

A bfloat16 parameter is stored with the 16 bits that rounding cut off, together the float32 master bit for bit, in 2 + 2 bytes.
The parameter is the master rounded half away from zero: the high half of the bits, plus one where the low half's top bit
is set. That bit tells the way back, so no tie is ambiguous; rounding half to even would not be reversible.
"""

import torch
from torch import Tensor

# Elements of one pass: small enough that a block's arrays stay in the cache between the operations.
_BLOCK = 1 << 18
_QUIET_NAN = 0x7FC0


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
) -> None:
    """One AdamW update in place.

    Args:
        parameter: contiguous; float32 with remainder None, or bfloat16 with its int16 remainder of equal shape.
        gradient: of the parameter's shape, float32 or bfloat16. exp_avg, exp_avg_sq: float32 moments.
        step: of this update, from 1, for the bias corrections. weight_decay: decoupled, times the learning rate.
        gradient_scale: float32 scalar tensor that multiplies the gradient (the clip factor), read where the data is.
    """
    adamw_reference_(
        parameter, remainder, gradient, exp_avg, exp_avg_sq, learning_rate=learning_rate, betas=betas, eps=eps,
        weight_decay=weight_decay, step=step, gradient_scale=gradient_scale,
    )  # fmt: skip


def adamw_reference_(
    parameter, remainder, gradient, exp_avg, exp_avg_sq, *, learning_rate, betas, eps, weight_decay, step, gradient_scale
) -> None:
    beta1, beta2 = betas
    # Both bias corrections become scalars: m / c1 / (sqrt(v / c2) + eps) = m * (r / c1) / (sqrt(v) + eps * r), r = sqrt(c2).
    root = (1 - beta2**step) ** 0.5
    step_size = learning_rate * root / (1 - beta1**step)
    arrays = [parameter.view(-1), gradient.reshape(-1), exp_avg.view(-1), exp_avg_sq.view(-1)]
    if remainder is not None:
        arrays.append(remainder.view(-1))
    for block in zip(*(array.split(_BLOCK) for array in arrays), strict=True):
        value, grad, first, second = block[:4]
        master = value if remainder is None else join_master(value, block[4])
        grad = grad.float() * gradient_scale
        first.lerp_(grad, 1 - beta1)
        second.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
        if weight_decay:
            master.mul_(1 - learning_rate * weight_decay)
        master.addcdiv_(first, second.sqrt().add_(eps * root), value=-step_size)
        if remainder is not None:
            rounded, low = split_master(master)
            value.copy_(rounded)
            block[4].copy_(low)


def gradient_norm(gradients: list[Tensor]) -> Tensor:
    """Euclidean norm of all gradients together, a float32 scalar: squares and sums in float32, added in the list's order."""
    return torch.stack([gradient.float().square().sum() for gradient in gradients]).sum().sqrt()
