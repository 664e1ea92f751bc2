"""Attention of new places to a ring, at the borders of windows, blocks, splits and the ring, against the formula in float64."""

from dataclasses import dataclass, replace

import pytest
import torch

import kernels.attention.decode as module
from kernels import configurations
from kernels.launch import INTERPRETED
from tests.kernels.attention_rows import Row, plain
from tests.kernels.conftest import DTYPES
from tests.kernels.error_rule import check, far_apart, random

BLOCK = 16


@dataclass(frozen=True)
class Text:
    """seen: places before the new ones. room: places of the ring. heads: (query heads, key/value heads)."""

    seen: int
    new: int
    window: int | None
    room: int
    heads: tuple[int, int] = (1, 1)
    size: int = 16

    def inputs(self, dtype, device, seed=0) -> list[torch.Tensor]:
        """Queries of the new places, and keys and values of the whole text."""
        heads, kv_heads = self.heads
        tokens = self.seen + self.new
        query = random(self.new, heads, self.size, dtype=dtype, device=device, seed=seed)
        return [query, *(random(tokens, kv_heads, self.size, dtype=dtype, device=device, seed=seed + i) for i in (1, 2))]

    def decode(self, query, key, value):
        """The operator's output. The ring holds NaN where no place was written."""
        rings = []
        for tensor in (key, value):
            ring = tensor.new_full((self.room, *tensor.shape[1:]), float("nan"))
            for place in range(max(0, self.seen - self.room), self.seen):
                ring[place % self.room] = tensor[place]
            rings.append(ring)
        return module.decode_attention(query, key[self.seen :], value[self.seen :], *rings, self.seen, self.window)

    def plain(self, query, key, value):
        """The formula over the whole text."""
        whole = torch.cat((query.new_zeros((self.seen, *query.shape[1:])), query))
        return plain(whole, key, value, Row((len(whole),), self.window, BLOCK).visible())[0][self.seen :]


TEXTS = {
    "the first place": Text(0, 1, 8, 0),
    "window of 1": Text(5, 2, 1, 1),
    "window of 2": Text(18, 1, 2, 1, (4, 1)),
    "a block": Text(40, 1, 16, 16, (2, 1)),
    "one more than a block": Text(37, 1, 17, 16, (2, 2)),
    "wrapped, several splits": Text(150, 1, 100, 100, (8, 2)),
    "ring of more than the window": Text(70, 3, 20, 33, (2, 1)),
    "a text shorter than the window": Text(21, 5, 64, 30, (4, 2)),
    "no window": Text(30, 4, None, 40, (2, 1)),
    "a few tokens, wrapped": Text(45, 7, 34, 33, (4, 1)),
    "more new places than the window": Text(20, 23, 9, 9, (4, 1)),
    "head size of 64": Text(9, 1, 8, 8, (1, 1), 64),
    "odd head size": Text(9, 2, 6, 8, (2, 1), 12),
}
# On a GPU every text in every dtype; in the interpreter the dtypes alternate.
WITH_DTYPES = [
    pytest.param(name, dtype, id=f"{name}-{str(dtype).removeprefix('torch.')}")
    for number, name in enumerate(TEXTS)
    for dtype in (DTYPES[number % 2 :][:1] if INTERPRETED else DTYPES)
]


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch):
    """Give the kernel blocks and tiles so small that texts are split, and a few splits are empty."""
    for table in configurations.TABLES.values():
        small = {"block": BLOCK, "rows": 32, "programs": 10}
        monkeypatch.setitem(table, "attention_decode", replace(table["attention_decode"], **small))
        monkeypatch.setitem(table, "attention_combine", replace(table["attention_combine"], rows=4))


@pytest.mark.parametrize(("name", "dtype"), WITH_DTYPES)
def test_the_output_is_right(name, dtype, device):
    text = TEXTS[name]
    inputs = text.inputs(dtype, device)
    check("out", text.decode(*inputs), text.plain(*(tensor.double() for tensor in inputs)), text.plain(*inputs))


@pytest.mark.parametrize("name", TEXTS)
def test_equals_the_formula_in_float64(name, reference_device):
    text = TEXTS[name]
    inputs = text.inputs(torch.float64, reference_device)
    torch.testing.assert_close(text.decode(*inputs), text.plain(*inputs), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", ["ring of more than the window", "a few tokens, wrapped"])
def test_unseen_places_change_no_bit(name, dtype, device):
    """Neither places before the window that the ring still holds, nor the new places after the first one."""
    text = TEXTS[name]
    query, key, value = text.inputs(dtype, device)
    before = text.decode(query, key, value)
    large = 1e2 if dtype == torch.float16 else 1e4
    for new in (0, text.new - 1):
        place = torch.arange(len(key), device=device)
        unseen = (place > text.seen + new) | (place <= text.seen + new - text.window)
        changed = [torch.where(unseen[:, None, None], large * tensor.sign(), tensor) for tensor in (key, value)]
        after = text.decode(query, *changed)
        assert torch.equal(before[new], after[new])
        assert not torch.equal(before, after)


@pytest.mark.parametrize("offset", [400.0, -400.0])
def test_scores_far_from_0_are_right(offset, device):
    """Exponentials of such scores, and of the splits' log-sum-exps, lie outside float32 without the subtraction of the peak."""
    text = TEXTS["wrapped, several splits"]
    query, key, value = text.inputs(torch.float32, device)
    query[..., 0], key[..., 0] = text.size**0.5, offset
    inputs = [query, key, value]
    check("out", text.decode(*inputs), text.plain(*(tensor.double() for tensor in inputs)), text.plain(*inputs))


def test_two_runs_give_the_same_bits(dtype, device):
    text = TEXTS["wrapped, several splits"]
    inputs = text.inputs(dtype, device)
    assert torch.equal(text.decode(*inputs), text.decode(*inputs))


def test_strides_do_not_change_results(device):
    """Parts of a packed row, and strided elements."""
    text = TEXTS["a few tokens, wrapped"]
    inputs = text.inputs(torch.float32, device)
    expected = text.decode(*inputs)
    layouts = (
        lambda tensor: torch.cat((tensor, tensor), dim=1)[:, : tensor.shape[1]],
        lambda tensor: tensor.mT.contiguous().mT,
    )
    for layout in layouts:
        assert torch.equal(text.decode(*(layout(tensor) for tensor in inputs)), expected)


def test_no_new_places_give_an_empty_output(dtype, device):
    text = Text(5, 0, 4, 8, (2, 1))
    assert text.decode(*text.inputs(dtype, device)).shape == (0, 2, 16)


def test_a_ring_that_lost_visible_places_is_refused(device):
    for text in (Text(9, 1, 4, 2), Text(9, 1, None, 8)):
        with pytest.raises(ValueError, match=r"sees \d earlier tokens, but the ring has room for \d: enlarge"):
            text.decode(*text.inputs(torch.float32, device))


def test_offsets_beyond_31_bits_are_right(triton_device):
    query, key, value = Text(3, 3, 2, 3).inputs(torch.float16, triton_device)
    inputs = [query, key[3:], value[3:], key[:3], value[:3]]
    near = module.decode_attention(*inputs, 3, None)
    for number in range(5):
        far = [far_apart(tensor) if i == number else tensor for i, tensor in enumerate(inputs)]
        assert torch.equal(module.decode_attention(*far, 3, None), near)


def test_the_custom_operator_passes_torchs_checks(triton_device):
    query, key, value = Text(3, 1, 2, 3).inputs(torch.float32, triton_device)
    torch.library.opcheck(module._decode.registered, (query, key[3:], value[3:], key[:3], value[:3], 3, 2))


@pytest.mark.gpu
@pytest.mark.parametrize("size", [64, 128])
@pytest.mark.parametrize(("new", "window", "seen"), [(1, 4096, 9000), (1, 4095, 4095), (7, 4097, 5000), (300, 512, 700)])
def test_on_a_gpu_the_models_windows_are_right(new, window, seen, size, monkeypatch):
    monkeypatch.undo()
    text = Text(seen, new, window, window, (8, 2), size)
    inputs = text.inputs(torch.bfloat16, torch.device("cuda"))
    check("out", text.decode(*inputs), text.plain(*(tensor.double() for tensor in inputs)), text.plain(*inputs))
