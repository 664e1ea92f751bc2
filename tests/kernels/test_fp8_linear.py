"""Products in FP8: against torch._scaled_mm, the dequantised factors in float64, and the unfused sequence of operators."""

import pytest
import torch

import kernels.fp8_linear as module
from kernels.fp8 import column_codes, matrix_codes, row_codes
from kernels.fp8_feed_forward import fp8_feed_forward
from kernels.fp8_linear import WeightCodes, fp8_linear, product, weight_gradient
from kernels.fp8_norm_qkv import fp8_norm_qkv
from kernels.rms_norm import add_norm_forward, norm_backward, rms_norm_reference
from kernels.rotary import RotaryTable, rotary_reference_, rotary_table
from kernels.swiglu import swiglu, swiglu_backward_, swiglu_reference
from tests.kernels.error_rule import random

EPS = 1e-5
MODES = ("none", "light", "ffn")
WIDTH, INNER, HEADS, SIZE = 32, 48, (4, 2), 16
PACKED = (HEADS[0] + 2 * HEADS[1]) * SIZE
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])


def values_of(codes):
    return codes.code_TK.double() * codes.scale_T.double()[:, None]


def spread(tokens, width, seed, deviation):
    """Rows whose sizes are log-normal, with `deviation` of the logarithm."""
    size = random(tokens, 1, dtype=torch.float32, device="cpu", seed=seed, scale=deviation).exp()
    return random(tokens, width, dtype=torch.float32, device="cpu", seed=seed + 1) * size


@DTYPES
@pytest.mark.parametrize("rowwise", [True, False])
def test_products_are_those_of_torchs_own_operator(rowwise, dtype, monkeypatch):
    monkeypatch.setattr(module, "ROWWISE", rowwise)
    left = row_codes(spread(5, 48, 0, 2.0))
    weight, _, scale = matrix_codes(random(32, 48, dtype=dtype, device="cpu", seed=3))
    found = product(left, (weight, scale), dtype)
    one = torch.ones(())
    unscaled = torch._scaled_mm(left.code_TK, weight.T, scale_a=one, scale_b=one, out_dtype=torch.float32)
    assert torch.equal(found, (unscaled * left.scale_T[:, None] * scale).to(dtype))
    if torch.__version__ >= (2, 12):  # on a CPU, torch 2.11 takes one scale alone
        scales = {"scale_a": left.scale_T[:, None], "scale_b": scale.expand(1, 32).contiguous()}
        assert torch.equal(found, torch._scaled_mm(left.code_TK, weight.T, out_dtype=dtype, **scales))


@DTYPES
def test_weight_gradients_are_those_of_torchs_own_operator(dtype):
    rows, grad = row_codes(spread(20, 32, 0, 2.0)), row_codes(spread(20, 16, 2, 2.0))
    columns = column_codes(values_of(rows).float(), rows.scale_T)
    shifted, common = module.shifted_columns(grad, rows.scale_T)
    expected = torch._scaled_mm(shifted, columns.T, scale_a=common[0], scale_b=common[4], out_dtype=dtype)
    assert torch.equal(weight_gradient(grad, columns, rows.scale_T, None, dtype), expected)


def test_both_ways_of_scaling_give_the_same_bits(monkeypatch):
    given = random(7, 32, dtype=torch.bfloat16, device="cpu", seed=0, scale=5.0).requires_grad_()
    weight = random(48, 32, dtype=torch.bfloat16, device="cpu", seed=1).requires_grad_()
    grad = random(7, 48, dtype=torch.bfloat16, device="cpu", seed=2)
    found = []
    for rowwise in (True, False):
        monkeypatch.setattr(module, "ROWWISE", rowwise)
        out = fp8_linear(given, weight, WeightCodes())
        found.append((out, *torch.autograd.grad(out, (given, weight), grad)))
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


def test_results_are_products_of_the_rounded_factors():
    given = spread(24, 32, 0, 2.0).requires_grad_()
    weight = random(48, 32, dtype=torch.float32, device="cpu", seed=3).requires_grad_()
    grad = spread(24, 48, 5, 0.1)
    out = fp8_linear(given, weight, WeightCodes())
    found = [out, *torch.autograd.grad(out, (given, weight), grad)]
    code, _, scale = matrix_codes(weight.detach())
    wide, left, right = code.double() * scale.double(), values_of(row_codes(given.detach())), values_of(row_codes(grad))
    exact = left @ wide.T, right @ wide, right.T @ left
    # Codes of tokens whose share is small lose bits in the third.
    for one, other, tolerance in zip(found, exact, (1e-6, 1e-6, 1e-3), strict=True):
        assert (one.double() - other).norm() <= tolerance * other.norm()


@pytest.mark.parametrize("outliers", [False, True])
def test_gradients_are_off_by_at_most_4_and_a_half_percent(outliers):
    """Gradients of tokens whose sizes spread by a factor of 7 either way, and activations of 60,000."""
    tokens, inputs, outputs = 512, 256, 192
    given = random(tokens, inputs, dtype=torch.bfloat16, device="cpu", seed=0)
    if outliers:
        given[:: tokens // 4, 7] = 60_000
    weight = random(outputs, inputs, dtype=torch.bfloat16, device="cpu", seed=1, scale=0.02)
    grad = spread(tokens, outputs, 3, 2.0).bfloat16()
    given.requires_grad_(), weight.requires_grad_()
    found = torch.autograd.grad(fp8_linear(given, weight, WeightCodes()), (given, weight), grad)
    exact = grad.double() @ weight.double(), grad.double().T @ given.double()
    for one, other in zip(found, exact, strict=True):
        assert 0.01 < (one.double() - other).norm() / other.norm() <= 0.045


def split_gradients(cuts, apply, given, weight, grads):
    """(gradients of the rows, gradient of the weight) where the rows are cut into micro-batches."""
    weight = weight.clone().requires_grad_()
    rows = []
    for start, end in zip((0, *cuts), (*cuts, len(given)), strict=True):
        part = given[start:end].clone().requires_grad_()
        apply(part, weight).backward(grads[start:end])
        rows.append(part.grad)
    return torch.cat(rows), weight.grad


@pytest.mark.parametrize("cuts", [(5,), (16, 17), (1, 8, 30)])
def test_gradients_do_not_depend_on_how_a_step_is_split(cuts):
    """Whole numbers that E4M3 holds, times powers of two: every sum is exact, so products in float32 give the same bits too."""
    draw = torch.Generator().manual_seed(0)
    whole = lambda *shape: torch.randint(-8, 9, shape, generator=draw).float()  # noqa: E731
    power = lambda tokens: torch.randint(-2, 3, (tokens, 1), generator=draw).float().exp2()  # noqa: E731
    given, weight, grads = whole(40, 32) * power(40), whole(16, 32), whole(40, 16) * power(40)
    codes = WeightCodes()
    expected = split_gradients((), torch.nn.functional.linear, given, weight, grads)
    for apply in (torch.nn.functional.linear, lambda rows, weight: fp8_linear(rows, weight, codes)):
        for one, other in zip(split_gradients(cuts, apply, given, weight, grads), expected, strict=True):
            assert torch.equal(one, other)


def test_a_rows_results_do_not_depend_on_its_neighbours():
    """An outlier, a row of NaN: the other rows' outputs and input gradients keep their bits."""
    weight = random(48, 32, dtype=torch.bfloat16, device="cpu", seed=1)
    given, grad = (random(8, width, dtype=torch.bfloat16, device="cpu", seed=width) for width in (32, 48))
    wrong, wrong_grad = given.clone(), grad.clone()
    wrong[2, 5], wrong[6, 1], wrong_grad[2, 0], wrong_grad[6, 3] = 60_000, torch.nan, 1e30, torch.inf
    found = []
    for rows, gradient in ((given, grad), (wrong, wrong_grad)):
        rows = rows.requires_grad_()
        out = fp8_linear(rows, weight, WeightCodes())
        found.append((out, *torch.autograd.grad(out, rows, gradient)))
    others = [0, 1, 3, 4, 5, 7]
    for one, other in zip(*found, strict=True):
        assert torch.equal(one[others], other[others])
        assert other[6].isnan().all()


@pytest.mark.parametrize("sums", [torch.float32, torch.bfloat16])
def test_gradients_add_up_with_one_rounding(sums):
    weight = torch.nn.Parameter(random(16, 32, dtype=torch.bfloat16, device="cpu", seed=0))
    weight.grad_dtype = sums
    expected = torch.zeros(16, 32, dtype=sums)
    for turn in range(3):
        given, grad = (random(9, width, dtype=torch.bfloat16, device="cpu", seed=5 + turn + width) for width in (32, 16))
        fp8_linear(given, weight, WeightCodes()).backward(grad)
        codes, rows = row_codes(grad), row_codes(given)
        exact = weight_gradient(codes, column_codes(given, rows.scale_T), rows.scale_T, None, torch.float32)
        expected = (expected.float() + exact).to(sums)
        assert weight.grad.dtype == sums
        assert torch.equal(weight.grad, expected)


def test_frozen_tensors_get_no_gradient():
    weight = torch.nn.Parameter(random(16, 32, dtype=torch.float32, device="cpu", seed=0), requires_grad=False)
    given = random(5, 32, dtype=torch.float32, device="cpu", seed=1).requires_grad_()
    fp8_linear(given, weight, WeightCodes()).sum().backward()
    assert weight.grad is None
    assert given.grad is not None
    fp8_linear(given.detach(), weight.requires_grad_(), WeightCodes()).sum().backward()
    assert weight.grad is not None


@pytest.mark.parametrize("keep", [True, False])
def test_codes_of_a_weight_are_made_once_where_it_does_not_change(keep, monkeypatch):
    made = []
    original = module.matrix_codes
    monkeypatch.setattr(module, "matrix_codes", lambda *given, **named: made.append(1) or original(*given, **named))
    weight, codes = random(16, 32, dtype=torch.float32, device="cpu", seed=0), WeightCodes(keep=keep)
    with codes.unchanged():
        # Activation checkpointing hands out copies that share memory.
        found = [codes.rows(weight)[0], codes.columns(weight.detach())[0], codes.rows(weight)[0]]
        assert len(made) == (1 if keep else 3)
    assert torch.equal(found[0].view(torch.uint8), found[1].T.view(torch.uint8))
    # Outside, nothing is remembered, whatever torch notices of a change.
    weight.numpy()[0, 0] = 100.0
    assert codes.rows(weight)[1] > codes.rows(torch.zeros(16, 16))[1]
    with codes.unchanged():
        assert codes.rows(weight)[1] == 0.25


def inputs(tokens, dtype, device):
    made = {
        "residual": (tokens, WIDTH),
        "delta": (tokens, WIDTH),
        "norm weight": (WIDTH,),
        "gate up": (2 * INNER, WIDTH),
        "down": (WIDTH, INNER),
        "qkv": (PACKED, WIDTH),
    }
    found = {}
    for seed, (name, shape) in enumerate(made.items()):
        scale = shape[1] ** -0.5 if seed > 2 else 1.0
        found[name] = random(*shape, dtype=dtype, device=device, seed=seed, scale=scale).requires_grad_()
    return found


def feed_forward_of(given, upstream, mode, codes=None):
    names = ("residual", "delta", "norm weight", "gate up", "down")
    tensors = [given[name] for name in names]
    outputs = fp8_feed_forward(*tensors, EPS, codes or WeightCodes(), recompute=mode)
    return [*outputs, *torch.autograd.grad(outputs, tensors, upstream)]


def test_all_modes_of_the_feed_forward_network_give_the_same_bits(dtype, device):
    given = inputs(9, dtype, device)
    upstream = [random(9, WIDTH, dtype=dtype, device=device, seed=20 + seed) for seed in range(2)]
    first, *others = [feed_forward_of(given, upstream, mode) for mode in MODES]
    for other in others:
        assert all(torch.equal(one, two) for one, two in zip(first, other, strict=True))


def test_the_feed_forward_network_equals_its_operators_one_by_one(dtype, device):
    """Codes made by the operators' kernels are those of a pass over the rows that these would have written."""
    given = inputs(9, dtype, device)
    grad_total, grad_out = (random(9, WIDTH, dtype=dtype, device=device, seed=20 + seed) for seed in range(2))
    found = feed_forward_of(given, [grad_total, grad_out], "light")
    residual, delta, norm_weight, gate_up, down, _ = (tensor.detach() for tensor in given.values())
    codes = WeightCodes()
    total, normed, scale = add_norm_forward(residual, delta, norm_weight, EPS)
    rows = row_codes(normed)
    hidden = product(rows, codes.rows(gate_up), dtype)
    inner = swiglu(hidden)
    inner_codes = row_codes(inner)
    out = product(inner_codes, codes.rows(down), dtype)
    grad = row_codes(grad_out)
    grad_down = weight_gradient(grad, column_codes(inner, inner_codes.scale_T), inner_codes.scale_T, None, dtype)
    swiglu_backward_(hidden, product(grad, codes.columns(down), dtype), emit=False)
    grad_hidden = row_codes(hidden)
    grad_gate_up = weight_gradient(grad_hidden, column_codes(normed, rows.scale_T), rows.scale_T, None, dtype)
    grad_normed = product(grad_hidden, codes.columns(gate_up), dtype)
    grad_input, grad_norm = norm_backward(grad_normed, grad_total, total, norm_weight, scale)
    expected = (total, out, grad_input, grad_input, grad_norm, grad_gate_up, grad_down)
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


@pytest.mark.parametrize("added", [True, False])
def test_a_block_in_fp8_is_near_the_same_block_in_float64(added, device):
    """Outputs and gradients of both halves, within the error of E4M3."""
    given = inputs(12, torch.float32, device)
    table = rotary_table(torch.arange(12, device=device), SIZE, 100.0)

    def ours(residual, delta, norm_weight, gate_up, down, qkv):
        delta = delta if added else None
        total, *parts = fp8_norm_qkv(residual, delta, norm_weight, qkv, table, HEADS, EPS, WeightCodes())
        return *parts, *fp8_feed_forward(total, residual, norm_weight, gate_up, down, EPS, WeightCodes())

    def exact(residual, delta, norm_weight, gate_up, down, qkv):
        total = residual + delta if added else residual
        packed = (rms_norm_reference(total, norm_weight, EPS) @ qkv.T).unflatten(-1, (-1, SIZE))
        angles = RotaryTable(*(part.double() for part in table))
        parts = rotary_reference_(packed.clone(), angles, sum(HEADS)).split((*HEADS, HEADS[1]), dim=1)
        total = total + residual
        inner = swiglu_reference(rms_norm_reference(total, norm_weight, EPS) @ gate_up.T)
        return *parts, total, inner @ down.T

    results = []
    for function, wide in ((ours, False), (exact, True)):
        tensors = [tensor.detach().double() if wide else tensor.detach() for tensor in given.values()]
        for tensor in tensors:
            tensor.requires_grad_()
        outputs = function(*tensors)
        upstream = [random(*out.shape, dtype=out.dtype, device=device, seed=40 + i) for i, out in enumerate(outputs)]
        results.append([*outputs, *torch.autograd.grad(outputs, tensors, upstream, allow_unused=not added)])
    for one, other in zip(*results, strict=True):
        if other is not None:
            assert (one.double() - other).norm() <= 0.09 * other.norm()


@pytest.mark.parametrize(("mode", "elements"), [("none", WIDTH + 2 * INNER), ("light", WIDTH + 2 * INNER), ("ffn", WIDTH)])
def test_each_mode_keeps_what_it_says(mode, elements, device):
    """`elements` of each token, besides three scales and the parameters."""
    given = inputs(9, torch.float32, device)
    kept = {}
    with torch.autograd.graph.saved_tensors_hooks(lambda saved: kept.setdefault(saved.data_ptr(), saved), lambda saved: saved):
        tensors = [given[name] for name in ("residual", "delta", "norm weight", "gate up", "down")]
        fp8_feed_forward(*tensors, EPS, WeightCodes(), recompute=mode)
    parameters = {tensor.data_ptr() for tensor in given.values()}
    assert sum(saved.numel() for at, saved in kept.items() if at not in parameters) == 9 * (elements + 3)


def test_a_gradient_carries_its_codes_once_and_only_unchanged():
    grad = random(5, 32, dtype=torch.float32, device="cpu", seed=0)
    carried, own = row_codes(2 * grad), row_codes(grad)
    module.carry_codes(grad, carried)
    assert module.gradient_codes(grad) is carried
    assert torch.equal(module.gradient_codes(grad).scale_T, own.scale_T)
    module.carry_codes(grad, carried)
    assert torch.equal(module.gradient_codes(grad.clone()).scale_T, own.scale_T)
    grad[:] *= 8
    assert torch.equal(module.gradient_codes(grad).scale_T, 8 * own.scale_T)


def test_compiled_functions_give_the_same_bits():
    given = [tensor for name, tensor in inputs(8, torch.float32, "cpu").items() if name != "qkv"]
    codes = WeightCodes(keep=False)

    def run(*tensors):
        total, out = fp8_feed_forward(*tensors, EPS, codes)
        return fp8_feed_forward(total, out, *tensors[2:], EPS, codes)[1]

    found = []
    for function in (run, torch.compile(run, backend="aot_eager", fullgraph=True)):
        out = function(*given)
        found.append([out, *torch.autograd.grad(out.sum(), given)])
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


def test_no_tokens_give_no_rows_and_a_gradient_of_zeros(device):
    weight = random(16, 32, dtype=torch.float32, device=device, seed=0).requires_grad_()
    given = torch.empty(0, 32, device=device, requires_grad=True)
    out = fp8_linear(given, weight, WeightCodes())
    rows, gradient = torch.autograd.grad(out, (given, weight), torch.empty(0, 16, device=device))
    assert out.shape == (0, 16)
    assert rows.shape == (0, 32)
    assert not gradient.any()


def test_two_runs_give_the_same_bits(dtype, device):
    given = inputs(9, dtype, device)
    upstream = [random(9, WIDTH, dtype=dtype, device=device, seed=20 + seed) for seed in range(2)]
    one, other = (feed_forward_of(given, upstream, "light") for _ in range(2))
    assert all(torch.equal(first, second) for first, second in zip(one, other, strict=True))
