"""The feed-forward half of a block: against its formula in float64, and its recompute modes against each other."""

import pytest
import torch
import torch.nn.functional as F

from kernels.feed_forward import feed_forward, feed_forward_reference
from tests.kernels.error_rule import compare, random

EPS = 1e-5
MODES = ("none", "light", "ffn")
NAMES = ("residual", "delta", "norm weight", "gate up weight", "down weight")


def inputs(tokens, dtype, device, width=24, hidden=20):
    """(inputs, gradients of the sum and of the output) by name."""
    shapes = ((tokens, width), (tokens, width), (width,), (2 * hidden, width), (width, hidden))
    scales = (1.0, 1.0, 1.0, width**-0.5, hidden**-0.5)
    made = {
        name: random(*shape, dtype=dtype, device=device, seed=seed, scale=scale).requires_grad_()
        for seed, (name, shape, scale) in enumerate(zip(NAMES, shapes, scales, strict=True))
    }
    upstream = {name: random(tokens, width, dtype=dtype, device=device, seed=9 + i) for i, name in enumerate(("total", "out"))}
    return made, upstream


def plain(residual, delta, norm_weight, gate_up_weight, down_weight):
    total = residual + delta
    gate, up = (F.rms_norm(total, norm_weight.shape, norm_weight, EPS) @ gate_up_weight.T).chunk(2, dim=-1)
    return total, (F.silu(gate) * up) @ down_weight.T


def results(mode, given, upstream):
    outputs = feed_forward(*given.values(), EPS, recompute=mode)
    return [*outputs, *torch.autograd.grad(outputs, list(given.values()), list(upstream.values()))]


@pytest.mark.parametrize("tokens", [1, 19, 0])
@pytest.mark.parametrize("mode", MODES)
def test_results_and_gradients_are_right(mode, tokens, dtype, device):
    given, upstream = inputs(tokens, dtype, device)
    sums = {f"d {name}": max(1, tokens) for name in NAMES[2:]}
    compare(lambda *tensors: feed_forward(*tensors, EPS, recompute=mode), plain, given, upstream, sums)


@pytest.mark.parametrize("mode", MODES)
def test_equals_autograd_in_float64(mode, reference_device):
    given, upstream = inputs(7, torch.float64, reference_device)
    outputs = feed_forward_reference(*given.values(), EPS)
    gradients = torch.autograd.grad(outputs, list(given.values()), list(upstream.values()))
    torch.testing.assert_close(results(mode, given, upstream), [*outputs, *gradients], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(outputs, plain(*given.values()), rtol=1e-12, atol=1e-12)


def test_all_modes_give_the_same_bits(dtype, device):
    given, upstream = inputs(9, dtype, device, width=64, hidden=40)
    runs = [results(mode, given, upstream) for mode in MODES]
    for other in runs[1:]:
        assert all(torch.equal(one, two) for one, two in zip(runs[0], other, strict=True))


@pytest.mark.parametrize("mode", ["none", "light"])
def test_a_second_backward_pass_raises(mode, device):
    given, _ = inputs(3, torch.float32, device)
    loss = sum(output.sum() for output in feed_forward(*given.values(), EPS, recompute=mode))
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError):
        loss.backward()


@pytest.mark.parametrize(("mode", "elements"), [("none", 24 + 24 + 3 * 20), ("light", 24 + 2 * 20), ("ffn", 24)])
def test_each_mode_keeps_what_it_says(mode, elements, device):
    """`elements` of each token, besides its float32 scale and the parameters."""
    given, _ = inputs(9, torch.float32, device)
    kept = {}
    with torch.autograd.graph.saved_tensors_hooks(lambda saved: kept.setdefault(saved.data_ptr(), saved), lambda saved: saved):
        feed_forward(*given.values(), EPS, recompute=mode)
    parameters = {tensor.data_ptr() for tensor in given.values()}
    assert sum(saved.numel() for at, saved in kept.items() if at not in parameters) == 9 * (elements + 1)


@pytest.mark.parametrize("mode", MODES)
def test_the_compiler_sees_one_graph(mode, device):
    given, upstream = inputs(5, torch.float32, device)
    compiled = torch.compile(
        lambda *tensors: feed_forward(*tensors, EPS, recompute=mode), backend="aot_eager", fullgraph=True, dynamic=False
    )
    outputs = compiled(*given.values())
    found = [*outputs, *torch.autograd.grad(outputs, list(given.values()), list(upstream.values()))]
    torch.testing.assert_close(found, results(mode, given, upstream), rtol=1e-5, atol=1e-6)
