"""Operators of torch that are plain functions where neither autograd nor the compiler looks on."""

import pytest
import torch
from torch import Tensor

from kernels.launch import operator
from tests.kernels.operations import Operations


@operator("komainu_tests::twice")
def twice(values: Tensor) -> Tensor:
    return values * 2


@operator("komainu_tests::clear_", mutates=("values",))
def clear_(values: Tensor | None, other: Tensor) -> None:
    # As a kernel writes: torch does not see it.
    if values is not None:
        values.detach().untyped_storage().fill_(0)


@twice.register_fake
def _(values):
    return torch.empty_like(values)


twice.register_autograd(lambda ctx, grad: twice(grad), setup_context=lambda ctx, inputs, output: None)


def test_the_operator_is_dispatched_only_where_gradients_are_on(monkeypatch):
    dispatched = []
    registered = twice.registered
    monkeypatch.setattr(twice, "registered", lambda values: dispatched.append(values) or registered(values))
    values = torch.ones(3, requires_grad=True)
    loss = twice(values).sum()
    assert len(dispatched) == 1
    loss.backward()
    with torch.no_grad():
        assert torch.equal(twice(values), torch.full((3,), 2.0))
    assert len(dispatched) == 1
    assert torch.equal(values.grad, torch.full((3,), 2.0))


def test_a_dispatch_mode_sees_the_operator():
    with torch.no_grad(), Operations() as counted:
        twice(torch.ones(3))
    assert counted.calls[torch.ops.komainu_tests.twice.default] == 1


def test_autograd_notices_a_saved_tensor_that_a_direct_call_overwrote():
    values = torch.ones(3, requires_grad=True)
    saved = values * 1
    loss = saved.square().sum()
    with torch.no_grad():
        clear_(saved, values)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_optional_and_inference_tensors_may_be_mutated():
    with torch.inference_mode():
        values = torch.ones(3)
        clear_(None, values)
        clear_(values, values)
    assert not values.any()


def test_the_compiler_sees_the_operator_with_gradients_on_and_off():
    graphs = []

    def backend(graph, inputs):
        graphs.append([node.target for node in graph.graph.nodes if node.op == "call_function"])
        return graph

    for enabled in (True, False):
        compiled = torch.compile(lambda values: twice(values) + 1, backend=backend, fullgraph=True)
        with torch.set_grad_enabled(enabled):
            assert torch.equal(compiled(torch.ones(2)), torch.full((2,), 3.0))
        torch._dynamo.reset()
    assert len(graphs) == 2
    for targets in graphs:
        assert any("twice" in str(target) for target in targets)


def test_the_operator_passes_torchs_own_checks():
    torch.library.opcheck(twice.registered, (torch.ones(3, requires_grad=True),))
