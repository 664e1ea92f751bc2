"""The backward kernels at the borders of tiles, windows, segments and blocks, against autograd of the formula in float64."""

import pytest
import torch

import kernels.attention.backward as module
from kernels.attention.forward import attention_forward
from tests.kernels.attention_rows import (
    NEIGHBOURS,
    ROWS,
    WITH_DTYPES,
    WITHOUT_AND_WITH_DESCRIPTORS,
    Row,
    plain_gradients,
    small_blocks,
    with_nans,
    with_unseen_changed,
)
from tests.kernels.error_rule import check, far_apart


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch):
    small_blocks(monkeypatch)


NAMES = ("d query", "d key", "d value")


def backward(row, query, key, value, grad, made=None):
    """Gradients of query, key and value by the kernels. made: the forward pass's output and log-sum-exp, if known."""
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
            # The only weight is 1 whatever the score, so that the gradient is the rounding of two equal sums.
            assert results[0].abs().max() < 100 * torch.finfo(dtype).eps
            continue
        check(given, *results, sums=sums)


def test_pointers_and_descriptors_give_the_same_bits(triton_device, monkeypatch):
    row = ROWS["prompt beyond the window"]
    inputs = row.inputs(torch.float16, triton_device)
    found = []
    for descriptors in (False, True):
        small_blocks(monkeypatch, descriptors=descriptors)
        found.append(backward(row, *inputs))
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


@pytest.mark.parametrize(("dtype", "places"), [(torch.float32, slice(55, 60)), (torch.float16, slice(60, 64))], ids=str)
def test_unseen_places_change_no_bit(dtype, places, triton_device):
    """Neither the keys that a query does not see, nor the queries that do not see a key, change its gradients."""
    row = ROWS["prompt beyond the window"]
    inputs = row.inputs(dtype, triton_device)
    before = backward(row, *inputs)
    # `places` are an answer, or the document behind it.
    changed, unseen = with_unseen_changed(row, inputs, places)
    assert unseen.any()
    after = backward(row, *changed)
    assert all(torch.equal(one[places], other[places]) for one, other in zip(before, after, strict=True))


@pytest.mark.parametrize("descriptors", [False, True])
def test_offsets_beyond_31_bits_are_right(descriptors, triton_device, monkeypatch):
    small_blocks(monkeypatch, descriptors=descriptors)
    row = Row((3,), 2, 16)
    inputs = [tensor.contiguous() for tensor in row.inputs(torch.float16, triton_device)]
    work = row.work(triton_device)
    made = attention_forward(*inputs[:3], work.work, *work.numbers)
    near = backward(row, *inputs, made)
    for number in range(4):
        far = backward(row, *(far_apart(tensor) if i == number else tensor for i, tensor in enumerate(inputs)), made)
        assert all(torch.equal(one, other) for one, other in zip(near, far, strict=True))


@WITHOUT_AND_WITH_DESCRIPTORS
def test_a_document_of_nans_changes_no_bit_of_the_others(descriptors, triton_device, monkeypatch):
    small_blocks(monkeypatch, descriptors=descriptors)
    inputs = NEIGHBOURS.inputs(torch.float32, triton_device)
    spoilt, others = with_nans(inputs, slice(21, 46))
    found = []
    for given in (inputs, spoilt):
        found.append([gradient[others] for gradient in backward(NEIGHBOURS, *given)])
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))
