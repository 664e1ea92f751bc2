"""The norm of all gradients, against torch in float64."""

import pytest
import torch

import kernels.gradient_norm as module
from kernels.configurations import Configuration
from kernels.gradient_norm import gradient_norm, gradient_norm_reference
from tests.kernels.error_rule import random
from tests.kernels.last_program import launch_last_program, vast

SHAPES = [(7, 5), (0, 3), (11,), (3, 16384 // 2), (), (1, 1)]
# These kernels convert bfloat16 by integer operations, which are right in the interpreter too.
ALL_DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])


def gradients(dtype, device):
    return [random(*shape, dtype=dtype, device=device, seed=seed) for seed, shape in enumerate(SHAPES)]


def exact(tensors):
    return torch.cat([tensor.double().flatten() for tensor in tensors]).norm()


@ALL_DTYPES
def test_the_norm_is_right(dtype, device):
    given = gradients(dtype, device)
    norm = gradient_norm(given, given[0].device)
    assert norm.dtype == torch.float32
    assert norm.device == given[0].device
    torch.testing.assert_close(norm.double(), exact(given), rtol=1e-6, atol=0)
    torch.testing.assert_close(norm, gradient_norm_reference(given, given[0].device), rtol=1e-6, atol=0)


def test_more_sums_than_the_second_stage_holds_at_once_are_added(device, monkeypatch):
    monkeypatch.setattr(module, "configuration", lambda kernel, _: Configuration(block=8 if "total" in kernel else 32))
    given = [random(elements, dtype=torch.float32, device=device, seed=elements) for elements in (500, 32, 65)]
    torch.testing.assert_close(gradient_norm(given, given[0].device).double(), exact(given), rtol=1e-6, atol=0)


def test_the_square_of_the_norm_may_exceed_float32(device):
    given = [torch.tensor([1.7e19], device=device)] * 3
    torch.testing.assert_close(gradient_norm(given, given[0].device).double(), exact(given), rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("value", [float("inf"), -float("inf"), float("nan")])
def test_gradients_that_are_not_finite_show(dtype, value, device):
    given = [random(5, dtype=dtype, device=device, seed=seed) for seed in range(3)]
    given[1][3] = value
    norm = gradient_norm(given, given[0].device)
    assert norm.isnan() if value != value else norm == float("inf")


def test_no_gradients_have_norm_0(device):
    assert gradient_norm([], device) == 0
    assert gradient_norm([], torch.device("meta")).device.type == "meta"
    assert gradient_norm([torch.empty(0, device=device), torch.empty(3, 0, device=device)], device) == 0


def test_strides_do_not_change_the_norm(device):
    given = random(6, 9, dtype=torch.float32, device=device, seed=0)
    others = [given.T.contiguous().T, torch.stack((given, given), dim=2)[..., 0], given]
    norms = [gradient_norm([other, other[:, 3:]], device) for other in others]
    assert norms[0] == norms[1] == norms[2]


@ALL_DTYPES
def test_two_runs_give_the_same_bits(dtype, device):
    given = gradients(dtype, device)
    assert torch.equal(gradient_norm(given, given[0].device), gradient_norm(given, given[0].device))


def test_more_than_2_to_the_31_elements_are_summed(triton_device, monkeypatch):
    monkeypatch.setattr(module, "launch", launch_last_program)
    last = random(20, dtype=torch.bfloat16, device=triton_device, seed=0)
    long = vast(2**31 + 20, torch.bfloat16, triton_device)
    long[-20:] = last
    assert gradient_norm([long], triton_device) == gradient_norm([last], triton_device)


def test_the_custom_operator_passes_torchs_checks(triton_device):
    torch.library.opcheck(module._norm.registered, (gradients(torch.float32, triton_device)[:3],))
