"""The forward kernel at the borders of tiles, windows, segments and blocks, against the formula in float64."""

import pytest
import torch
import triton
import triton.language as tl

import kernels.attention.forward as module
from kernels.attention.tiles import store_rows
from kernels.launch import launch
from tests.kernels.attention_rows import (
    NEIGHBOURS,
    ROWS,
    WITH_DTYPES,
    WITHOUT_AND_WITH_DESCRIPTORS,
    Row,
    plain,
    small_blocks,
    with_nans,
    with_unseen_changed,
)
from tests.kernels.error_rule import check, far_apart
from tests.kernels.last_program import vast


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch):
    small_blocks(monkeypatch)


def forward(row, query, key, value):
    """(output, log-sum-exp) by the kernel."""
    work = row.work(query.device)
    return module.attention_forward(query, key, value, work.work, *work.numbers)


@pytest.mark.parametrize(("name", "dtype"), WITH_DTYPES)
def test_output_and_log_sum_exp_are_right(name, dtype, triton_device):
    row = ROWS[name]
    query, key, value, _ = row.inputs(dtype, triton_device)
    seen = row.visible()
    exact = plain(*(tensor.double() for tensor in (query, key, value)), seen)
    usual = plain(query, key, value, seen)
    out, lse = forward(row, query, key, value)
    check("out", out, exact[0], usual[0])
    some = seen.any(dim=1).to(triton_device)
    check("log-sum-exp", lse[:, some], exact[1][:, some], usual[1].float()[:, some])
    assert (out[~some] == 0).all()
    assert (lse[:, ~some] == float("-inf")).all()


def test_pointers_and_descriptors_give_the_same_bits(triton_device, monkeypatch):
    row = ROWS["shared prompt"]
    inputs = row.inputs(torch.float16, triton_device)[:3]
    found = []
    for descriptors in (False, True):
        small_blocks(monkeypatch, descriptors=descriptors)
        found += [forward(row, *inputs)]
    # Heads that do not lie side by side are copied.
    apart = [tensor.transpose(0, 1).contiguous().transpose(0, 1) for tensor in inputs]
    found += [forward(row, *apart)]
    for other in found[1:]:
        assert all(torch.equal(one, another) for one, another in zip(found[0], other, strict=True))


@pytest.mark.parametrize(("dtype", "places"), [(torch.float32, slice(20, 21)), (torch.float16, slice(55, 60))], ids=str)
def test_unseen_places_change_no_bit(dtype, places, triton_device):
    """Neither other documents, nor later places, nor places before the window, in visited blocks and in others."""
    row = ROWS["prompt beyond the window"]
    inputs = row.inputs(dtype, triton_device)[:3]
    before = forward(row, *inputs)
    changed, unseen = with_unseen_changed(row, inputs, places)
    assert unseen.any()
    after = forward(row, *changed)
    assert torch.equal(before[0][places], after[0][places])
    assert torch.equal(before[1][:, places], after[1][:, places])


@pytest.mark.parametrize("descriptors", [False, True])
def test_offsets_beyond_31_bits_are_right(descriptors, triton_device, monkeypatch):
    small_blocks(monkeypatch, descriptors=descriptors)
    row = Row((3,), 2, 16)
    inputs = [tensor.contiguous() for tensor in row.inputs(torch.float16, triton_device)[:3]]
    near = forward(row, *inputs)
    for number in range(3):
        far = forward(row, *(far_apart(tensor) if i == number else tensor for i, tensor in enumerate(inputs)))
        assert all(torch.equal(one, other) for one, other in zip(near, far, strict=True))


@WITHOUT_AND_WITH_DESCRIPTORS
def test_a_document_of_nans_changes_no_bit_of_the_others(descriptors, triton_device, monkeypatch):
    small_blocks(monkeypatch, descriptors=descriptors)
    inputs = NEIGHBOURS.inputs(torch.float32, triton_device)
    spoilt, others = with_nans(inputs, slice(21, 46))
    found = []
    for given in (inputs, spoilt):
        out, lse = forward(NEIGHBOURS, *given[:3])
        found.append([out[others], lse[:, others]])
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


@triton.jit
def _store_kernel(target, first, limit, ROWS: tl.constexpr, SIZE: tl.constexpr):
    store_rows(target, tl.full((ROWS, SIZE), 3.0, tl.float32), first, limit, 0, ROWS, 1, SIZE)


def test_rows_beyond_31_bits_of_offset_are_stored(triton_device):
    """By the kernels' own function: a whole output of this size takes too much memory to fill."""
    size = rows = 16
    first = 2**31 // size
    target = vast((first + rows + 1) * size, torch.float16, triton_device)
    target[first * size :] = 0
    launch(_store_kernel, (1,), target, first, first + rows - 1, ROWS=rows, SIZE=size, device=target.device, warps=1)
    stored = target[first * size :].view(-1, size)
    assert (stored[: rows - 1] == 3).all()
    assert (stored[rows - 1 :] == 0).all()
