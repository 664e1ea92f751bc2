"""Exact masters, and AdamW against torch's."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kernels.adamw import adamw_, gradient_norm, join_master, split_master

SETTINGS = {"betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}
SPECIAL = [0x00000000, 0x80000000, 0x00000001, 0x80000001, 0x007FFFFF, 0x7F7FFFFF, 0x7F7F8000, 0x7F7F7FFF, 0xFF7FFFFF,
           0x7F800000, 0xFF800000, 0x3F808000, 0x3F818000, 0x3F807FFF]  # fmt: skip


def _floats(patterns):
    signed = [pattern - 2**32 if pattern >= 2**31 else pattern for pattern in patterns]
    return torch.tensor(signed, dtype=torch.int32).view(torch.float32)


@given(st.lists(st.integers(0, 2**32 - 1), min_size=1, max_size=50))
def test_split_is_reversible(patterns):
    master = _floats(SPECIAL + patterns)
    parameter, remainder = split_master(master)
    back = join_master(parameter, remainder)
    number = ~master.isnan()
    assert torch.equal(back.view(torch.int32)[number], master.view(torch.int32)[number])
    assert back[~number].isnan().all()
    assert parameter[~number].isnan().all()
    assert not parameter[number].isnan().any()


@given(st.floats(width=32, allow_nan=False, allow_infinity=False))
def test_parameter_is_the_nearest_bfloat16(value):
    master = torch.tensor([value], dtype=torch.float32)
    parameter, _ = split_master(master)
    nearest = master.bfloat16()
    error, least = (parameter.double() - master.double()).abs(), (nearest.double() - master.double()).abs()
    # Ties may go either way: half away from zero is as near as torch's half to even.
    assert error.item() == least.item() or (parameter.isinf() and nearest.isinf())


def _run(parameter, remainder, gradients, scale):
    first, second = torch.zeros_like(parameter, dtype=torch.float32), torch.zeros_like(parameter, dtype=torch.float32)
    for step, gradient in enumerate(gradients, start=1):
        adamw_(parameter, remainder, gradient, first, second, learning_rate=1e-2 / step, step=step,
               gradient_scale=torch.tensor(scale), **SETTINGS)  # fmt: skip
    return first, second


def test_equals_torch():
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(1000, generator=generator)
    gradients = [torch.randn(1000, generator=generator) for _ in range(30)]
    ours = start.clone()
    _run(ours, None, gradients, 0.5)
    exact = torch.nn.Parameter(start.double())
    theirs = torch.optim.AdamW([exact], **SETTINGS)
    for step, gradient in enumerate(gradients, start=1):
        theirs.param_groups[0]["lr"] = 1e-2 / step
        exact.grad = gradient.double() * 0.5
        theirs.step()
    torch.testing.assert_close(ours.double(), exact.detach(), rtol=1e-5, atol=1e-7)


def test_split_masters_follow_the_float32_trajectory_bit_for_bit():
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(513, generator=generator)
    gradients = [torch.randn(513, generator=generator).bfloat16() * 1e-3 for _ in range(100)]
    master = start.clone()
    parameter, remainder = split_master(start)
    expected = _run(master, None, gradients, 1.0)
    moments = _run(parameter, remainder, gradients, 1.0)
    assert torch.equal(join_master(parameter, remainder), master)
    assert torch.equal(parameter, split_master(master)[0])
    assert all(torch.equal(one, other) for one, other in zip(moments, expected, strict=True))
    assert not torch.equal(master.bfloat16(), start.bfloat16())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradient_norm(dtype):
    gradients = [torch.randn(shape).to(dtype) for shape in ((7, 5), (11,), (1, 1))]
    expected = torch.cat([gradient.double().flatten() for gradient in gradients]).norm()
    torch.testing.assert_close(gradient_norm(gradients).double(), expected, rtol=1e-6, atol=0)
