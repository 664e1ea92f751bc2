"""The backward kernels at the borders of tiles, windows, segments and blocks, against autograd of the formula in float64."""

from dataclasses import replace

import pytest
import torch

import kernels.attention.backward as module
from kernels import configurations
from kernels.attention.forward import attention_forward
from tests.kernels.attention_rows import (
    NEIGHBOURS,
    ROWS,
    WITH_DTYPES,
    Row,
    plain_gradients,
    small_blocks,
    with_nans,
    with_unseen_changed,
)
from tests.kernels.error_rule import check, far_apart


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch):
    small_blocks(monkeypatch, passes=1)


NAMES = ("d query", "d key", "d value")
# One pass in every case; of two passes, whose pass over keys is the same kernel, the rows with the most kinds of ranges.
TWO_PASSES = ("no window, nothing, padding", "prompt that only a tile's first part sees")
BOTH_FORMS = pytest.mark.parametrize(("passes", "descriptors"), [(1, False), (2, True)])


def backward(row, query, key, value, grad, made=None):
    """Gradients of query, key and value by the kernels. made: the forward pass's output and log-sum-exp, if known."""
    work = row.work(query.device)
    out, lse = made or attention_forward(query, key, value, work.work, *work.numbers)
    return module.attention_backward(grad, query, key, value, out, lse, work.work, *work.numbers)


@pytest.mark.parametrize(
    ("name", "dtype", "passes"),
    [pytest.param(*case.values, 1, id=case.id) for case in WITH_DTYPES]
    + [pytest.param(*case.values, 2, id=f"{case.id}-two passes") for case in WITH_DTYPES if case.values[0] in TWO_PASSES],
)
def test_gradients_are_right(name, dtype, passes, triton_device, monkeypatch):
    small_blocks(monkeypatch, passes=passes)
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
    """Of the two passes: one pass reads by pointers alone."""
    row = ROWS["prompt beyond the window"]
    inputs = row.inputs(torch.float16, triton_device)
    found = []
    for descriptors in (False, True):
        small_blocks(monkeypatch, descriptors=descriptors, passes=2)
        found.append(backward(row, *inputs))
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


def test_programs_add_to_a_block_of_queries_in_the_order_of_the_text(triton_device, monkeypatch):
    """In every order that tiles' numbers allow: the tiles of another document in between change no bit of the gradients."""
    small_blocks(monkeypatch, passes=1)
    alone, before, behind = Row((40,), None, 16), Row((33, 40), None, 16), Row((40, 33), None, 16)
    inputs = alone.inputs(torch.float32, triton_device)
    expected = backward(alone, *inputs)
    for row, own in ((before, slice(33, 73)), (behind, slice(40))):
        others = row.inputs(torch.float32, triton_device, seed=7)
        for target, source in zip(others, inputs, strict=True):
            target[own] = source
        assert all(torch.equal(one, other[own]) for one, other in zip(expected, backward(row, *others), strict=True))


@pytest.mark.parametrize("given", [{"tile": 24}, {"rows": 16, "block": 32}], ids=str)
def test_tiles_and_blocks_outside_of_one_grid_take_two_passes(given, triton_device, monkeypatch):
    row = Row((25, 7), 9, given.get("tile", 32))
    inputs = row.inputs(torch.float16, triton_device)
    small_blocks(monkeypatch, passes=2)
    expected = backward(row, *inputs)
    small_blocks(monkeypatch, passes=1)
    for table in configurations.TABLES.values():
        sizes = {name: size for name, size in given.items() if name != "tile"}
        monkeypatch.setitem(table, "attention_backward", replace(table["attention_backward"], **sizes))
    assert all(torch.equal(one, other) for one, other in zip(expected, backward(row, *inputs), strict=True))


def test_one_pass_is_another_sum_than_two_passes(triton_device, monkeypatch):
    """The setting chooses: gradients of queries differ in rounding, gradients of keys and values in no bit."""
    row = Row((48,), None, 16)
    inputs = row.inputs(torch.float32, triton_device)
    found = []
    for passes in (1, 2):
        small_blocks(monkeypatch, passes=passes)
        found.append(backward(row, *inputs))
    (one, *keys), (other, *same) = found
    assert not torch.equal(one, other)
    assert all(torch.equal(*pair) for pair in zip(keys, same, strict=True))


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


@BOTH_FORMS
def test_offsets_beyond_31_bits_are_right(passes, descriptors, triton_device, monkeypatch):
    small_blocks(monkeypatch, passes=passes, descriptors=descriptors)
    row = Row((3,), 2, 16)
    inputs = [tensor.contiguous() for tensor in row.inputs(torch.float16, triton_device)]
    work = row.work(triton_device)
    made = attention_forward(*inputs[:3], work.work, *work.numbers)
    near = backward(row, *inputs, made)
    for number in range(4):
        far = backward(row, *(far_apart(tensor) if i == number else tensor for i, tensor in enumerate(inputs)), made)
        assert all(torch.equal(one, other) for one, other in zip(near, far, strict=True))


@BOTH_FORMS
def test_a_document_of_nans_changes_no_bit_of_the_others(passes, descriptors, triton_device, monkeypatch):
    small_blocks(monkeypatch, passes=passes, descriptors=descriptors)
    inputs = NEIGHBOURS.inputs(torch.float32, triton_device)
    spoilt, others = with_nans(inputs, slice(21, 46))
    found = []
    for given in (inputs, spoilt):
        found.append([gradient[others] for gradient in backward(NEIGHBOURS, *given)])
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


@pytest.mark.parametrize("row", [Row((), 4, 16), Row((), 4, 16, (2, 1), padding=17), Row((0, 0), 4, 16)], ids=str)
def test_rows_without_documents_give_zeros_in_one_pass(row, triton_device):
    """Rows with tiles of padding alone, and rows without any tile."""
    inputs = row.inputs(torch.float32, triton_device)
    for gradient, tensor in zip(backward(row, *inputs), inputs, strict=False):
        assert torch.equal(gradient, torch.zeros_like(tensor))


@pytest.mark.filterwarnings("ignore:overflow encountered in exp2")
def test_places_behind_a_prompt_weigh_nothing_where_all_scores_are_very_negative(triton_device):
    """Their score is 0: beside scores of -500 their weight would be infinite, and the answer's gradient NaN."""
    row = Row((5, 4), None, 16, (1, 1), (-1, 0))
    inputs = row.inputs(torch.float16, triton_device)
    inputs[0], inputs[1] = inputs[0] / 64 + 12, inputs[1] / 64 - 12
    seen = row.visible()
    exact = plain_gradients(*(tensor.double() for tensor in inputs[:3]), seen, inputs[3].double())
    usual = plain_gradients(*inputs[:3], seen, inputs[3])
    for given, *results in zip(NAMES, backward(row, *inputs), exact, usual, strict=True):
        check(given, *results, sums=2)
