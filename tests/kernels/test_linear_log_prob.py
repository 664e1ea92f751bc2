"""The head's log-probs against autograd over materialised logits in float64."""

import pytest
import torch

from kernels.linear_log_prob import linear_log_prob, linear_log_prob_reference

TOKENS, WIDTH, VOCABULARY = 37, 24, 131


def _inputs(dtype=torch.float64, rows=None, seed=0):
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(TOKENS, WIDTH, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    weight = torch.randn(VOCABULARY, WIDTH, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    target = torch.randint(0, VOCABULARY, (TOKENS,), generator=generator)
    grad = torch.randn(TOKENS, generator=generator, dtype=torch.float64)
    chosen = torch.arange(TOKENS, dtype=torch.int32) if rows is None else torch.tensor(rows, dtype=torch.int32)
    return hidden, weight, target, chosen, grad


SOME = [3, 30, 4, -1, 0, -1, -1]


@pytest.mark.parametrize("rows", [None, SOME, [-1] * 4, []], ids=["all", "some", "padding only", "none"])
@pytest.mark.parametrize("budget", [2**30, 8 * VOCABULARY * 5, 1], ids=["kept", "chunks of 5", "chunks of 1"])
def test_equals_autograd_in_float64(rows, budget):
    hidden, weight, target, chosen, grad = _inputs(rows=rows)
    out = linear_log_prob(hidden, weight, target, chosen, budget_bytes=budget)
    listed = [row for row in chosen.tolist() if row >= 0]
    expected = torch.zeros(TOKENS, dtype=torch.float64)
    expected[listed] = (hidden @ weight.T).log_softmax(-1).gather(1, target[:, None])[:, 0][listed]
    torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)
    ours = torch.autograd.grad(out, (hidden, weight), grad)
    theirs = torch.autograd.grad(expected, (hidden, weight), grad)
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)


def test_padding_columns_take_no_probability():
    hidden, weight, target, chosen, grad = _inputs()
    real = 100
    target = target % real
    with torch.no_grad():
        weight[real:] = 1e6
    out = linear_log_prob(hidden, weight, target, chosen, vocab_size=real)
    expected = linear_log_prob_reference(hidden, weight[:real], target, chosen)
    torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)
    (gradient,) = torch.autograd.grad(out, weight, grad)
    assert (gradient[real:] == 0).all()
    assert (gradient[:real] != 0).all()


def test_bfloat16_logits_are_never_rounded():
    """Within twice the error of the same computation by torch in float32, plus the products' rounding."""
    hidden, weight, target, chosen, grad = _inputs(torch.bfloat16)
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


@pytest.mark.parametrize("wrong", [VOCABULARY, -1])
def test_target_out_of_range_is_named(wrong):
    hidden, weight, target, _, _ = _inputs()
    target[9] = wrong
    # An unlisted row's target is never looked at.
    linear_log_prob(hidden, weight, target, torch.tensor([1, 2]))
    with pytest.raises(ValueError, match=f"target {wrong} at row 9 is outside the vocabulary of {VOCABULARY}"):
        linear_log_prob(hidden, weight, target, torch.tensor([1, 9]))


def test_a_second_backward_raises():
    hidden, weight, target, chosen, _ = _inputs()
    total = linear_log_prob(hidden, weight, target, chosen).sum()
    total.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="second backward"):
        total.backward()
