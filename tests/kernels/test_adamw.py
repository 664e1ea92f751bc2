"""Exact masters, and AdamW against torch's: kernel and eager reference give the same bits, torch's fused operator nearly so."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import kernels.adamw as module
from kernels.adamw import adamw_, adamw_reference_, join_master, split_master
from tests.kernels.last_program import launch_last_program, vast

SETTINGS = {"betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}
# Zeros, denormals, the largest numbers, infinities, ties.
SPECIAL = [0x00000000, 0x80000000, 0x00000001, 0x80000001, 0x007FFFFF]
SPECIAL += [0x7F7FFFFF, 0x7F7F8000, 0x7F7F7FFF, 0xFF7FFFFF, 0x7F800000, 0xFF800000, 0x3F808000, 0x3F818000, 0x3F807FFF]
NANS = [0x7FC00000, 0xFFC00000, 0x7F800001, 0x7FFFFFFF, 0xFFFFFFFF]
FLOATS = [torch.float32, torch.bfloat16]
# The interpreter computes with NumPy, which warns.
NO_WARNINGS = pytest.mark.filterwarnings("ignore:invalid value encountered")


def _floats(patterns):
    signed = [pattern - 2**32 if pattern >= 2**31 else pattern for pattern in patterns]
    return torch.tensor(signed, dtype=torch.int32).view(torch.float32)


def state(shape, device, parameter=torch.bfloat16, gradient=torch.bfloat16, moments=torch.bfloat16):
    """(parameter, remainder, gradient, exp_avg, exp_avg_sq): the same values for all dtypes."""
    generator = torch.Generator().manual_seed(0)
    master, grad, first, second = (torch.randn(shape, generator=generator) for _ in range(4))
    value, remainder = split_master(master) if parameter == torch.bfloat16 else (master, None)
    tensors = value, remainder, grad.to(gradient), first.to(moments), second.square().to(moments)
    return [None if tensor is None else tensor.to(device) for tensor in tensors]


def update_(tensors, function=adamw_, **changes):
    if "gradient_scale" not in changes:
        changes["gradient_scale"] = torch.tensor(0.3, device=tensors[0].device)
    settings = {"learning_rate": 1e-2, "step": 3, "seed": 11, "parameter_id": 5, **SETTINGS}
    function(*tensors, **(settings | changes))


def updated(tensors, function=adamw_, **changes):
    """Copies of the tensors after an update."""
    tensors = [None if tensor is None else tensor.clone() for tensor in tensors]
    update_(tensors, function, **changes)
    return tensors


def same(one, other):
    """Whether all tensors hold the same bits."""
    return all(
        a is b is None or torch.equal(a.cpu().contiguous().view(torch.uint8), b.cpu().contiguous().view(torch.uint8))
        for a, b in zip(one, other, strict=True)
    )


@pytest.mark.parametrize("moments", FLOATS)
@pytest.mark.parametrize("gradient", FLOATS)
@pytest.mark.parametrize("parameter", FLOATS)
def test_kernel_and_reference_give_the_same_bits(parameter, gradient, moments, triton_device):
    """In whole programs and in programs cut at either end."""
    for elements, first_index in ((1030, 0), (2060, 2**33 + 5), (3, 2)):
        tensors = state(elements, "cpu", parameter, gradient, moments)
        expected = updated(tensors, adamw_reference_, first_index=first_index)
        given = [None if tensor is None else tensor.to(triton_device) for tensor in tensors]
        assert same(updated(given, first_index=first_index), expected)


def test_a_scale_of_0_still_decays_weights_and_moments(triton_device):
    """Only a negative scale skips the update."""
    zero = torch.zeros((), device=triton_device)
    tensors = state(1030, "cpu")
    expected = updated(tensors, adamw_reference_, gradient_scale=zero.cpu())
    assert not same(expected, tensors)
    assert same(updated([tensor.to(triton_device) for tensor in tensors], gradient_scale=zero), expected)


@pytest.mark.parametrize("moments", FLOATS)
@pytest.mark.parametrize("parameter", FLOATS)
def test_a_negative_scale_changes_nothing(parameter, moments, device):
    tensors = state(1030, device, parameter, moments=moments)
    assert same(updated(tensors, gradient_scale=torch.tensor(-1.0, device=device)), tensors)


@NO_WARNINGS
@pytest.mark.parametrize("moments", FLOATS)
def test_a_rate_of_0_keeps_every_kind_of_number(moments, device):
    """No bit changes; a NaN stays a NaN."""
    master = _floats(SPECIAL + NANS).to(device)
    zero = torch.zeros(len(master), dtype=moments, device=device)
    for tensors in ([*split_master(master), zero, zero, zero], [master, None, zero, zero, zero]):
        parameter, remainder, *_ = updated(tensors, learning_rate=0.0)
        back = parameter if remainder is None else join_master(parameter, remainder)
        assert torch.equal(back[: len(SPECIAL)].view(torch.int32), master[: len(SPECIAL)].view(torch.int32))
        assert back[len(SPECIAL) :].isnan().all()
        assert parameter[len(SPECIAL) :].isnan().all()


@NO_WARNINGS
@pytest.mark.parametrize("moments", FLOATS)
@pytest.mark.parametrize("parameter", FLOATS)
def test_non_finite_gradients_reach_moments_and_parameter(parameter, moments, device):
    tensors = state(2 + len(NANS), device, parameter, torch.float32, moments)
    tensors[2] = _floats([0x7F800000, 0xFF800000, *NANS]).to(device)
    value, _, _, first, second = updated(tensors)
    assert first[:2].tolist() == [float("inf"), -float("inf")]
    assert second[:2].tolist() == [float("inf")] * 2
    assert all(tensor[2:].isnan().all() for tensor in (first, second))
    assert value.isnan().all()


@pytest.mark.parametrize("parameter", FLOATS)
def test_shards_round_as_the_whole_does(parameter, device):
    """The shards share one memory, so a write into a neighbour would show."""
    tensors = state(1050, device, parameter)
    whole = updated(tensors)
    for start, stop in itertools.pairwise((0, 5, 8, 21, 1047, 1050)):
        shard = [None if tensor is None else tensor[start:stop] for tensor in tensors]
        update_(shard, first_index=start)
    assert same(tensors, whole)


def test_rounding_is_keyed_by_seed_step_parameter_and_index(device):
    tensors = state(64, device)
    keys = [{}, {"seed": 12}, {"seed": -11}, {"step": 4}, {"parameter_id": 6}]
    keys += [{"first_index": index} for index in (1, 4, 64, 2**31, 2**32, 2**33, 2**34, 2**40)]
    # Before rounding, the moments depend on none of these.
    moments = [updated(tensors, **key)[3:] for key in keys]
    for number in range(2):
        found = {tuple(pair[number].view(torch.int16).tolist()) for pair in moments}
        assert len(found) == len(keys)
    # Seed and parameter count with 32 bits.
    assert same(updated(tensors), updated(tensors, seed=11 + 2**32, parameter_id=5 - 2**32))


@pytest.mark.parametrize("share", [0.0, 0.25, 0.9])
def test_rounding_keeps_the_mean(share, device):
    """The nearer a value is to its upper neighbour, the more often it is rounded up; elements and moments are independent."""
    count = 4096
    # The next bfloat16 above 1 is 1/128 away. With betas of 0, the moments are the gradient and its square.
    gradient = torch.full((count,), -(1 + share / 128), device=device)
    tensors = [*split_master(gradient), gradient, *torch.zeros(2, count, device=device).bfloat16()]
    moments = updated(tensors, betas=(0.0, 0.0), gradient_scale=torch.ones((), device=device))[3:]
    rounded_up = []
    for moment, exact in zip(moments, (gradient, gradient.square()), strict=True):
        exact = exact[0].double().abs().item()
        steps = (moment.double().abs().cpu() - exact) * 128
        chance = exact * 128 % 1
        assert set(steps.tolist()) == ({0.0} if chance == 0 else {-chance, 1 - chance})
        assert abs(steps.mean()) <= 4 * (chance * (1 - chance) / count) ** 0.5
        rounded_up += [(steps > 0).double()[word::4] for word in range(4)]
    if share:
        correlated = torch.corrcoef(torch.stack(rounded_up)) - torch.eye(8)
        assert correlated.abs().max() < 4 / (count / 4) ** 0.5


def _run(parameter, remainder, gradients, scale, moments=torch.float32, function=adamw_):
    first, second = torch.zeros_like(parameter, dtype=moments), torch.zeros_like(parameter, dtype=moments)
    scale = torch.tensor(scale, device=parameter.device)
    for step, gradient in enumerate(gradients, start=1):
        tensors = (parameter, remainder, gradient, first, second)
        function(*tensors, learning_rate=1e-2 / step, step=step, gradient_scale=scale, **SETTINGS)
    return first, second


@pytest.mark.parametrize(("moments", "steps"), [(torch.float32, 30), (torch.bfloat16, 20)])
def test_split_masters_follow_the_float32_trajectory_bit_for_bit(moments, steps, device):
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(513, generator=generator).to(device)
    gradients = [(torch.randn(513, generator=generator).bfloat16() * 1e-3).to(device) for _ in range(steps)]
    master = start.clone()
    parameter, remainder = split_master(start)
    expected = _run(master, None, gradients, 1.0, moments)
    found = _run(parameter, remainder, gradients, 1.0, moments)
    assert torch.equal(join_master(parameter, remainder), master)
    assert torch.equal(parameter, split_master(master)[0])
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
    assert not torch.equal(master.bfloat16(), start.bfloat16())


@pytest.mark.parametrize("function", [adamw_, adamw_reference_])
@pytest.mark.parametrize("split", [False, True])
def test_the_trajectory_is_torchs_in_float64(split, function, device):
    """For the public function, which is torch's fused operator on a CPU, and for the reference."""
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(1000, generator=generator).to(device)
    gradients = [torch.randn(1000, generator=generator).to(device) for _ in range(30)]
    ours, remainder = split_master(start) if split else (start.clone(), None)
    _run(ours, remainder, gradients, 0.5, function=function)
    exact = torch.nn.Parameter(start.double())
    theirs = torch.optim.AdamW([exact], **SETTINGS)
    for step, gradient in enumerate(gradients, start=1):
        theirs.param_groups[0]["lr"] = 1e-2 / step
        exact.grad = gradient.double() * 0.5
        theirs.step()
    master = join_master(ours, remainder) if split else ours
    torch.testing.assert_close(master.double(), exact.detach(), rtol=1e-5, atol=1e-7)


def test_masters_of_several_blocks_follow_the_float32_trajectory(monkeypatch):
    """On a CPU a split master is updated block by block, a float32 parameter in one pass: the bits are the same."""
    monkeypatch.setattr(module, "_BLOCK", 64)
    master, _, *others = state(333, "cpu", torch.float32, torch.float32, torch.float32)
    whole = updated([master, None, *others])
    parameter, remainder, *moments = updated([*split_master(master), *others])
    assert torch.equal(join_master(parameter, remainder), whole[0])
    assert same(moments[1:], whole[3:])


@pytest.mark.parametrize("moments", FLOATS)
def test_two_runs_are_equal_to_the_bit(moments, device):
    tensors = state((30, 40), device, moments=moments)
    assert same(updated(tensors), updated(tensors))


@pytest.mark.parametrize("moments", FLOATS)
def test_the_gradients_layout_does_not_matter(moments, device):
    tensors = state((30, 40), device, moments=moments)
    for gradient in (tensors[2].T.contiguous().T, torch.stack((tensors[2], tensors[2]), dim=2)[..., 0]):
        assert not gradient.is_contiguous()
        given = [tensor.clone() for tensor in tensors]
        given[2] = gradient
        update_(given)
        assert same(given, updated(tensors))


def test_an_empty_shard_stays_empty(device):
    for moments in FLOATS:
        assert all(tensor.shape == (0, 3) for tensor in updated(state((0, 3), device, moments=moments), first_index=2))


def test_unsuitable_tensors_are_refused(device):
    good = dict(zip(("parameter", "remainder", "gradient", "exp_avg", "exp_avg_sq"), state((4, 6), device), strict=True))
    half = good["parameter"].half()
    for changes, message in [
        ({"parameter": half}, r"parameter torch.float16, gradient torch.bfloat16: each must be float32 or bfloat16"),
        ({"gradient": half}, r"gradient torch.float16: each must be float32 or bfloat16"),
        ({"exp_avg": half}, r"moments torch.float16 and torch.bfloat16: must be both float32 or both bfloat16"),
        ({"exp_avg_sq": half.float()}, r"moments torch.bfloat16 and torch.float32: must be both"),
        ({"remainder": None}, r"remainder None of a torch.bfloat16 parameter: must be torch.int16"),
        ({"parameter": half.float()}, r"remainder torch.int16 of a torch.float32 parameter: must be None"),
        ({"gradient": good["gradient"][:3]}, r"gradient \[3, 6\]: must have the parameter's shape, \[4, 6\]"),
        (
            {"exp_avg": good["exp_avg"].T.contiguous().T},
            r"exp_avg has strides \(1, 4\): is updated in place",
        ),
        (
            {"remainder": good["remainder"].T.contiguous().T},
            r"remainder has strides \(1, 4\): is updated in place",
        ),
    ]:
        with pytest.raises(ValueError, match=message):
            adamw_(*{**good, **changes}.values(), learning_rate=1.0, step=1, gradient_scale=torch.ones(()), **SETTINGS)
    for scale in (torch.ones(2), torch.ones((), dtype=torch.float64)):
        with pytest.raises(ValueError, match="must be a single float32 number"):
            adamw_(*good.values(), learning_rate=1.0, step=1, gradient_scale=scale, **SETTINGS)


def test_indices_beyond_31_bits_are_right(triton_device, monkeypatch):
    monkeypatch.setattr(module, "launch", launch_last_program)
    last = state(12, triton_device)
    long = [vast(2**31 + 12, tensor.dtype, triton_device) for tensor in last]
    for tensor, end in zip(long, last, strict=True):
        tensor[-12:] = end
    update_(long)
    update_(last, first_index=2**31)
    assert same([tensor[-12:] for tensor in long], last)


@pytest.mark.parametrize("moments", FLOATS)
@pytest.mark.parametrize("parameter", FLOATS)
def test_the_custom_operator_passes_torchs_checks(parameter, moments, triton_device):
    scale = torch.ones((), device=triton_device)
    torch.library.opcheck(
        module._adamw.registered,
        (*state((3, 7), triton_device, parameter, moments=moments), scale, 1e-2, 0.9, 0.95, 1e-8, 0.1, 3, 1, 2, 5),
    )


def test_the_host_never_waits(triton_device):
    """On a GPU torch reports every wait; the interpreter has nothing to wait for."""
    tensors, scale = state(100, triton_device), torch.ones((), device=triton_device)
    # Compiling may wait.
    update_(tensors, gradient_scale=scale)
    on_gpu = triton_device.type == "cuda"
    if on_gpu:
        torch.cuda.set_sync_debug_mode("error")
    try:
        update_(tensors, gradient_scale=scale)
    finally:
        if on_gpu:
            torch.cuda.set_sync_debug_mode("default")


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
def test_the_parameter_is_the_nearest_bfloat16(value):
    master = torch.tensor([value], dtype=torch.float32)
    parameter, _ = split_master(master)
    nearest = master.bfloat16()
    error, least = (parameter.double() - master.double()).abs(), (nearest.double() - master.double()).abs()
    # At a tie both neighbours are equally near: torch rounds half to even, we round half away from zero.
    assert error.item() == least.item() or (parameter.isinf() and nearest.isinf())
