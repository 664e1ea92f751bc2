"""The head's steps on rows of logits, against autograd in float64. `test_linear_log_prob` tests the whole head."""

import pytest
import torch

from kernels.row_log_prob import gather_rows, row_gradients, row_statistics, scale_in_place, scatter_rows
from tests.kernels.error_rule import check, far_apart, random

TOKENS = 9
# Out of order, with padding in between and at the end.
ROWS = [4, -1, 7, 0, 8, -1]


def logits_and_targets(columns, vocab_size, device, dtype=torch.float32, seed=0):
    """(logits, targets, rows): peaked logits that rise along the row; the highest logits stand in padding columns."""
    logits = random(len(ROWS), columns, dtype=dtype, device=device, seed=seed, scale=4.0)
    logits += torch.linspace(-10, 10, len(ROWS), dtype=dtype, device=device)[:, None]
    logits += torch.linspace(0, 8, columns, dtype=dtype, device=device)
    logits[:, vocab_size:] = 1e4
    generator = torch.Generator().manual_seed(seed)
    target = torch.randint(0, vocab_size, (TOKENS,), generator=generator)
    # The first and the last column are targets; the target of an unlisted row is invalid.
    target[4], target[7], target[5] = vocab_size - 1, 0, -100
    rows = torch.tensor(ROWS, dtype=torch.int32)
    return logits, target.to(device), rows.to(device)


def scored(logits, target, rows, vocab_size, *, dtype, scale=None):
    """(log-probs, log-sum-exps, entropies, gradients in `dtype`) by our functions."""
    # The place before the results shows what a kernel writes for row -1.
    roomy = torch.zeros(3, TOKENS + 1, dtype=logits.dtype, device=logits.device)
    results = log_prob, log_sum_exp, entropy = [result[1:] for result in roomy]
    gradient = torch.empty_like(logits, dtype=dtype)
    row_statistics(
        logits.clone(),
        target,
        rows,
        log_prob,
        log_sum_exp,
        vocab_size=vocab_size,
        entropy_T=entropy,
        gradient_NV=gradient,
        scale_T=scale,
    )
    assert not roomy[:, 0].any()
    return *results, gradient


def plainly(logits, target, rows, vocab_size, *, dtype, scale=None):
    """The results of `scored`, by torch, row by row."""
    results = [torch.zeros(TOKENS, dtype=logits.dtype, device=logits.device) for _ in range(3)]
    gradient = torch.zeros_like(logits)
    for number, row in enumerate(rows.tolist()):
        if row < 0:
            continue
        leaf = logits[number, :vocab_size].clone().requires_grad_()
        log_probs = leaf.log_softmax(dim=-1)
        for result, value in zip(
            results, (log_probs[target[row]], leaf.logsumexp(dim=-1), -(log_probs.exp() * log_probs).sum()), strict=True
        ):
            result[row] = value.detach()
        (of_row,) = torch.autograd.grad(-log_probs[target[row]], leaf)
        gradient[number, :vocab_size] = of_row * (1 if scale is None else scale[row])
    return *results, gradient.to(dtype)


NAMES = ("log_prob", "log_sum_exp", "entropy", "gradient")


@pytest.mark.parametrize("scaled", [True, False])
@pytest.mark.parametrize(("columns", "vocab_size"), [(8, 5), (8300, 8195), (131, 131)])
def test_statistics_and_gradients_are_right(columns, vocab_size, scaled, dtype, device):
    logits, target, rows = logits_and_targets(columns, vocab_size, device)
    scale = random(TOKENS, dtype=torch.float32, device=device, seed=5) if scaled else None
    ours = scored(logits, target, rows, vocab_size, dtype=dtype, scale=scale)
    plain = plainly(logits, target, rows, vocab_size, dtype=dtype, scale=scale)
    exact = plainly(logits.double(), target, rows, vocab_size, dtype=torch.float64, scale=scale.double() if scaled else None)
    for name, found, right, torchs in zip(NAMES, ours, exact, plain, strict=True):
        # The exponent of a gradient is rounded as a number of the log-sum-exp's size.
        check(name, found, right, torchs, sums=8)
    for number, row in enumerate(ROWS):
        if row < 0:
            assert not ours[3][number].any()
            continue
        for name, found, right, torchs in zip(NAMES[:3], ours[:3], exact[:3], plain[:3], strict=True):
            check(f"{name} of row {row}", found[row], right[row], torchs[row], sums=8)
    assert not ours[3][:, vocab_size:].any()
    unlisted = [row for row in range(TOKENS) if row not in ROWS]
    assert not any(result[unlisted].any() for result in ours[:3])


def test_equal_logits_have_the_logarithm_of_the_vocabulary_as_entropy(device):
    """The logits may be far from 0."""
    rows = torch.arange(3, dtype=torch.int32, device=device)
    logits = torch.tensor([0.0, 3000.0, -3000.0], device=device)[:, None].expand(3, 200).contiguous()
    target = torch.zeros(TOKENS, dtype=torch.int64, device=device)
    log_prob, _, entropy, _ = scored(logits, target, rows, 150, dtype=torch.float32)
    expected = torch.tensor(150.0, device=device).log().expand(3)
    torch.testing.assert_close(entropy[:3], expected, rtol=1e-6, atol=0)
    torch.testing.assert_close(log_prob[:3], -expected, rtol=1e-6, atol=0)


def test_rows_with_one_certain_piece_are_exact(device):
    """One logit leaves the others no probability, at the target and elsewhere."""
    rows = torch.arange(2, dtype=torch.int32, device=device)
    logits = torch.zeros(2, 40, device=device)
    logits[:, 7] = 1000.0
    target = torch.tensor([7, 3], device=device)
    log_prob, log_sum_exp, entropy, gradient = scored(logits, target, rows, 40, dtype=torch.float32)
    assert log_prob[:2].tolist() == [0, -1000]
    assert log_sum_exp[:2].tolist() == [1000, 1000]
    assert entropy[:2].tolist() == [0, 0]
    assert not gradient[0].any()
    assert gradient[1].nonzero()[:, 0].tolist() == [3, 7]
    assert gradient[1, [3, 7]].tolist() == [-1, 1]


def test_a_nan_logit_shows_in_its_row_alone(device):
    logits, target, rows = logits_and_targets(64, 64, device)
    logits[2, 50] = torch.nan
    results = scored(logits, target, rows, 64, dtype=torch.float32)
    assert [bool(result[7].isnan()) for result in results[:3]] == [True] * 3
    assert results[0].isnan().sum() == 1


@pytest.mark.parametrize("scaled", [True, False])
def test_gradients_from_a_kept_log_sum_exp_are_the_same_bits(scaled, dtype, device):
    logits, target, rows = logits_and_targets(136, 131, device)
    scale = random(TOKENS, dtype=torch.float32, device=device, seed=5) if scaled else None
    _, log_sum_exp, _, expected = scored(logits, target, rows, 131, dtype=dtype, scale=scale)
    gradient = torch.empty_like(expected)
    # A copy, because nothing may be read before it for row -1.
    row_gradients(logits, target, rows, log_sum_exp.clone(), gradient, scale, vocab_size=131)
    assert torch.equal(gradient, expected)


def test_statistics_without_gradients_are_the_same_bits(device):
    logits, target, rows = logits_and_targets(136, 131, device)
    expected = scored(logits, target, rows, 131, dtype=torch.float32)
    log_prob, log_sum_exp = (torch.zeros(TOKENS, device=device) for _ in range(2))
    row_statistics(logits, target, rows, log_prob, log_sum_exp, vocab_size=131)
    assert torch.equal(log_prob, expected[0])
    assert torch.equal(log_sum_exp, expected[1])


def test_equals_torch_in_float64(reference_device):
    logits, target, rows = logits_and_targets(136, 131, reference_device, torch.float64)
    scale = random(TOKENS, dtype=torch.float64, device=reference_device, seed=5)
    ours, theirs = (function(logits, target, rows, 131, dtype=torch.float64, scale=scale) for function in (scored, plainly))
    torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("width", [1, 33, 2500])
@pytest.mark.parametrize("scaled", [True, False])
def test_rows_are_gathered_and_scattered(width, scaled, dtype, device):
    hidden = random(TOKENS, width, dtype=dtype, device=device, seed=1)
    scale = random(TOKENS, dtype=torch.float32, device=device, seed=2) if scaled else None
    rows = torch.tensor(ROWS, dtype=torch.int32, device=device)
    expected = torch.zeros(len(ROWS), width, dtype=dtype, device=device)
    for number, row in enumerate(ROWS):
        if row >= 0:
            expected[number] = hidden[row].float() * scale[row] if scaled else hidden[row]
    assert torch.equal(gather_rows(hidden, rows, scale), expected)
    turned = hidden.T.contiguous().T
    assert torch.equal(gather_rows(turned, rows, scale), expected)
    # Rows without a token are written nowhere.
    source = random(len(ROWS), width, dtype=dtype, device=device, seed=3)
    expected = torch.zeros(TOKENS, width, dtype=dtype, device=device)
    for number, row in enumerate(ROWS):
        if row >= 0:
            expected[row] = source[number].float() * scale[row] if scaled else source[number]
    assert torch.equal(scatter_rows(source, rows, TOKENS, scale), expected)


def test_an_empty_list_gathers_and_scatters_nothing(device):
    rows = torch.empty(0, dtype=torch.int32, device=device)
    hidden = random(TOKENS, 8, dtype=torch.float32, device=device, seed=1)
    assert gather_rows(hidden, rows).shape == (0, 8)
    assert torch.equal(scatter_rows(hidden[:0], rows, TOKENS), torch.zeros_like(hidden))


@pytest.mark.parametrize("shape", [(20, 33), (3, 2500), (0, 8)])
def test_a_tensor_is_scaled_in_place(shape, dtype, device):
    tensor = random(*shape, dtype=dtype, device=device, seed=1)
    for factor in (1.0, -0.3):
        scaled = tensor.clone()
        scale_in_place(scaled, torch.tensor(factor, device=device))
        expected = (tensor.float() * torch.tensor(factor, device=device)).to(dtype)
        assert torch.equal(scaled, expected)


def test_offsets_beyond_31_bits_are_right(triton_device):
    logits, target, rows = (tensor[:3] for tensor in logits_and_targets(40, 37, triton_device))
    target = torch.arange(TOKENS, device=triton_device)
    rows = torch.tensor([2, 0, 1], dtype=torch.int32, device=triton_device)
    log_prob, log_sum_exp, far_log_prob, far_log_sum_exp = (torch.zeros(TOKENS, device=triton_device) for _ in range(4))
    near = torch.empty_like(logits, dtype=torch.float16)
    row_statistics(logits, target, rows, log_prob, log_sum_exp, vocab_size=37, gradient_NV=near)
    far = far_apart(torch.zeros_like(near))
    row_statistics(far_apart(logits), target, rows, far_log_prob, far_log_sum_exp, vocab_size=37, gradient_NV=far)
    assert torch.equal(far_log_prob, log_prob)
    assert torch.equal(far, near)
    hidden = random(3, 40, dtype=torch.float16, device=triton_device, seed=1)
    assert torch.equal(gather_rows(far_apart(hidden), rows), gather_rows(hidden, rows))
    assert torch.equal(scatter_rows(far_apart(hidden), rows, 3), scatter_rows(hidden, rows, 3))


def test_two_runs_give_the_same_bits(dtype, device):
    logits, target, rows = logits_and_targets(136, 131, device)
    runs = [scored(logits, target, rows, 131, dtype=dtype) for _ in range(2)]
    assert all(torch.equal(one, other) for one, other in zip(*runs, strict=True))


def test_the_custom_operator_passes_torchs_checks(device):
    tensor = random(5, 33, dtype=torch.float32, device=device, seed=1)
    torch.library.opcheck(scale_in_place.registered, (tensor, torch.tensor(0.5, device=device)))
