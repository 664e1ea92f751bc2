"""The public attention function, with every backend, against the formula in float64."""

import importlib.util
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

import kernels.attention.backends as backends
import kernels.attention.sliding_window as module
from kernels.attention.sliding_window import sliding_window_attention, sliding_window_attention_with_lse
from kernels.launch import INTERPRETED
from tests.kernels.attention_rows import ROWS, Row, plain, small_blocks, with_nans, with_unseen_changed
from tests.kernels.error_rule import check, compare

# The interpreter is slow: here it runs one row; test_forward.py and test_backward.py run all rows on it.
FEW = ("prompt beyond the window",) if INTERPRETED else tuple(ROWS)
NAMES = ("query", "key", "value")


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch):
    small_blocks(monkeypatch)


def leaves(row, dtype, device, seed=0):
    *tensors, grad = row.inputs(dtype, device, seed)
    return [tensor.detach().requires_grad_() for tensor in tensors], grad


def results(row, tensors, grad, **given):
    """(output, gradients of query, key and value)."""
    out = sliding_window_attention(*tensors, work=row.work(grad.device), **given)
    return [out.detach(), *torch.autograd.grad(out, tensors, grad)]


@pytest.mark.parametrize("name", FEW)
def test_output_and_gradients_keep_the_error_rule(name, dtype, device):
    row = ROWS[name]
    tensors, grad = leaves(row, dtype, device)
    work, seen = row.work(device), row.visible()
    # With a window of 1 the gradients of query and key are 0: the error rule has no size to compare their rounding with.
    given = {
        name: tensor if row.window != 1 or name == "value" else tensor.detach()
        for name, tensor in zip(NAMES, tensors, strict=True)
    }
    # A key's gradient is a sum over the query heads that read it and the segments that see it.
    segments = 1 + sum(prefix >= 0 for prefix in row.prefixes or ())
    sums = {f"d {name}": row.heads[0] // row.heads[1] * segments for name in NAMES}
    compare(
        lambda *inputs: sliding_window_attention(*inputs, work=work),
        lambda *inputs: plain(*inputs, seen)[0],
        given,
        {"out": grad},
        sums,
    )


@pytest.mark.parametrize("name", ROWS)
def test_equals_the_formula_in_float64(name, reference_device):
    row = ROWS[name]
    tensors, grad = leaves(row, torch.float64, reference_device)
    out, lse = sliding_window_attention_with_lse(*tensors, work=row.work(reference_device))
    expected = plain(*tensors, row.visible())
    torch.testing.assert_close((out, lse), expected, rtol=1e-12, atol=1e-12)
    ours, theirs = (torch.autograd.grad(result, tensors, grad) for result in (out, expected[0]))
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)


def test_asking_for_the_log_sum_exp_changes_no_output_and_gives_it_no_gradient(dtype, device):
    row = Row((5, 0, 12), 7, 16, (2, 1), padding=2)
    tensors, _ = leaves(row, dtype, device)
    out, lse = sliding_window_attention_with_lse(*tensors, work=row.work(device))
    assert torch.equal(out, sliding_window_attention(*tensors, work=row.work(device)))
    assert (lse.dtype, lse.shape, lse.requires_grad, out.requires_grad) == (torch.float32, (2, 19), False, True)
    assert (lse[:, -2:] == float("-inf")).all()
    assert (out[-2:] == 0).all()


def test_document_bounds_give_the_same_output_as_work_lists(device):
    row = Row((5, 0, 12), 7, 128, (2, 1), padding=2)
    tensors, _ = leaves(row, torch.float32, device)
    cu_docs = torch.tensor(row.bounds, dtype=torch.int32)
    found = sliding_window_attention(*tensors, cu_docs, 7)
    assert torch.equal(found, sliding_window_attention(*tensors, work=row.work(device)))


def test_missing_work_lists_and_lists_of_another_length_are_refused(device):
    row = Row((9,), 7, 16)
    tensors, _ = leaves(row, torch.float32, device)
    with pytest.raises(ValueError, match=r"needs work from attention_work\(...\)"):
        sliding_window_attention(*tensors)
    with pytest.raises(ValueError, match="for a row of 9 tokens, query has 8"):
        sliding_window_attention(*(tensor[:8] for tensor in tensors), work=row.work(device))
    if device.type == "cuda":
        with pytest.raises(ValueError, match="cu_docs on the CPU"):
            sliding_window_attention(*tensors, torch.tensor([0, 9], device=device), 7)


def test_neighbouring_documents_change_no_bit(dtype, device):
    """A document alone equals the same document behind a short document, behind a longer document, and beside large values."""
    alone = Row((21,), 9, 16, (2, 1))
    tensors, grad = leaves(alone, dtype, device)
    expected = results(alone, tensors, grad)
    for before in ((5,),) if INTERPRETED else ((5,), (33,), (1, 16)):
        row = Row((*before, 21, 4), 9, 16, (2, 1))
        own = slice(sum(before), sum(before) + 21)
        others, other_grad = leaves(row, dtype, device, seed=7)
        large, _ = with_unseen_changed(row, [*others, other_grad], own)
        for target, source in zip(large, [*tensors, grad], strict=True):
            target[own] = source.detach()
        found = results(row, [tensor.detach().requires_grad_() for tensor in large[:3]], large[3])
        assert all(torch.equal(one, other[own]) for one, other in zip(expected, found, strict=True))


def test_an_answer_changes_no_bit_of_another_answer_to_the_same_prompt(device):
    """Neither the contents nor the length of the first answer change the prompt's and the second answer's outputs."""
    one, other = (Row((20, length, 11), 16, 16, (1, 1), (-1, 0, 0)) for length in (3, 18))
    tensors, grad = leaves(one, torch.float32, device)
    expected = results(one, tensors, grad)
    changed, _ = leaves(other, torch.float32, device, seed=5)
    for number, tensor in enumerate(tensors):
        changed[number] = torch.cat((tensor[:20], changed[number][20:38], tensor[23:])).detach().requires_grad_()
    found = results(other, changed, torch.cat((grad[:20], grad[:18], grad[23:])))
    assert torch.equal(expected[0][:20], found[0][:20])
    assert torch.equal(expected[0][23:], found[0][38:])
    assert all(torch.equal(first[23:], second[38:]) for first, second in zip(expected[1:], found[1:], strict=True))


def test_a_token_sees_exactly_the_last_n_tokens_of_a_window_of_n(device):
    """A changed value changes the output of token 20 if and only if its token is in the window, 13 to 20."""
    row = Row((30,), 8, 16)
    tensors, grad = leaves(row, torch.float32, device)
    before = results(row, tensors, grad)[0]
    for place, seen in ((20 - 7, True), (20 - 8, False), (20, True), (21, False)):
        changed = [tensor.detach().clone() for tensor in tensors]
        changed[2][place] += 1
        after = sliding_window_attention(*changed, work=row.work(device))
        assert torch.equal(before[20], after[20]) != seen


def test_two_runs_are_equal_to_the_bit(device):
    row = ROWS["empty prompt"] if INTERPRETED else ROWS["shared prompt"]
    tensors, grad = leaves(row, torch.float16, device)
    runs = [results(row, tensors, grad) for _ in range(2)]
    assert all(torch.equal(one, other) for one, other in zip(*runs, strict=True))


def test_memory_layouts_do_not_matter(device):
    """Views of a packed row equal contiguous tensors, tensors with a gap between heads, and tensors with strided elements."""
    row = Row((9,), 5, 16, (2, 1))
    tensors, grad = leaves(row, torch.float32, device)
    assert not row.inputs(torch.float32, device)[0].is_contiguous()
    expected = results(row, tensors, grad)
    layouts = (
        torch.Tensor.contiguous,
        lambda tensor: torch.cat((tensor, tensor), dim=2)[..., :16],
        lambda tensor: torch.stack((tensor, tensor), dim=3)[..., 0],
    )
    for layout in layouts:
        given = [layout(tensor.detach()).requires_grad_() for tensor in tensors]
        found = results(row, given, layout(grad))
        if INTERPRETED:
            assert all(torch.equal(one, other) for one, other in zip(expected, found, strict=True))
        # Eager matrix products may sum in another order for another layout.
        torch.testing.assert_close(expected, found)


@pytest.mark.parametrize("row", [Row((), 4, 16, (2, 1)), Row((), 4, 16, (2, 1), padding=3), Row((0, 0), 4, 16)], ids=str)
def test_rows_without_tokens_give_zeros(row, dtype, device):
    tensors, grad = leaves(row, dtype, device)
    for found, tensor in zip(results(row, tensors, grad), [tensors[0], *tensors], strict=True):
        assert found.shape == tensor.shape
        assert (found == 0).all()


def test_outputs_and_gradients_of_padding_are_zero(dtype, device):
    row = Row((5,), 4, 16, (2, 1), padding=3)
    tensors, grad = leaves(row, dtype, device)
    assert all((found[5:] == 0).all() for found in results(row, tensors, grad))


def test_custom_operators_pass_torchs_checks(triton_device):
    row = Row((3,), 2, 16)
    tensors, grad = leaves(row, torch.float32, triton_device)
    lists = row.work(triton_device)
    torch.library.opcheck(module._attention.registered, (*tensors, lists.work, *lists.numbers))
    made = [result.detach() for result in module._attention(*tensors, lists.work, *lists.numbers)]
    given = [grad, *(tensor.detach() for tensor in tensors), *made]
    torch.library.opcheck(module._attention_backward.registered, (*given, lists.work, *lists.numbers))


@pytest.mark.parametrize("name", FEW)
def test_flex_equals_the_formula(name, reference_device):
    row = ROWS[name]
    if reference_device.type == "cuda" and row.size < 16:
        pytest.skip("compiled FlexAttention needs heads of at least 16 elements")
    query, key, value, _ = row.inputs(torch.float32, reference_device)
    found = sliding_window_attention_with_lse(query, key, value, work=row.work(reference_device), backend="flex")
    expected = plain(*(tensor.double() for tensor in (query, key, value)), row.visible())
    torch.testing.assert_close([part.double() for part in found], list(expected), rtol=1e-4, atol=1e-5)


def test_flash_calls_the_flash_attn_package_where_torch_has_no_flash_attention(monkeypatch):
    """The package's interface: a window of n tokens is n - 1 to the left, log-sum-exps are [H, T], documents are bounds."""
    row = Row((9, 0, 4), 3, 16, (4, 2), padding=2)
    query, key, value, _ = row.inputs(torch.float16, torch.device("cpu"))
    expected = sliding_window_attention_with_lse(query, key, value, work=row.work(), backend="reference")
    calls = []

    def flash_attn_varlen_func(  # the signature of flash-attn 2.6
        q,
        k,
        v,
        cu_seqlens_q,
        cu_seqlens_k,
        max_seqlen_q,
        max_seqlen_k,
        dropout_p=0.0,
        softmax_scale=None,
        causal=False,
        window_size=(-1, -1),
        softcap=0.0,
        alibi_slopes=None,
        deterministic=False,
        return_attn_probs=False,
        block_table=None,
    ):
        calls.append((cu_seqlens_q.tolist(), cu_seqlens_k.tolist(), max_seqlen_q, max_seqlen_k, window_size))
        assert (dropout_p, softmax_scale, causal, deterministic, return_attn_probs) == (0.0, None, True, True, True)
        assert cu_seqlens_q.dtype == torch.int32
        return expected[0][: len(q)], expected[1][:, : len(q)], None

    monkeypatch.setitem(sys.modules, "flash_attn", SimpleNamespace(flash_attn_varlen_func=flash_attn_varlen_func))
    monkeypatch.setattr(backends, "_has_package", lambda: True)
    monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: False)
    backends._of_package.cache_clear()
    try:
        found = backends.flash_attention(query, key, value, row.work())
        backends.flash_attention(query, key, value, replace(row, window=None).work())
    finally:
        backends._of_package.cache_clear()
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
    assert calls == [([0, 9, 9, 13], [0, 9, 9, 13], 9, 9, window) for window in ((2, 0), (-1, 0))]


@pytest.mark.parametrize(("torchs", "package"), [(True, False), (False, True), (False, False)])
def test_flash_needs_torchs_flash_attention_or_the_package(torchs, package, monkeypatch):
    monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: torchs)
    monkeypatch.setattr(backends, "_has_package", lambda: package)
    problem = backends.cannot("flash", torch.device("cuda"), torch.bfloat16, gradients=True, prefixes=False)
    assert (problem is None) == (torchs or package)
    assert torchs or package or "or the package flash-attn 2.6 or newer" in problem


def test_a_backend_refuses_the_dtypes_devices_and_layouts_it_lacks(device):
    row = Row((5, 4), 3, 16, (2, 1), (-1, 0))
    tensors, _ = leaves(row, torch.float32, device)
    work = row.work(device)
    with pytest.raises(ValueError, match="backend flash needs float16 or bfloat16 on CUDA; given float32 on"):
        sliding_window_attention(*tensors, work=work, backend="flash")
    with pytest.raises(ValueError, match=r"backend triton needs float32, float16 or bfloat16 on CUDA.*float64"):
        sliding_window_attention(*(tensor.double() for tensor in tensors), work=work, backend="triton")
    if device.type == "cuda":
        with pytest.raises(ValueError, match="backend flash cannot share prefixes"):
            sliding_window_attention(*(tensor.half() for tensor in tensors), work=work, backend="flash")
    else:
        with pytest.raises(ValueError, match="backend flex has no gradients on a CPU"):
            sliding_window_attention(*tensors, work=work, backend="flex")


def test_backend_reference_is_the_reference_and_auto_chooses_by_device_and_dtype(dtype, device):
    row = Row((9, 4), 3, 16, (2, 1))
    tensors, _ = leaves(row, dtype, device)
    work = row.work(device)
    found = sliding_window_attention(*tensors, work=work, backend="reference")
    assert torch.equal(found, module.sliding_window_attention_reference(*tensors, work=work))
    auto = sliding_window_attention(*tensors, work=work)
    if INTERPRETED or (device.type == "cuda" and dtype.itemsize == 2):
        assert torch.equal(auto, sliding_window_attention(*tensors, work=work, backend="triton"))
    elif device.type == "cuda":
        assert torch.equal(auto, found)
    else:
        # Sums in float16 differ by a rounding of their largest value, here near 1.
        torch.testing.assert_close(auto, found, rtol=1e-5, atol=2 * torch.finfo(dtype).eps)


# Small tiles, and tiles with more keys than the CPU path gathers at a time. The long document sees all of itself.
MIXED = Row((21, 300, 5, 40, 16), None, 128, (4, 2), (-1, -1, -1, 2, 2), padding=3)


def test_tiles_of_all_sizes_equal_the_formula_in_float64(device):
    tensors, grad = leaves(MIXED, torch.float64, device)
    out = sliding_window_attention(*tensors, work=MIXED.work(device))
    expected = plain(*tensors, MIXED.visible())[0]
    torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)
    ours, theirs = (torch.autograd.grad(result, tensors, grad) for result in (out, expected))
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("broken", [slice(0, 21), slice(21, 321)], ids=["small tile", "large tiles"])
def test_a_document_of_nans_changes_no_bit_of_the_others(broken, reference_device):
    tensors, grad = leaves(MIXED, torch.float32, reference_device)
    expected = results(MIXED, tensors, grad, backend="reference")
    spoilt, others = with_nans((*tensors, grad), broken)
    found = results(MIXED, [tensor.requires_grad_() for tensor in spoilt[:3]], spoilt[3], backend="reference")
    assert all(torch.equal(one[others], other[others]) for one, other in zip(expected, found, strict=True))
    assert found[0][broken].isnan().all()


FULL_SIZES = [
    Row((4095, 4096, 4097, 1), 4096, 128, (2, 1), size=128),
    Row((4500,), 4095, 128, (2, 2), size=64),
    Row((300, 4097, 127, 128, 129), 4097, 128, (2, 1), size=64),
    Row((640,), 1, 128, (8, 1), size=128),
    Row((1000, 700, 1300), 512, 128, (4, 1), (-1, 0, 0), size=128),
    Row((700, 5, 300), 128, 128, (2, 2), (-1, 0, 0), size=64),
]


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["triton", "flash", "flex"])
@pytest.mark.parametrize("row", FULL_SIZES, ids=str)
def test_full_size_windows_keep_the_error_rule_on_a_gpu(row, backend, monkeypatch):
    monkeypatch.undo()
    if backend == "flash" and (row.prefixes or importlib.util.find_spec("torch.nn.attention.varlen") is None):
        pytest.skip("flash cannot share prefixes, or this torch has no variable-length attention")
    device, dtype = torch.device("cuda"), torch.bfloat16
    tensors, grad = leaves(row, dtype, device)
    found = results(row, tensors, grad, backend=backend)
    seen, by_type = row.visible().to(device), {}
    for kind in (torch.float64, dtype):
        wide = [tensor.detach().to(kind).requires_grad_() for tensor in tensors]
        out = plain(*wide, seen)[0]
        by_type[kind] = [out.detach(), *torch.autograd.grad(out, wide, grad.to(kind))]
    names = ("out", "d query", "d key", "d value")
    for name, ours, exact, usual in zip(names, found, by_type[torch.float64], by_type[dtype], strict=True):
        if row.window != 1 or name in ("out", "d value"):
            check(name, ours, exact, usual, sums=row.heads[0])
