"""RMS norm, with and without the residual's addition, forward and backward, against torch in float64."""

import pytest
import torch
import torch.nn.functional as F

import kernels.rms_norm as module
from kernels.rms_norm import add_rms_norm, rms_norm
from tests.kernels.error_rule import check, compare, far_apart, random

EPS = 1e-5
SHAPES = [(1, 8), (5, 96), (37, 33), (0, 16)]


def inputs(rows, width, dtype, device):
    """(residual, hidden, weight), (gradient of the sum, gradient of the norm)."""
    shapes = ((rows, width), (rows, width), (width,), (rows, width), (rows, width))
    made = [random(*shape, dtype=dtype, device=device, seed=seed) for seed, shape in enumerate(shapes)]
    return [tensor.requires_grad_() for tensor in made[:3]], made[3:]


def plain_norm(hidden, weight):
    return F.rms_norm(hidden, weight.shape, weight, EPS)


def plain_add_norm(residual, hidden, weight):
    total = residual + hidden
    return total, plain_norm(total, weight)


@pytest.mark.parametrize(("rows", "width"), SHAPES)
def test_the_norm_is_right(rows, width, dtype, device):
    (_, hidden, weight), (_, grad) = inputs(rows, width, dtype, device)
    sums = {"d weight": max(1, rows)}
    compare(lambda *given: rms_norm(*given, EPS), plain_norm, {"hidden": hidden, "weight": weight}, {"out": grad}, sums)


@pytest.mark.parametrize(("rows", "width"), SHAPES)
def test_the_norm_of_a_sum_is_right(rows, width, dtype, device):
    tensors, upstream = inputs(rows, width, dtype, device)
    given = dict(zip(("residual", "hidden", "weight"), tensors, strict=True))
    grads = dict(zip(("total", "out"), upstream, strict=True))
    compare(lambda *given: add_rms_norm(*given, EPS), plain_add_norm, given, grads, {"d weight": max(1, rows)})


@pytest.mark.parametrize(("rows", "width"), [(1, 8), (127, 96), (129, 33), (0, 16)])
def test_equals_torch_in_float64(rows, width, reference_device):
    tensors, upstream = inputs(rows, width, torch.float64, reference_device)
    ours, theirs = add_rms_norm(*tensors, EPS), plain_add_norm(*tensors)
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    found, expected = (torch.autograd.grad(outputs, tensors, upstream) for outputs in (ours, theirs))
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("rows", [1, 32, 70])
def test_all_programs_parts_of_the_weights_gradient_are_summed(rows, triton_device):
    partial = random(rows, 100, dtype=torch.float32, device=triton_device, seed=0)
    check("sum", module.sum_rows(partial, torch.float32), partial.double().sum(dim=0), partial.sum(dim=0), sums=rows)


def test_the_rounded_sum_is_normed(dtype, device):
    (residual, hidden, weight), _ = inputs(9, 40, dtype, device)
    total, normed = add_rms_norm(residual, hidden, weight, EPS)
    assert torch.equal(total, residual + hidden)
    assert torch.equal(normed, rms_norm(total, weight, EPS))


def test_strides_do_not_change_results(device):
    """Rows inside a wider matrix, transposed inputs, and the gradient of a sum, whose strides are 0."""
    (residual, hidden, weight), _ = inputs(12, 20, torch.float32, device)

    def results(residual, hidden, weight):
        given = [tensor.detach().requires_grad_() for tensor in (residual, hidden, weight)]
        total, normed = add_rms_norm(*given, EPS)
        row = torch.arange(12.0, device=device)[:, None]
        return total, normed, *torch.autograd.grad(total.sum() + (normed * row).sum() + normed[:, 0].sum(), given)

    expected = results(residual, hidden, weight)
    wide = torch.cat((residual, residual), dim=1)[:, :20]
    turned = hidden.detach().T.contiguous().T
    spread = torch.stack((weight, weight), dim=1)[:, 0]
    assert not wide.is_contiguous()
    assert turned.stride(-1) != 1
    assert spread.stride(0) == 2
    for found, right in zip(results(wide, turned, spread), expected, strict=True):
        assert torch.equal(found, right)


def test_two_runs_give_the_same_bits(dtype, device):
    tensors, upstream = inputs(9, 40, dtype, device)
    runs = []
    for _ in range(2):
        outputs = add_rms_norm(*tensors, EPS)
        runs.append([*outputs, *torch.autograd.grad(outputs, tensors, upstream)])
    assert all(torch.equal(one, other) for one, other in zip(*runs, strict=True))


def test_offsets_beyond_31_bits_are_right(triton_device):
    (residual, hidden, weight), (grad_total, grad) = inputs(3, 24, torch.float16, triton_device)
    tensors = [residual.detach(), hidden.detach()]
    near = module.add_norm_forward(*tensors, weight, EPS)
    far = module.add_norm_forward(*map(far_apart, tensors), weight, EPS)
    assert all(torch.equal(one, other) for one, other in zip(near, far, strict=True))
    total, _, scale = near
    near = module.norm_backward(grad, grad_total, total, weight, scale)
    for number in range(3):
        given = [far_apart(tensor) if i == number else tensor for i, tensor in enumerate((grad, grad_total, total))]
        far = module.norm_backward(*given, weight, scale)
        assert all(torch.equal(one, other) for one, other in zip(near, far, strict=True))


def test_custom_operators_pass_torchs_checks(triton_device):
    (residual, hidden, weight), (grad_total, grad) = inputs(3, 24, torch.float32, triton_device)
    torch.library.opcheck(module._norm.registered, (hidden, weight, EPS))
    torch.library.opcheck(module._add_norm.registered, (residual, hidden, weight, EPS))
    plain = [tensor.detach() for tensor in (hidden, weight)]
    scale = module.norm_forward(*plain, EPS)[1]
    torch.library.opcheck(module._norm_backward.registered, (grad, None, *plain, scale))
    torch.library.opcheck(module._norm_backward.registered, (grad, grad_total, *plain, scale))
