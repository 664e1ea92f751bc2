"""RMS norm against torch's own in float64, forward and backward."""

import pytest
import torch
import torch.nn.functional as F

from kernels.rms_norm import add_rms_norm, rms_norm

EPS = 1e-5


def _inputs(rows, width, dtype, seed=0):
    generator = torch.Generator().manual_seed(seed)
    hidden, weight, grad = (
        torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)
        for shape in ((rows, width), (width,), (rows, width))
    )
    return hidden.requires_grad_(), weight.requires_grad_(), grad


@pytest.mark.parametrize(("rows", "width"), [(1, 8), (127, 96), (129, 33), (0, 16)])
def test_equals_torch_in_float64(rows, width):
    hidden, weight, grad = _inputs(rows, width, torch.float64)
    out = rms_norm(hidden, weight, EPS)
    expected = F.rms_norm(hidden, (width,), weight, EPS)
    torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)
    ours = torch.autograd.grad(out, (hidden, weight), grad)
    torch.testing.assert_close(ours, torch.autograd.grad(expected, (hidden, weight), grad), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rounds_once(dtype):
    hidden, weight, _ = _inputs(65, 48, dtype)
    exact = F.rms_norm(hidden.double(), (48,), weight.double(), EPS)
    # Half a unit in the last place of the result, and a little for the statistics in float32.
    bound = exact.abs() * torch.finfo(dtype).eps * (0.5 if dtype == torch.bfloat16 else 4) * 1.01 + 1e-30
    assert ((rms_norm(hidden, weight, EPS).double() - exact).abs() <= bound).all()


def test_added_residual_is_normed_as_rounded():
    hidden, weight, _ = _inputs(9, 16, torch.bfloat16)
    residual = torch.randn(9, 16).bfloat16()
    total, normed = add_rms_norm(residual, hidden, weight, EPS)
    assert torch.equal(total, residual + hidden)
    assert torch.equal(normed, rms_norm(total, weight, EPS))
