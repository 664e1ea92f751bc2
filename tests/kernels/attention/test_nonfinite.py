"""Values that are not finite stay in their document: whatever it holds, its neighbours' results keep their bits."""

import pytest
import torch

from kernels.attention.sliding_window import sliding_window_attention
from kernels.attention.work import attention_work
from kernels.launch import INTERPRETED
from tests.kernels.attention_rows import Row, small_blocks

NAN, INF = float("nan"), float("inf")
# Ends of ranges inside a block and at its end, neighbours before and behind, windows, shared prefixes, and padding.
ROWS = {
    "documents": (Row((5, 18, 7), None, 16, (2, 1), padding=2), slice(5, 23)),
    "the last document": (Row((19, 6), 9, 16), slice(19, 25)),
    "an answer": (Row((6, 5, 7), 8, 16, (1, 1), (-1, 0, 0)), slice(6, 11)),
    "padding": (Row((11,), 5, 16, padding=3), slice(11, 14)),
}
PARTS = ("query", "key", "value", "grad")
# Only kernels have passes. Infinities take the same paths as NaN, so they have fewer cases.
FORMS = (1, 2) if INTERPRETED or torch.cuda.is_available() else (None,)
CASES = [(name, PARTS, NAN, passes) for name in ROWS for passes in FORMS] + [
    ("documents", (part,), INF, FORMS[0]) for part in PARTS
]


def results(row, tensors):
    leaves = [tensor.detach().requires_grad_() for tensor in tensors[:3]]
    out = sliding_window_attention(*leaves, work=row.work(tensors[0].device))
    return [out.detach(), *torch.autograd.grad(out, leaves, tensors[3])]


@pytest.mark.parametrize(("name", "part", "value", "passes"), CASES, ids=str)
def test_neighbours_keep_their_bits(name, part, value, passes, device, monkeypatch):
    small_blocks(monkeypatch, **({} if passes is None else {"passes": passes, "descriptors": True}))
    row, broken = ROWS[name]
    tensors = row.inputs(torch.float32, device)
    expected = results(row, tensors)
    spoilt = [tensor.clone() for tensor in tensors]
    for which, tensor in zip(PARTS, spoilt, strict=True):
        if which in part:
            tensor[broken] = value
    found = results(row, spoilt)
    others = torch.ones(row.tokens, dtype=torch.bool)
    others[broken] = False
    if name == "an answer":
        # The answer's gradients reach the prompt, which it sees.
        assert all(torch.equal(one[:6], other[:6]) for one, other in zip(expected[:2], found[:2], strict=True))
        others[:6] = False
    assert all(torch.equal(one[others], other[others]) for one, other in zip(expected, found, strict=True))
    if name == "padding":
        assert all((one[broken] == 0).all() for one in found)
    elif part == PARTS:
        assert all(one[broken].isnan().all() for one in found)
    else:
        assert not all(one[broken].isfinite().all() for one in found)


def test_a_query_of_nans_is_not_taken_for_padding(device, monkeypatch):
    small_blocks(monkeypatch)
    row = Row((9,), 4, 16, padding=2)
    tensors = row.inputs(torch.float32, device)
    tensors[0][3] = NAN
    out = results(row, tensors)[0]
    assert out[3].isnan().all()
    assert out[[*range(3), *range(4, 11)]].isfinite().all()
    assert (out[9:] == 0).all()


def test_work_lists_are_equal_to_themselves_alone():
    """Comparing the tensors would raise an error."""
    one, other = (attention_work([0, 3], None) for _ in range(2))
    assert one == one
    assert one != other
