"""SwiGLU against its formula in float64."""

import pytest
import torch

from kernels.swiglu import swiglu


@pytest.mark.parametrize(("rows", "width"), [(1, 4), (33, 17), (0, 8)])
def test_equals_formula_and_gradient(rows, width):
    packed = torch.randn(rows, 2 * width, dtype=torch.float64, requires_grad=True)
    gate, up = packed[:, :width], packed[:, width:]
    expected = gate / (1 + (-gate).exp()) * up
    grad = torch.randn(rows, width, dtype=torch.float64)
    out = swiglu(packed)
    torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)
    (ours,), (theirs,) = torch.autograd.grad(out, packed, grad), torch.autograd.grad(expected, packed, grad)
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


def test_bfloat16_is_computed_in_float32():
    packed = torch.randn(40, 64).bfloat16()
    assert torch.equal(swiglu(packed), swiglu(packed.float()).bfloat16())
