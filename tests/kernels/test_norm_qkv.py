"""Norm, projection to query, key and value, and rotation: against the formula in float64, with and without kept norms."""

import pytest
import torch
import torch.nn.functional as F

from kernels.norm_qkv import norm_qkv, norm_qkv_reference
from kernels.rotary import rotary_table
from tests.kernels.error_rule import compare, random

EPS, HEADS, SIZE, WIDTH = 1e-5, (4, 2), 8, 24
PACKED = (HEADS[0] + 2 * HEADS[1]) * SIZE
NAMES = ("residual", "delta", "norm weight", "qkv weight")


def inputs(tokens, dtype, device):
    """(inputs, gradients of the sum, query, key and value) by name."""
    shapes = ((tokens, WIDTH), (tokens, WIDTH), (WIDTH,), (PACKED, WIDTH))
    made = {
        name: random(*shape, dtype=dtype, device=device, seed=seed, scale=WIDTH**-0.5 if seed == 3 else 1.0).requires_grad_()
        for seed, (name, shape) in enumerate(zip(NAMES, shapes, strict=True))
    }
    shapes = {"total": (tokens, WIDTH), "query": (tokens, HEADS[0], SIZE), "key": (tokens, HEADS[1], SIZE)}
    shapes["value"] = shapes["key"]
    grads = {name: random(*shape, dtype=dtype, device=device, seed=9 + i) for i, (name, shape) in enumerate(shapes.items())}
    return made, grads


def table(tokens, device):
    return rotary_table(torch.arange(tokens, device=device) + 3, SIZE, 100.0)


def ours(keep, device):
    def function(residual, delta, norm_weight, qkv_weight):
        angles = table(len(residual), device)
        return norm_qkv(residual, delta, norm_weight, qkv_weight, angles, HEADS, EPS, keep_normed=keep)

    return function


def plain(residual, delta, norm_weight, qkv_weight):
    """The formula, with rotations as products of complex numbers."""
    total = residual + delta
    packed = (F.rms_norm(total, norm_weight.shape, norm_weight, EPS) @ qkv_weight.T).unflatten(-1, (-1, SIZE))
    query, key, value = packed.split((*HEADS, HEADS[1]), dim=1)
    angles = table(len(residual), residual.device)
    turn = torch.complex(angles.cos_TE, angles.sin_TE)[:, None]

    def rotated(heads):
        wide = heads if heads.dtype == torch.float64 else heads.float()
        turned = torch.complex(*wide.chunk(2, dim=-1)) * turn
        return torch.cat((turned.real, turned.imag), dim=-1).to(heads.dtype)

    return total, rotated(query), rotated(key), value


def results(function, given, upstream):
    outputs = function(*given.values())
    return [*outputs, *torch.autograd.grad(outputs, list(given.values()), list(upstream.values()))]


@pytest.mark.parametrize("tokens", [1, 19, 0])
@pytest.mark.parametrize("keep", [False, True])
def test_results_and_gradients_are_right(keep, tokens, dtype, device):
    given, upstream = inputs(tokens, dtype, device)
    compare(ours(keep, device), plain, given, upstream, {f"d {name}": max(1, tokens) for name in NAMES[2:]})


def test_equals_autograd_in_float64(reference_device):
    given, upstream = inputs(7, torch.float64, reference_device)
    reference = lambda *tensors: norm_qkv_reference(*tensors, table(7, reference_device), HEADS, EPS)  # noqa: E731
    expected = results(reference, given, upstream)
    for keep in (False, True):
        torch.testing.assert_close(results(ours(keep, reference_device), given, upstream), expected, rtol=1e-12, atol=1e-12)


def test_keeping_the_normed_rows_changes_no_bit(dtype, device):
    given, upstream = inputs(9, dtype, device)
    kept, again = (results(ours(keep, device), given, upstream) for keep in (True, False))
    assert all(torch.equal(one, other) for one, other in zip(kept, again, strict=True))


def test_without_a_delta_the_stream_passes_through(dtype, device):
    given, upstream = inputs(5, dtype, device)
    del given["delta"]

    def without(residual, norm_weight, qkv_weight):
        return norm_qkv(residual, None, norm_weight, qkv_weight, table(5, device), HEADS, EPS)

    def formula(residual, norm_weight, qkv_weight):
        return plain(residual, torch.zeros_like(residual), norm_weight, qkv_weight)

    compare(without, formula, given, upstream, {"d norm weight": 5, "d qkv weight": 5})
    assert torch.equal(without(*given.values())[0], given["residual"])


@pytest.mark.parametrize(("keep", "elements"), [(True, 2 * WIDTH), (False, WIDTH)])
def test_no_more_is_kept_than_asked_for(keep, elements, device):
    """`elements` of each token, besides its float32 scale, parameters and rotary tables."""
    given, _ = inputs(9, torch.float32, device)
    angles = table(9, device)
    kept = {}
    with torch.autograd.graph.saved_tensors_hooks(lambda saved: kept.setdefault(saved.data_ptr(), saved), lambda saved: saved):
        norm_qkv(*given.values(), angles, HEADS, EPS, keep_normed=keep)
    others = {tensor.data_ptr() for tensor in (*given.values(), *angles)}
    assert sum(saved.numel() for at, saved in kept.items() if at not in others) == 9 * (elements + 1)


@pytest.mark.parametrize("keep", [False, True])
def test_the_compiler_sees_one_graph(keep, device):
    given, upstream = inputs(5, torch.float32, device)
    angles = table(5, device)
    function = lambda *tensors: norm_qkv(*tensors, angles, HEADS, EPS, keep_normed=keep)  # noqa: E731
    compiled = torch.compile(function, backend="aot_eager", fullgraph=True, dynamic=False)
    found, expected = results(compiled, given, upstream), results(function, given, upstream)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
