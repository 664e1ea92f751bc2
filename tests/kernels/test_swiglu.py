"""SwiGLU forward and backward, in place and not, against its formula in float64."""

import pytest
import torch
import torch.nn.functional as F

import kernels.swiglu as module
from kernels.launch import runs_triton
from kernels.swiglu import swiglu, swiglu_backward_
from tests.kernels.error_rule import check, compare, far_apart, random


def inputs(rows, width, dtype, device):
    """(gate and up, gradient of the product)."""
    return (
        random(rows, 2 * width, dtype=dtype, device=device, seed=0, scale=2.0),
        random(rows, width, dtype=dtype, device=device, seed=1),
    )


def plain(packed):
    gate, up = packed.chunk(2, dim=-1)
    return F.silu(gate) * up


@pytest.mark.parametrize("emit", [False, True])
def test_gradients_in_place_equal_the_operators(emit, dtype, device):
    packed, grad = inputs(5, 33, dtype, device)
    given = packed.clone().requires_grad_()
    product = swiglu(given)
    (expected,) = torch.autograd.grad(product, given, grad)
    emitted = swiglu_backward_(packed, grad, emit=emit)
    if runs_triton(packed):
        assert torch.equal(packed, expected)
    else:
        # The reference's gradient comes from autograd, which multiplies in another order.
        wide = given.detach().double().requires_grad_()
        check("d packed", packed, torch.autograd.grad(plain(wide), wide, grad.double())[0], expected)
    assert (emitted is None) == (not emit)
    assert emitted is None or torch.equal(emitted, product)


@pytest.mark.parametrize(("rows", "width"), [(1, 4), (3, 2085), (2, 2048), (9, 17), (5, 8), (0, 8)])
def test_results_and_gradients_are_right(rows, width, dtype, device):
    packed, grad = inputs(rows, width, dtype, device)
    compare(swiglu, plain, {"packed": packed.requires_grad_()}, {"out": grad})


@pytest.mark.parametrize(("rows", "width"), [(1, 4), (33, 17), (0, 8)])
def test_equals_formula_and_gradient_in_float64(rows, width, reference_device):
    packed, grad = inputs(rows, width, torch.float64, reference_device)
    packed.requires_grad_()
    gate, up = packed[:, :width], packed[:, width:]
    expected = gate / (1 + (-gate).exp()) * up
    out = swiglu(packed)
    torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)
    (ours,), (theirs,) = torch.autograd.grad(out, packed, grad), torch.autograd.grad(expected, packed, grad)
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    overwritten = packed.detach().clone()
    swiglu_backward_(overwritten, grad, emit=False)
    torch.testing.assert_close(overwritten, theirs, rtol=1e-12, atol=1e-12)


def test_saturated_gates_are_right(device):
    packed = torch.tensor([[-100.0, 100.0, 0.0, -0.0, 1e-30, 2.0, 3.0, 4.0, 5.0, 6.0]], device=device)
    out = swiglu(packed)
    torch.testing.assert_close(out, plain(packed), rtol=1e-6, atol=1e-30)
    swiglu_backward_(packed, torch.ones_like(out), emit=False)
    assert packed.isfinite().all()


def test_the_product_is_computed_in_float32(dtype, device):
    packed, _ = inputs(40, 32, dtype, device)
    assert torch.equal(swiglu(packed), swiglu(packed.float()).to(dtype))


def test_strides_do_not_change_results(device):
    packed, grad = inputs(6, 12, torch.float32, device)

    def results(packed, grad):
        packed = packed.requires_grad_()
        out = swiglu(packed)
        return out, *torch.autograd.grad(out, packed, grad, retain_graph=True), *torch.autograd.grad(out.sum(), packed)

    expected = results(packed, grad)
    strided = torch.stack((packed.detach(), packed.detach()), dim=1)[:, 0]
    turned = packed.detach().T.contiguous().T
    for one, other in ((strided, grad), (turned, grad), (packed.detach(), grad.T.contiguous().T)):
        assert not one.is_contiguous() or not other.is_contiguous()
        # torch's exponential of a strided vector may differ in its last bit.
        torch.testing.assert_close(results(one, other), expected, rtol=1e-6, atol=1e-7)
    overwritten = strided.detach().clone(memory_format=torch.preserve_format)
    swiglu_backward_(overwritten, grad, emit=False)
    torch.testing.assert_close(overwritten, expected[1])


def test_offsets_beyond_31_bits_are_right(triton_device):
    packed, grad = inputs(3, 12, torch.float16, triton_device)
    out = swiglu(packed)
    assert torch.equal(swiglu(far_apart(packed)), out)
    expected = module._swiglu_backward(packed, grad)
    assert torch.equal(module._swiglu_backward(far_apart(packed), grad), expected)
    assert torch.equal(module._swiglu_backward(packed, far_apart(grad)), expected)
    far = far_apart(packed)
    assert torch.equal(swiglu_backward_(far, grad, emit=True), out)
    assert torch.equal(far, expected)


def test_two_runs_give_the_same_bits(dtype, device):
    packed, grad = inputs(9, 40, dtype, device)
    packed.requires_grad_()
    runs = [[out := swiglu(packed), *torch.autograd.grad(out, packed, grad)] for _ in range(2)]
    assert all(torch.equal(one, other) for one, other in zip(*runs, strict=True))


def test_custom_operators_pass_torchs_checks(triton_device):
    packed, grad = inputs(3, 12, torch.float32, triton_device)
    torch.library.opcheck(module._swiglu_backward.registered, (packed, grad))
    torch.library.opcheck(module._swiglu_backward_.registered, (packed.clone(), grad, True))
    torch.library.opcheck(module._swiglu_backward_.registered, (packed.clone(), grad, False))
    torch.library.opcheck(module._swiglu.registered, (packed.requires_grad_(),))
