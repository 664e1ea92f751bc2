"""The products of a linear map: results, sums of gradients over micro-batches, and gradients that nobody asked for."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from kernels.feed_forward import feed_forward
from kernels.launch import INTERPRETED
from kernels.linear import linear
from kernels.norm_qkv import norm_qkv
from kernels.rotary import rotary_table
from tests.kernels.error_rule import check, compare, random
from tests.kernels.operations import Operations

TOKENS, WIDTH, INNER, HEADS, SIZE, EPS = 6, 16, 20, (2, 1), 4, 1e-5
SHAPES = {
    "output": [(WIDTH, WIDTH)],
    "qkv": [((HEADS[0] + 2 * HEADS[1]) * SIZE, WIDTH)],
    "feed forward": [(2 * INNER, WIDTH), (WIDTH, INNER)],
}
MAPS = list(SHAPES)


def parameters(name, dtype, device):
    return [
        random(*shape, dtype=dtype, device=device, seed=seed, scale=shape[1] ** -0.5).requires_grad_()
        for seed, shape in enumerate(SHAPES[name], start=7)
    ]


def loss_of(name, weights, seed=0, scale=1.0):
    """A scalar with gradients of size `scale` at every output, for random tokens."""
    dtype, device = weights[0].dtype, weights[0].device
    rows = random(TOKENS, WIDTH, dtype=dtype, device=device, seed=seed).requires_grad_()
    norm = torch.ones(WIDTH, dtype=dtype, device=device)
    if name == "output":
        outputs = [linear(rows, *weights)]
    elif name == "qkv":
        table = rotary_table(torch.arange(TOKENS, device=device), SIZE, 100.0)
        outputs = norm_qkv(rows, None, norm, *weights, table, HEADS, EPS)[1:]
    else:
        outputs = feed_forward(rows, rows, norm, *weights, EPS)[1:]
    return sum((output.float() * scale).sum() for output in outputs)


def exact_sum(name, dtype, device, seeds):
    """Gradients of the losses' sum in float64, from the weights and tokens as rounded to `dtype`."""
    weights = [weight.detach().double().requires_grad_() for weight in parameters(name, dtype, device)]
    for seed in seeds:
        rows = random(TOKENS, WIDTH, dtype=dtype, device=device, seed=seed).double()
        normed = F.rms_norm(rows, (WIDTH,), eps=EPS)
        if name == "output":
            outputs = [rows @ weights[0].T]
        elif name == "qkv":
            table = rotary_table(torch.arange(TOKENS, device=device), SIZE, 100.0)
            query, key, value = (normed @ weights[0].T).unflatten(-1, (-1, SIZE)).split((*HEADS, HEADS[1]), dim=1)
            turn = torch.complex(table.cos_TE.double(), table.sin_TE.double())[:, None]
            turned = [torch.complex(*heads.chunk(2, dim=-1)) * turn for heads in (query, key)]
            outputs = [*(part for heads in turned for part in (heads.real, heads.imag)), value]
        else:
            normed = F.rms_norm(2 * rows, (WIDTH,), eps=EPS)
            gate, up = (normed @ weights[0].T).chunk(2, dim=-1)
            outputs = [(F.silu(gate) * up) @ weights[1].T]
        sum(output.sum() for output in outputs).backward()
    return [weight.grad for weight in weights]


@pytest.mark.parametrize("tokens", [1, 19, 0])
def test_results_and_gradients_are_right(tokens, dtype, device):
    given = {
        "input": random(tokens, 24, dtype=dtype, device=device, seed=0).requires_grad_(),
        "weight": random(10, 24, dtype=dtype, device=device, seed=1, scale=0.2).requires_grad_(),
    }
    upstream = {"output": random(tokens, 10, dtype=dtype, device=device, seed=2)}
    compare(linear, F.linear, given, upstream, {"d weight": max(1, tokens)})


@pytest.mark.parametrize("name", MAPS)
def test_sums_over_micro_batches_are_as_exact_as_autograds_own(name, dtype, device):
    seeds = range(5)
    ours, plain = parameters(name, dtype, device), parameters(name, dtype, device)
    for seed in seeds:
        loss_of(name, ours, seed).backward()
        for weight, gradient in zip(plain, torch.autograd.grad(loss_of(name, plain, seed), plain), strict=True):
            weight.grad = gradient if weight.grad is None else weight.grad + gradient
    for one, other, exact in zip(ours, plain, exact_sum(name, dtype, device, seeds), strict=True):
        check(name, one.grad, exact, other.grad, sums=5 * TOKENS)


@pytest.mark.skipif(INTERPRETED, reason="the interpreter rounds bfloat16 wrongly")
@pytest.mark.parametrize("name", MAPS)
def test_float32_sums_of_bfloat16_gradients_lose_nothing_to_bfloat16(name, device):
    weights = parameters(name, torch.bfloat16, device)
    for weight in weights:
        weight.grad_dtype = torch.float32
    for seed in range(3):
        loss_of(name, weights, seed).backward()
    for weight, exact in zip(weights, exact_sum(name, torch.bfloat16, device, range(3)), strict=True):
        assert weight.grad.dtype == torch.float32
        assert (weight.grad != weight.grad.bfloat16()).float().mean() > 0.5
        # The factors of the output's map are exact; the others' norms and gradients were rounded to bfloat16.
        tolerance = 1e-6 if name == "output" else 0.02
        torch.testing.assert_close(weight.grad.double(), exact, rtol=tolerance, atol=tolerance * float(exact.abs().max()))


@pytest.mark.parametrize("micro_batches", [256, 400])
def test_equal_addends_saturate_in_bfloat16_and_not_in_float32(micro_batches, device):
    """From 256 on, adding 1 changes no bfloat16: the reason for float32 sums of many micro-batches."""
    row = torch.ones(1, 4, dtype=torch.bfloat16, device=device)
    sums = {}
    for dtype in (torch.bfloat16, torch.float32):
        weight = torch.zeros(2, 4, dtype=torch.bfloat16, device=device, requires_grad=True)
        weight.grad_dtype = dtype
        for _ in range(micro_batches):
            linear(row, weight).sum().backward()
        sums[dtype] = weight.grad
    assert (sums[torch.float32] == micro_batches).all()
    assert (sums[torch.bfloat16] == 256).all()


@pytest.mark.parametrize("name", MAPS)
def test_a_later_micro_batch_adds_to_the_gradient_inside_the_product(name, device):
    weights = parameters(name, torch.float32, device)
    loss_of(name, weights).backward()
    sums = [weight.grad for weight in weights]
    loss = loss_of(name, weights, 1)
    with Operations() as counted:
        loss.backward()
    assert counted.calls[torch.ops.aten.addmm.out] == len(weights)
    # Autograd's own sums: the gradient of the rows may have two addends, a weight's has none.
    assert counted.calls[torch.ops.aten.add_.Tensor] == 0
    assert all(weight.grad is total for weight, total in zip(weights, sums, strict=True))


@pytest.mark.parametrize("name", MAPS)
def test_a_frozen_weight_gets_no_product(name, device):
    weights = parameters(name, torch.float32, device)
    counts = []
    for frozen in (False, True):
        for weight in weights:
            weight.requires_grad_(not frozen)
        loss = loss_of(name, weights)
        with Operations() as counted:
            loss.backward()
        counts.append(counted.products)
    # An input gradient for each map, and before freezing a weight gradient too.
    assert counts == [2 * len(weights), len(weights)]


@pytest.mark.parametrize("name", MAPS)
def test_hooks_see_each_micro_batch(name, device):
    """A hook on a parameter may change the gradient, and one after accumulation may take it away."""
    weights, plain = parameters(name, torch.float32, device), parameters(name, torch.float32, device)
    first, *_ = weights
    first.register_hook(lambda gradient: 2 * gradient)
    fired = []
    weights[-1].register_post_accumulate_grad_hook(lambda weight: fired.append(weight.grad.clone()))
    for seed in range(2):
        loss_of(name, weights, seed).backward()
        loss_of(name, plain, seed).backward()
    torch.testing.assert_close(first.grad, 2 * plain[0].grad)
    assert len(fired) == 2
    assert torch.equal(fired[1], weights[-1].grad)


@pytest.mark.parametrize("name", MAPS)
def test_gradients_asked_for_by_name_are_returned_and_added_to_nothing(name, device):
    weights = parameters(name, torch.float32, device)
    loss_of(name, weights).backward()
    before = [weight.grad.clone() for weight in weights]
    again = torch.autograd.grad(loss_of(name, weights), weights)
    rows = torch.ones(1, device=device, requires_grad=True)
    (loss_of(name, weights) * rows).backward(inputs=[rows])
    for weight, total, gradient in zip(weights, before, again, strict=True):
        assert torch.equal(weight.grad, total)
        assert torch.equal(gradient, total)
    loss_of(name, weights).backward(inputs=weights[:1])
    torch.testing.assert_close(weights[0].grad, 2 * before[0])


def test_a_second_derivative_goes_through_autograd(device):
    rows, weight = (random(3, 3, dtype=torch.float32, device=device, seed=seed).requires_grad_() for seed in range(2))
    linear(rows, weight).sum().backward()
    before = weight.grad.clone()
    (gradient,) = torch.autograd.grad(linear(rows, weight).square().sum(), weight, create_graph=True)
    (second,) = torch.autograd.grad(gradient.sum(), rows)
    expected_rows = rows.detach().clone().requires_grad_()
    (expected,) = torch.autograd.grad(2 * (expected_rows @ weight.detach().T).T.mm(expected_rows).sum(), expected_rows)
    torch.testing.assert_close(second, expected)
    assert torch.equal(weight.grad, before)


@pytest.mark.parametrize("name", MAPS)
def test_checkpointed_micro_batches_give_the_same_bits(name, dtype, device):
    sums = []
    for checkpointed in (False, True):
        weights = parameters(name, dtype, device)
        for seed in range(3):
            if checkpointed:
                loss = checkpoint(lambda *weights, seed=seed: loss_of(name, weights, seed), *weights, use_reentrant=False)
            else:
                loss = loss_of(name, weights, seed)
            loss.backward()
        sums.append([weight.grad for weight in weights])
    assert all(torch.equal(one, other) for one, other in zip(*sums, strict=True))


def test_the_compiler_sees_one_graph(device):
    rows = random(5, WIDTH, dtype=torch.float32, device=device, seed=0).requires_grad_()
    (weight,) = parameters("output", torch.float32, device)
    compiled = torch.compile(linear, backend="aot_eager", fullgraph=True, dynamic=False)
    for _ in range(2):
        compiled(rows, weight).square().sum().backward()
    eager_rows, eager = rows.detach().requires_grad_(), weight.detach().clone().requires_grad_()
    for _ in range(2):
        linear(eager_rows, eager).square().sum().backward()
    torch.testing.assert_close([rows.grad, weight.grad], [eager_rows.grad, eager.grad])
