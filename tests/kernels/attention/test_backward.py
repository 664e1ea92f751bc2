"""The backward kernels against autograd of the formula in float64, at the borders of tiles, windows, segments and blocks."""

import pytest
import torch

import kernels.attention.backward as module
from kernels.attention.forward import attention_forward
from tests.kernels.attention_rows import ROWS, WITH_DTYPES, Row, plain_gradients, small_blocks, with_unseen_changed
from tests.kernels.error_rule import check, far_apart


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch):
    small_blocks(monkeypatch)


NAMES = ("d query", "d key", "d value")


def backward(row, query, key, value, grad, made=None):
    """Gradients by the kernels themselves."""
    work = row.work(query.device)
    out, lse = made or attention_forward(query, key, value, work.work, *work.numbers)
    return module.attention_backward(grad, query, key, value, out, lse, work.work, *work.numbers)


@pytest.mark.parametrize(("name", "dtype"), WITH_DTYPES)
def test_gradients_are_right(name, dtype, triton_device):
    row = ROWS[name]
    inputs = row.inputs(dtype, triton_device)
    seen = row.visible()
    exact = plain_gradients(*(tensor.double() for tensor in inputs[:3]), seen, inputs[3].double())
    usual = plain_gradients(*inputs[:3], seen, inputs[3])
    group = row.heads[0] // row.heads[1]
    for given, *results, sums in zip(NAMES, backward(row, *inputs), exact, usual, (1, group, group), strict=True):
        if row.window == 1 and given != "d value":
            # The only weight is 1 whatever the score: what remains of two equal sums is their rounding.
            assert results[0].abs().max() < 100 * torch.finfo(dtype).eps
            continue
        check(given, *results, sums=sums)


def test_pointers_and_descriptors_read_the_same(triton_device, monkeypatch):
    row = ROWS["prompt beyond the window"]
    inputs = row.inputs(torch.float16, triton_device)
    found = []
    for descriptors in (False, True):
        small_blocks(monkeypatch, descriptors=descriptors)
        found.append(backward(row, *inputs))
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


@pytest.mark.parametrize(("dtype", "places"), [(torch.float32, slice(55, 60)), (torch.float16, slice(60, 64))], ids=str)
def test_what_is_not_seen_changes_no_bit(dtype, places, triton_device):
    """Gradients of a query do not know what it does not see; those of keys and values not the queries that do not see them."""
    row = ROWS["prompt beyond the window"]
    inputs = row.inputs(dtype, triton_device)
    before = backward(row, *inputs)
    # An answer, or the document behind it.
    changed, unseen = with_unseen_changed(row, inputs, places)
    assert unseen.any()
    after = backward(row, *changed)
    assert all(torch.equal(one[places], other[places]) for one, other in zip(before, after, strict=True))


@pytest.mark.parametrize("descriptors", [False, True])
def test_rows_far_apart(descriptors, triton_device, monkeypatch):
    """Offsets beyond 2^31 elements."""
    small_blocks(monkeypatch, descriptors=descriptors)
    row = Row((3,), 2, 16)
    inputs = [tensor.contiguous() for tensor in row.inputs(torch.float16, triton_device)]
    work = row.work(triton_device)
    made = attention_forward(*inputs[:3], work.work, *work.numbers)
    near = backward(row, *inputs, made)
    for number in range(4):
        far = backward(row, *(far_apart(tensor) if i == number else tensor for i, tensor in enumerate(inputs)), made)
        assert all(torch.equal(one, other) for one, other in zip(near, far, strict=True))
