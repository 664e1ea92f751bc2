"""The fused head, in each of its modes, against autograd over materialised logits."""

import functools

import pytest
import torch

import kernels.linear_log_prob as module
from kernels import TILE
from kernels.launch import INTERPRETED
from kernels.linear_log_prob import (
    linear_log_prob,
    linear_log_prob_reference,
    linear_log_prob_statistics,
    linear_nll,
)
from kernels.logit_budget import default_budget, plan, sum_of_parts
from tests.kernels.error_rule import check, random

TOKENS, WIDTH, VOCABULARY = 10, 24, 131
# Half of the rows, out of order, with padding between them.
HALF = [3, 9, -1, 0, -1, 6, 7, -1]
ROWS = {"0 % excluded": [*range(TOKENS)], "50 %": HALF, "100 %": [-1] * 4, "no list": []}
WAYS = ("keep", "recompute", "chunks", "known", "known, chunks")


def _inputs(dtype=torch.float64, rows=None, seed=0, *, device="cpu", tokens=TOKENS, width=WIDTH, vocabulary=VOCABULARY):
    hidden = random(tokens, width, dtype=dtype, device=device, seed=seed).requires_grad_()
    weight = random(vocabulary, width, dtype=dtype, device=device, seed=seed + 1).requires_grad_()
    target = torch.randint(0, vocabulary, (tokens,), generator=torch.Generator().manual_seed(seed)).to(device)
    grad = random(tokens, dtype=torch.float64, device=device, seed=seed + 2)
    chosen = [*range(tokens)] if rows is None else rows
    return hidden, weight, target, torch.tensor(chosen, dtype=torch.int32, device=device), grad


def _bytes_of(rows, vocabulary, itemsize):
    """The budget that holds the logits and gradients of exactly this many rows."""
    return rows * vocabulary * (max(4, itemsize) + itemsize)


def _scored(way, hidden, weight, target, rows, grad, **settings):
    """(log-probs, gradients of sum(grad * log_prob) by hidden and weight), computed in the given way."""
    mode, _, chunks = way.partition(", ")
    if "chunks" in (mode, chunks):
        settings["budget_bytes"] = _bytes_of(5, len(weight), hidden.dtype.itemsize)
    if mode == "known":
        loss, log_prob = linear_nll(hidden, weight, target, rows, -grad, **settings)
        return log_prob, *torch.autograd.grad(loss, (hidden, weight))
    log_prob = linear_log_prob(hidden, weight, target, rows, **settings, mode="recompute" if mode == "chunks" else mode)
    return log_prob, *torch.autograd.grad(log_prob, (hidden, weight), grad.to(log_prob.dtype))


def _unfused(hidden, weight, target, rows, grad):
    """The same results from torch in the inputs' dtype, with logits rounded to that dtype."""
    listed = rows[rows >= 0].long()
    log_probs = (hidden @ weight.T)[listed].to(torch.promote_types(hidden.dtype, torch.float32)).log_softmax(dim=-1)
    zeros = torch.zeros(len(hidden), dtype=log_probs.dtype, device=hidden.device)
    log_prob = zeros.index_put((listed,), log_probs.gather(1, target[listed, None])[:, 0])
    return log_prob, *torch.autograd.grad(log_prob, (hidden, weight), grad.to(log_prob.dtype))


NAMES = ("log_prob", "d hidden", "d weight")


def test_the_plan_keeps_logits_and_sizes_chunks_by_the_budget():
    gib = 2**30
    # Shisa 7B's vocabulary: 8,192 rows in bfloat16 are kept, and 1,408 float32 rows fit beside them.
    assert plan(8192, 120064, 2, default_budget(torch.device("cuda"))) == (True, 1408)
    assert plan(8192, 120064, 2, default_budget(torch.device("cpu"))) == (False, 46)
    assert plan(8192, 120064, 2, 2**29) == (False, 640)
    # Shisa 7B, whose float32 sum has 1.97 GB: parts would hold it, and would not hold less than kept gradients do.
    total = sum_of_parts(120064 * 4096, 2, kernels=True)
    assert total == 4 * 120064 * 4096
    assert sum_of_parts(120064 * 4096, 4, kernels=True) == sum_of_parts(120064 * 4096, 2, kernels=False) == 0
    budget = default_budget(torch.device("cuda"))
    for rows, expected in ((8192, (True, 1408)), (16384, (True, 1408)), (19072, (True, 128)), (19200, (False, 3712))):
        assert plan(rows, 120064, 2, budget, sum_bytes=total) == expected
        keep, chunk = expected
        held = 120064 * (2 * rows + 4 * chunk) if keep else 120064 * 6 * chunk + total
        assert held <= budget + total
    assert plan(16384, 120064, 2, budget) == (False, 3712)
    # The kept rows and exactly one tile, then a byte less.
    enough = 1000 * 1024 * 2 + TILE * 1024 * 4
    assert plan(1000, 1024, 2, enough) == (True, 128)
    assert plan(1000, 1024, 2, enough - 1) == (False, 384)
    assert plan(1000, 1024, 2, enough - 1, "keep") == (True, 127)
    assert plan(1000, 1024, 2, gib) == (True, 1000)
    assert plan(1000, 1024, 2, gib, "recompute") == (False, 1000)
    assert plan(1000, 1024, 4, 8 * 1024 * 300, "recompute") == (False, 256)
    assert plan(1000, 1024, 8, 16 * 1024 * 7, "recompute") == (False, 7)
    assert plan(0, 1024, 2, gib) == (True, 1)
    # Without a backward pass the budget holds logits only.
    assert plan(1000, 1024, 2, 4 * 1024 * 200, backward=False) == (False, 128)
    assert plan(1000, 1024, 2, 4 * 1024 * 1, backward=False) == (False, 1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((10, 1024, 2, 2**30, "keeps"), "mode = 'keeps': must be one of auto, keep, recompute"),
        ((10, 1024, 2, 6143), "budget_bytes = 6143: one row of 1024 takes 6144; give at least that"),
        ((10, 1024, 2, 24575, "keep"), "to keep 10 rows of 1024 takes 24576; give that or mode = 'recompute'"),
    ],
)
def test_an_unknown_mode_and_too_small_a_budget_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        plan(*arguments)


@pytest.mark.parametrize("rows", ROWS.values(), ids=ROWS)
@pytest.mark.parametrize("way", WAYS)
def test_results_equal_the_unfused_computation(way, rows, dtype, device):
    hidden, weight, target, chosen, grad = _inputs(dtype, rows, device=device)
    # The loss scales each row differently, and row 3 by 0.
    grad[3] = 0
    given = (target, chosen, grad)
    exact = _unfused(hidden.detach().double().requires_grad_(), weight.detach().double().requires_grad_(), *given)
    plain = _unfused(hidden, weight, *given)
    ours = _scored(way, hidden, weight, target, chosen, grad.float())
    for name, found, right, torchs in zip(NAMES, ours, exact, plain, strict=True):
        check(name, found, right, torchs, sums=8)
    excluded = [row for row in range(TOKENS) if row not in rows]
    assert not ours[0][excluded].any()
    assert not ours[1][excluded].any()


@pytest.mark.parametrize("rows", [None, HALF, [-1] * 4, []], ids=["all", "some", "padding only", "none"])
@pytest.mark.parametrize("way", [*WAYS, "rows alone"])
def test_equals_autograd_in_float64(way, rows, reference_device):
    hidden, weight, target, chosen, grad = _inputs(rows=rows, device=reference_device)
    listed = [row for row in chosen.tolist() if row >= 0]
    expected = torch.zeros(TOKENS, dtype=torch.float64, device=reference_device)
    expected[listed] = (hidden @ weight.T).log_softmax(-1).gather(1, target[:, None])[:, 0][listed]
    theirs = torch.autograd.grad(expected, (hidden, weight), grad)
    if way == "rows alone":
        way, settings = "recompute", {"budget_bytes": _bytes_of(1, VOCABULARY, 8)}
    else:
        settings = {}
    out, *ours = _scored(way, hidden, weight, target, chosen, grad, **settings)
    torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(tuple(ours), theirs, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(
    ("vocabulary", "tokens", "way"),
    [*((1031, 7, way) for way in WAYS), *((120_065, 3, way) for way in ("keep", "recompute", "known"))],
)
def test_vocabularies_of_any_size_keep_the_error_rule(vocabulary, tokens, way, device):
    hidden, weight, target, chosen, grad = _inputs(torch.float32, device=device, tokens=tokens, width=8, vocabulary=vocabulary)
    target[0], target[1] = vocabulary - 1, 0
    given = (target, chosen, grad)
    exact = _unfused(hidden.detach().double().requires_grad_(), weight.detach().double().requires_grad_(), *given)
    plain = _unfused(hidden, weight, *given)
    settings = {"budget_bytes": _bytes_of(2, vocabulary, 4)} if way.endswith("chunks") else {}
    for name, found, right, torchs in zip(
        NAMES, _scored(way, hidden, weight, target, chosen, grad.float(), **settings), exact, plain, strict=True
    ):
        check(name, found, right, torchs, sums=8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("way", WAYS)
def test_padding_columns_get_no_probability_and_no_gradient(way, dtype, device):
    hidden, weight, target, chosen, grad = _inputs(dtype, device=device)
    real = 100
    target = target % real
    with torch.no_grad():
        weight[real:] = 1e6
    out, _, gradient = _scored(way, hidden, weight, target, chosen, grad.to(dtype), vocab_size=real)
    expected = linear_log_prob_reference(hidden, weight[:real], target, chosen)
    close = {"rtol": 1e-12, "atol": 1e-12} if dtype == torch.float64 else {"rtol": 1e-5, "atol": 1e-5}
    torch.testing.assert_close(out, expected, **close)
    assert (gradient[real:] == 0).all()
    assert (gradient[:real] != 0).all()


def test_statistics_equal_log_prob_log_sum_exp_and_entropy(dtype, device):
    hidden, weight, target, chosen, _ = _inputs(dtype, HALF, device=device)
    target = target % 120

    def plainly(hidden, weight):
        listed = chosen[chosen >= 0].long()
        logits = hidden[listed] @ weight[:120].T
        log_probs = logits.log_softmax(dim=-1)
        values = (
            log_probs.gather(1, target[listed, None])[:, 0],
            logits.logsumexp(dim=-1),
            -(log_probs.exp() * log_probs).sum(-1),
        )
        return [torch.zeros(TOKENS, dtype=hidden.dtype, device=device).index_put((listed,), value) for value in values]

    budget = 4 * VOCABULARY * 3
    found = linear_log_prob_statistics(hidden, weight, target, chosen, vocab_size=120, budget_bytes=budget)
    wide = [tensor.detach().double() for tensor in (hidden, weight)]
    for name, ours, exact, plain in zip(
        ("log_prob", "log_sum_exp", "entropy"), found, plainly(*wide), plainly(hidden.float(), weight.float()), strict=True
    ):
        check(name, ours, exact, plain.detach(), sums=8)
        assert not ours.requires_grad


@pytest.mark.skipif(INTERPRETED, reason="the interpreter truncates to bfloat16")
def test_bfloat16_logits_are_never_rounded(device):
    """The error is at most twice the error of torch in float32, plus the rounding of the matrix products."""
    hidden, weight, target, chosen, grad = _inputs(torch.bfloat16, device=device)
    wide = [tensor.detach().double().requires_grad_() for tensor in (hidden, weight)]
    exact = linear_log_prob_reference(*wide, target, chosen)
    ours = linear_log_prob(hidden, weight, target, chosen)
    torchs = linear_log_prob_reference(hidden.float(), weight.float(), target, chosen)
    assert ours.dtype == torch.float32
    assert (ours - exact).abs().max() <= 2 * (torchs - exact).abs().max() + 1e-6
    gradients = torch.autograd.grad(ours, (hidden, weight), grad.float())
    exact_gradients = torch.autograd.grad(exact, wide, grad)
    logits = (hidden @ weight.T).float().log_softmax(-1)
    torch_gradients = torch.autograd.grad(logits.gather(1, target[:, None])[:, 0], (hidden, weight), grad.float())
    for gradient, torchs_gradient, reference in zip(gradients, torch_gradients, exact_gradients, strict=True):
        torch_error = (torchs_gradient.double() - reference).abs().max()
        assert (gradient.double() - reference).abs().max() <= 2 * torch_error


@pytest.mark.parametrize("score", [linear_log_prob, linear_log_prob_statistics, linear_nll])
def test_a_row_that_is_listed_twice_is_refused(score):
    hidden, weight, target, _, grad = _inputs()
    others = (grad,) if score is linear_nll else ()
    with pytest.raises(ValueError, match="row 2 is listed more than once in rows_N: list each row at most once"):
        score(hidden, weight, target, torch.tensor([2, -1, 1, -1, 2]), *others)


@pytest.mark.parametrize("score", [linear_log_prob, linear_log_prob_statistics, linear_nll])
@pytest.mark.parametrize("wrong", [VOCABULARY, -1])
def test_a_target_outside_the_vocabulary_is_refused(wrong, score):
    hidden, weight, target, _, grad = _inputs()
    others = (grad,) if score is linear_nll else ()
    target[9] = wrong
    # The target of an unlisted row is never read.
    score(hidden, weight, target, torch.tensor([1, 2, -1]), *others)
    with pytest.raises(ValueError, match=f"target {wrong} at row 9 is outside the vocabulary of {VOCABULARY}"):
        score(hidden, weight, target, torch.tensor([1, 9]), *others)


@pytest.mark.parametrize("way", WAYS)
def test_memory_layouts_and_integer_types_do_not_matter(way, device):
    """Rows of a wider matrix, transposed inputs, other integer types, and the gradient of a sum, whose strides are 0."""
    hidden, weight, target, chosen, _ = _inputs(torch.float32, HALF, device=device)
    grad = torch.ones((), device=device).expand(TOKENS)
    expected = _scored(way, hidden, weight, target, chosen, grad.contiguous())
    spread = torch.stack((target, target), dim=1)[:, 0]
    rows = torch.stack((chosen, chosen), dim=1)[:, 0].long()
    for laid in (torch.cat((hidden, hidden), dim=1)[:, :WIDTH], hidden.detach().T.contiguous().T):
        turned = weight.detach().T.contiguous().T
        found = _scored(way, *(tensor.detach().requires_grad_() for tensor in (laid, turned)), spread.int(), rows, grad)
        # Products of transposed operands may sum in another order.
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("way", WAYS)
def test_two_runs_are_equal_to_the_bit(way, dtype, device):
    tensors = _inputs(dtype, HALF, device=device)
    runs = [_scored(way, *tensors[:4], tensors[4].float()) for _ in range(2)]
    assert all(torch.equal(one, other) for one, other in zip(*runs, strict=True))


@pytest.mark.parametrize("way", WAYS)
def test_no_tokens_give_no_log_probs_and_a_zero_gradient(way, device):
    hidden, weight, target, _, grad = _inputs(torch.float32, device=device, tokens=0)
    rows = torch.full((4,), -1, dtype=torch.int32, device=device)
    log_prob, grad_hidden, grad_weight = _scored(way, hidden, weight, target, rows, grad.float())
    assert (log_prob.shape, grad_hidden.shape) == ((0,), (0, WIDTH))
    assert torch.equal(grad_weight, torch.zeros_like(weight))


@pytest.mark.parametrize("budget", [None, _bytes_of(5, VOCABULARY, 4)])
def test_gradients_follow_a_scaled_loss(budget, device):
    """Gradients from the forward pass are multiplied by the loss's own gradient; also with only one input to differentiate."""
    hidden, weight, target, chosen, weight_T = _inputs(torch.float32, HALF, device=device)
    weight_T = weight_T.float()
    nll = functools.partial(linear_nll, budget_bytes=budget)
    scaled = -3 * (weight_T * linear_log_prob(hidden, weight, target, chosen)).sum()
    expected = torch.autograd.grad(scaled, (hidden, weight))
    loss, log_prob = nll(hidden, weight, target, chosen, weight_T)
    assert loss.dtype == torch.float32
    assert not log_prob.requires_grad
    torch.testing.assert_close(loss, -(weight_T * log_prob).sum())
    torch.testing.assert_close(torch.autograd.grad(3 * loss + 1, (hidden, weight)), expected, rtol=1e-4, atol=1e-5)
    (alone,) = torch.autograd.grad(3 * nll(hidden.detach(), weight, target, chosen, weight_T)[0], weight)
    torch.testing.assert_close(alone, expected[1], rtol=1e-4, atol=1e-5)
    (alone,) = torch.autograd.grad(3 * nll(hidden, weight.detach(), target, chosen, weight_T)[0], hidden)
    torch.testing.assert_close(alone, expected[0], rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        without, again = nll(hidden, weight, target, chosen, weight_T)
    torch.testing.assert_close((without, again), (loss.detach(), log_prob))
    assert not without.requires_grad


@pytest.mark.parametrize("mode", ["keep", "recompute"])
def test_a_second_backward_and_a_single_input_give_the_same_gradients(mode, device):
    hidden, weight, target, chosen, grad = _inputs(torch.float32, HALF, device=device)
    grad = grad.float()
    out = linear_log_prob(hidden, weight, target, chosen, mode=mode)
    first, second = (torch.autograd.grad(out, (hidden, weight), grad, retain_graph=True) for _ in range(2))
    assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))
    for number in range(2):
        given = [tensor if number == i else tensor.detach() for i, tensor in enumerate((hidden, weight))]
        out = linear_log_prob(*given, target, chosen, mode=mode)
        assert torch.equal(torch.autograd.grad(out, given[number], grad)[0], first[number])


def test_a_second_backward_of_linear_nll_raises():
    hidden, weight, target, chosen, grad = _inputs()
    loss, _ = linear_nll(hidden, weight, target, chosen, grad)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="second backward"):
        loss.backward()


def test_without_gradients_no_logits_are_kept(monkeypatch):
    """A scoring pass, such as preference tuning's reference, needs no logits for a backward pass."""
    hidden, weight, target, chosen, _ = _inputs(torch.float32)
    plans = []
    monkeypatch.setattr(module, "plan", lambda *given, **settings: plans.append(plan(*given, **settings)) or plans[-1])
    expected = linear_log_prob(hidden, weight, target, chosen)
    with torch.no_grad():
        assert torch.equal(linear_log_prob(hidden, weight, target, chosen), expected)
    assert torch.equal(linear_log_prob(hidden.detach(), weight.detach(), target, chosen), expected)
    assert plans == [(True, TOKENS), (False, TOKENS), (False, TOKENS)]


@pytest.mark.skipif(INTERPRETED, reason="the interpreter truncates to bfloat16")
def test_gradients_added_up_in_bfloat16_are_off_by_a_rounding_of_each_sum():
    """Sixteen micro-batches against one product in float64: each addition loses at most 2^-9 of the largest partial sum."""
    batches, tokens = 16, 24
    hidden, weight, target, _, grad = _inputs(torch.bfloat16, tokens=batches * tokens)
    wide_hidden, wide_weight = hidden.detach().double(), weight.detach().double().requires_grad_()
    largest = 0.0
    for first in range(0, batches * tokens, tokens):
        rows = torch.arange(first, first + tokens)
        linear_nll(hidden.detach(), weight, target, rows, grad)[0].backward()
        so_far = torch.arange(first + tokens)
        log_prob = linear_log_prob_reference(wide_hidden, wide_weight, target, so_far)
        (exact,) = torch.autograd.grad(-(grad * log_prob).sum(), wide_weight)
        largest = max(largest, float(exact.abs().max()))
    error = float((weight.grad.double() - exact).abs().max())
    # The factor 2: each addend is also rounded, and so are the logit gradients it is made of.
    assert 2**-10 * largest < error <= 2 * batches * 2**-9 * largest


def test_custom_operators_pass_torchs_checks(triton_device):
    _check_operators(torch.float32, triton_device)


@pytest.mark.skipif(INTERPRETED, reason="float64 runs the eager reference, not the interpreter")
def test_custom_operators_of_references_pass_torchs_checks(device):
    _check_operators(torch.float64, device)


def _check_operators(dtype, device):
    hidden, weight, target, chosen, grad = _inputs(dtype, [3, -1, 0], device=device, width=8, vocabulary=40)
    grad = grad.to(dtype)
    given = (hidden, weight, target % 40, chosen)
    plain = [tensor.detach() for tensor in given]
    for keep in (True, False):
        torch.library.opcheck(module._log_prob.registered, (*given, 40, keep, 2, False))
        # The backward pass scales _nll's gradients in place, which opcheck forbids; test_compiles_in_one_piece covers it.
        checks = ("test_schema", "test_autograd_registration", "test_faketensor")
        torch.library.opcheck(module._nll.registered, (*given, grad, 40, keep, 2, True, True), test_utils=checks)
        _, log_sum_exp, _, kept = module._log_prob(*plain, 40, keep, 2, False)
        torch.library.opcheck(module._log_prob_backward.registered, (grad, *plain, log_sum_exp, kept, 40, keep, 2, True, True))
    torch.library.opcheck(module._log_prob.registered, (*plain, 40, False, 2, True))
    torch.library.opcheck(module._log_prob_backward.registered, (grad, *plain, log_sum_exp, kept, 40, False, 2, False, True))


@pytest.mark.parametrize("way", ["chunks", "known"])
def test_compiles_in_one_piece(way, device):
    hidden, weight, target, chosen, grad = _inputs(torch.float32, HALF, device=device)
    settings = {"budget_bytes": _bytes_of(5, VOCABULARY, 4)} if way == "chunks" else {}

    def loss(hidden, weight, target, chosen, grad):
        if way == "known":
            return 2 * linear_nll(hidden * 1.5, weight, target, chosen, grad, **settings)[0]
        return (grad * linear_log_prob(hidden * 1.5, weight, target, chosen, **settings)).sum()

    results = []
    for function in (loss, torch.compile(loss, backend="aot_eager", fullgraph=True)):
        value = function(hidden, weight, target, chosen, grad.float())
        results.append((value, *torch.autograd.grad(value, (hidden, weight))))
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("rows", [4, 7])
def test_logits_beyond_the_budget_cost_a_fourth_product(rows, monkeypatch):
    """The products that the head asks torch for: three within the budget, four beyond it."""
    counted = []
    product, added = torch.mm, torch.addmm

    def count(left, right):
        counted.append(2 * left.shape[0] * left.shape[1] * right.shape[1])

    def counting_product(left, right, **settings):
        count(left, right)
        return product(left, right, **settings)

    def counting_sum(total, left, right, **settings):
        count(left, right)
        return added(total, left, right, **settings)

    monkeypatch.setattr(torch, "mm", counting_product)
    monkeypatch.setattr(torch, "addmm", counting_sum)
    budget = 5 * (4 + 4) * 40
    hidden, head = torch.randn(9, 8, requires_grad=True), torch.randn(40, 8, requires_grad=True)
    targets, chosen = torch.zeros(9, dtype=torch.int64), torch.arange(rows)
    linear_log_prob(hidden, head, targets, chosen, vocab_size=33, budget_bytes=budget).sum().backward()
    assert sum(counted) == (3 if rows == 4 else 4) * 2 * rows * 8 * 40
    counted.clear()
    linear_nll(hidden, head, targets, chosen, torch.ones(9), vocab_size=33, budget_bytes=budget)[0].backward()
    assert sum(counted) == 3 * 2 * rows * 8 * 40
