"""Attention of many texts' newest tokens to rows of a cache, at borders of blocks and splits, against the float64 formula."""

from dataclasses import dataclass, replace

import pytest
import torch

import kernels.attention.decode_rows as module
from kernels import configurations
from kernels.launch import INTERPRETED
from tests.kernels.conftest import DTYPES
from tests.kernels.error_rule import check, far_apart, random

BLOCK = 16


@dataclass(frozen=True)
class Rows:
    """counts: keys of each row. slots: of a row. heads: (query heads, key/value heads)."""

    counts: tuple[int, ...]
    slots: int
    heads: tuple[int, int] = (2, 1)
    size: int = 16

    def inputs(self, dtype, device, seed=0) -> list[torch.Tensor]:
        rows, (heads, kv_heads) = len(self.counts), self.heads
        query = random(rows, heads, self.size, dtype=dtype, device=device, seed=seed)
        shape = (rows, self.slots, kv_heads, self.size)
        return [query, *(random(*shape, dtype=dtype, device=device, seed=seed + i) for i in (1, 2))]

    def decode(self, query, key, value) -> torch.Tensor:
        counts = torch.tensor(self.counts, dtype=torch.int32, device=query.device)
        return module.decode_rows_attention(query, key, value, counts, max(self.counts))

    def plain(self, query, key, value) -> torch.Tensor:
        """The formula, row by row."""
        group, out = self.heads[0] // self.heads[1], []
        for row, count in enumerate(self.counts):
            key_JHE, value_JHE = (tensor[row, :count].repeat_interleave(group, dim=1) for tensor in (key, value))
            score_HJ = torch.einsum("he,jhe->hj", query[row], key_JHE) * self.size**-0.5
            weight_HJ = score_HJ.softmax(dim=-1, dtype=torch.promote_types(score_HJ.dtype, torch.float32))
            out.append(torch.einsum("hj,jhe->he", weight_HJ.to(query.dtype), value_JHE))
        return torch.stack(out)


CASES = {
    "one key": Rows((1,), 1),
    "rows of all lengths": Rows((1, 5, 16, 17, 40), 40, (4, 2)),
    "a block, and one more": Rows((16, 17), 33, (1, 1)),
    "full rows, several splits": Rows((150, 150), 150, (8, 2)),
    "splits without keys": Rows((1, 90), 96, (4, 4)),
    "head size of 64": Rows((9, 3), 16, (1, 1), 64),
    # The last row is full: behind its last key lies memory that no kernel may read.
    "odd head size": Rows((2, 12), 12, (2, 1), 12),
    "many heads of one key": Rows((7,), 8, (20, 1)),
}
# On a GPU every case in every dtype; in the interpreter the dtypes alternate.
WITH_DTYPES = [
    pytest.param(name, dtype, id=f"{name}-{str(dtype).removeprefix('torch.')}")
    for number, name in enumerate(CASES)
    for dtype in (DTYPES[number % 2 :][:1] if INTERPRETED else DTYPES)
]


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch):
    """Give the kernel blocks so small that rows are split, and a few splits are empty."""
    for table in configurations.TABLES.values():
        small = {"block": BLOCK, "programs": 10}
        monkeypatch.setitem(table, "attention_decode", replace(table["attention_decode"], **small))
        monkeypatch.setitem(table, "attention_combine", replace(table["attention_combine"], rows=4))


@pytest.mark.parametrize(("name", "dtype"), WITH_DTYPES)
def test_the_output_is_right(name, dtype, device):
    rows = CASES[name]
    inputs = rows.inputs(dtype, device)
    check("out", rows.decode(*inputs), rows.plain(*(tensor.double() for tensor in inputs)), rows.plain(*inputs))


@pytest.mark.parametrize("name", CASES)
def test_equals_the_formula_in_float64(name, reference_device):
    rows = CASES[name]
    inputs = rows.inputs(torch.float64, reference_device)
    torch.testing.assert_close(rows.decode(*inputs), rows.plain(*inputs), rtol=1e-12, atol=1e-12)


def test_a_row_reads_its_own_keys_alone_to_the_bit(dtype, device):
    """Neither other rows nor slots behind its count change a row, however large their values are."""
    rows = CASES["rows of all lengths"]
    query, key, value = rows.inputs(dtype, device)
    before = rows.decode(query, key, value)
    large = 1e2 if dtype == torch.float16 else 1e4
    for row, count in ((1, 5), (4, 40)):
        own = torch.zeros(key.shape[:2], dtype=torch.bool, device=device)
        own[row, :count] = True
        changed = [torch.where(own[..., None, None], tensor, large * tensor.sign()) for tensor in (key, value)]
        after = rows.decode(query, *changed)
        assert torch.equal(before[row], after[row])
        assert not torch.equal(before, after)


@pytest.mark.parametrize("offset", [400.0, -400.0])
def test_scores_far_from_0_are_right(offset, device):
    rows = CASES["full rows, several splits"]
    query, key, value = rows.inputs(torch.float32, device)
    query[..., 0], key[..., 0] = rows.size**0.5, offset
    inputs = [query, key, value]
    # Scores of 400 are rounded in another order than plain torch's.
    check("out", rows.decode(*inputs), rows.plain(*(tensor.double() for tensor in inputs)), rows.plain(*inputs), sums=20)


def test_the_order_of_a_ring_does_not_matter(device):
    """Only rounding changes where the keys of a full ring stand elsewhere in it."""
    rows = CASES["full rows, several splits"]
    query, key, value = rows.inputs(torch.float32, device)
    rolled = [tensor.roll(37, dims=1) for tensor in (key, value)]
    torch.testing.assert_close(rows.decode(query, *rolled), rows.decode(query, key, value), rtol=1e-5, atol=1e-6)


def test_strides_do_not_change_results(device):
    """Rows and slots of a larger cache, and strided elements, which torch's own operator sums in another order."""
    rows = CASES["rows of all lengths"]
    query, key, value = rows.inputs(torch.float32, device)
    expected = rows.decode(query, key, value)
    layouts = (
        lambda tensor: torch.cat((tensor, tensor), dim=1)[:, : tensor.shape[1]],
        lambda tensor: tensor.mT.contiguous().mT,
        lambda tensor: tensor.transpose(0, 1).contiguous().transpose(0, 1),
    )
    for layout in layouts:
        strided = rows.decode(layout(query), layout(key), layout(value))
        torch.testing.assert_close(strided, expected, rtol=0, atol=0 if INTERPRETED or device.type == "cuda" else 1e-6)


def test_counts_beyond_the_slots_are_refused(device):
    for counts in ((9, 2), (0,)):
        rows = Rows(counts, 8)
        with pytest.raises(ValueError, match=f"rows of up to {max(counts)} keys: must be at least 1 and at most the cache's 8"):
            rows.decode(*rows.inputs(torch.float32, device))


def test_offsets_beyond_31_bits_are_right(triton_device):
    rows = Rows((3, 2, 3), 3, (1, 1))
    query, key, value = rows.inputs(torch.float16, triton_device)
    near = rows.decode(query, key, value)
    for number in range(2):
        far = [far_apart(tensor) if i == number else tensor for i, tensor in enumerate((key, value))]
        assert torch.equal(rows.decode(query, *far), near)
        slots = [tensor[:1] for tensor in (key, value)]
        slots[number] = far_apart(slots[number][0])[None]
        assert torch.equal(Rows((3,), 3, (1, 1)).decode(query[:1], *slots), near[:1])


def test_the_custom_operator_passes_torchs_checks(triton_device):
    rows = CASES["a block, and one more"]
    counts = torch.tensor(rows.counts, dtype=torch.int32, device=triton_device)
    torch.library.opcheck(module._decode_rows.registered, (*rows.inputs(torch.float32, triton_device), counts, 17))


@pytest.mark.gpu
@pytest.mark.parametrize("size", [64, 128])
@pytest.mark.parametrize("counts", [(1, 4096, 77, 3000), (4096,) * 40])
def test_on_a_gpu_the_models_windows_are_right(counts, size, monkeypatch):
    monkeypatch.undo()
    rows = Rows(counts, 4096, (8, 2), size)
    inputs = rows.inputs(torch.bfloat16, torch.device("cuda"))
    check("out", rows.decode(*inputs), rows.plain(*(tensor.double() for tensor in inputs)), rows.plain(*inputs))
