"""Embedding and NEFTune noise: the paper's scale, independence of packing, the reference's bits, and the gradient's sums."""

import dataclasses
import math

import pytest
import torch
import torch.nn.functional as F

import kernels.embedding as module
from kernels.configurations import configuration
from kernels.embedding import EmbeddingNoise, embedding, embedding_reference
from kernels.launch import INTERPRETED
from tests.kernels.error_rule import compare, far_apart, random

WIDTH = 37  # no multiple of 4, so that the last group of random words is cut
ROWS = 50
TILE = configuration("embedding_backward", torch.device("cpu")).rows
# Token ids whose runs of equal ids end inside a tile, at its end, and after several tiles.
TOKENS = {
    "none": [],
    "one": [0],
    "all different": list(range(ROWS))[::-1],
    "all equal, a tile": [4] * TILE,
    "all equal": [4] * (3 * TILE + 5),
    "first and last row": [0, ROWS - 1] * TILE + [0],
    "two of a tile and more": [9, 2] * (2 * TILE) + [7, 9],
    "mixed": torch.randint(0, 9, (129,), generator=torch.Generator().manual_seed(0)).tolist(),
}


def _noise(documents, device, *, alpha=5.0, seed=3, step=7):
    """Noise of documents, each given as (id, first position, positions in this row, tokens of the whole document)."""
    document = torch.cat([torch.full((places,), index) for index, _, places, _ in documents])
    position = torch.cat([torch.arange(start, start + places) for _, start, places, _ in documents])
    length = torch.cat([torch.full((places,), tokens) for _, _, places, tokens in documents])
    return EmbeddingNoise(alpha, seed, step, document.to(device), position.to(device), length.to(device))


def _added(noise):
    device = noise.document_T.device
    weight = torch.zeros(11, WIDTH, device=device)
    return embedding(torch.zeros(len(noise.document_T), dtype=torch.long, device=device), weight, noise)


def _tokens(count, device, rows=ROWS):
    return torch.randint(0, rows, (count,), generator=torch.Generator().manual_seed(count)).to(device)


def _weight(device, dtype=torch.float32, width=WIDTH):
    return random(ROWS, width, dtype=dtype, device=device, seed=0)


@pytest.mark.parametrize("count", [0, 1, 127, 129])
def test_without_noise_equals_torch(count, dtype, device):
    weight, tokens = _weight(device, dtype), _tokens(count, device)
    assert torch.equal(embedding(tokens, weight), F.embedding(tokens, weight))


@pytest.mark.parametrize("width", [1, 3, WIDTH, 64, 1030])
def test_the_kernel_draws_the_bits_of_the_reference(width, dtype, triton_device):
    """With keys and counters beyond 31 bits, and with documents of one token; 1030 columns take two programs."""
    documents = [(1, 0, 1, 1), (2**32 + 7, 2**31 - 1, 3, 2**32 - 1), (2**62 + 2**31, 5, 2, 9)]
    noise = _noise(documents, triton_device, seed=2**32 - 1, step=2**31 + 5)
    weight, tokens = _weight(triton_device, dtype, width), _tokens(6, triton_device)
    found = embedding(tokens, weight, noise)
    assert torch.equal(found, embedding_reference(tokens, weight, noise))
    assert not torch.equal(found, embedding(tokens, weight))


@pytest.mark.parametrize("given", TOKENS.values(), ids=TOKENS)
def test_the_gradient_is_right(given, dtype, device):
    tokens = torch.tensor(given, dtype=torch.long, device=device)
    weight = _weight(device, dtype).requires_grad_()
    grad = random(len(given), WIDTH, dtype=dtype, device=device, seed=2)
    most = max((given.count(token) for token in given), default=1)
    compare(
        lambda weight: embedding(tokens, weight),
        lambda weight: F.embedding(tokens, weight),
        {"weight": weight},
        {"out": grad},
        {"d weight": most},
    )


def test_the_gradient_of_rows_wider_than_a_program_is_right(device):
    tokens, weight = _tokens(9, device, 4), _weight(device, width=1030).requires_grad_()
    grad = random(9, 1030, dtype=torch.float32, device=device, seed=2)
    compare(
        lambda weight: embedding(tokens, weight),
        lambda weight: F.embedding(tokens, weight),
        {"weight": weight},
        {"out": grad},
        {"d weight": 9},
    )


def test_partial_sums_of_the_gradient_may_leave_the_range_of_float16(triton_device):
    """The kernel sums in float32; torch's own operator, which the reference calls, overflows."""
    weight = _weight(triton_device, torch.float16).requires_grad_()
    grad = torch.tensor([40000.0, 40000.0, -40000.0, -39008.0], dtype=torch.float16, device=triton_device)
    out = embedding(torch.full((4,), 7, device=triton_device), weight)
    (found,) = torch.autograd.grad(out, weight, grad[:, None].expand(4, WIDTH))
    assert (found[7] == 992).all()


@pytest.mark.parametrize("length", [1, 30, *([] if INTERPRETED else [4000])])
def test_noise_has_the_scale_of_the_paper(length, device):
    added = _added(_noise([(5, 0, length, length)], device))
    bound = 5.0 / math.sqrt(length * WIDTH)
    assert added.abs().max() < bound
    # Variance of a uniform on (-b, b) is b^2 / 3; kurtosis 1.8 gives the standard error.
    variance, count = added.double().square().mean(), added.numel()
    assert abs(variance / (bound**2 / 3) - 1) < 6 * math.sqrt(0.8 / count)
    assert abs(added.double().mean()) < 6 * bound / math.sqrt(3 * count)


def test_noise_belongs_to_the_token_wherever_it_is_packed(device):
    whole = _added(_noise([(1, 0, 10, 10), (2, 0, 6, 6), (9_000_000_000, 0, 4, 4)], device))
    swapped = _added(_noise([(9_000_000_000, 0, 4, 4), (1, 0, 10, 10)], device))
    assert torch.equal(whole[:10], swapped[4:])
    assert torch.equal(whole[16:], swapped[:4])
    # A document split over two rows keeps its noise, scaled by the whole document's length.
    first, second = _added(_noise([(1, 0, 7, 10)], device)), _added(_noise([(2, 0, 3, 6), (1, 7, 3, 10)], device))
    assert torch.equal(torch.cat((first, second[3:])), whole[:10])


@pytest.mark.parametrize("change", ["seed", "step", "document_T", "position_T"])
def test_each_part_of_the_key_changes_the_noise(change, device):
    noise = _noise([(1, 0, 10, 10)], device)
    other = dataclasses.replace(noise, **{change: getattr(noise, change) + 1})
    one, two = _added(noise), _added(other)
    assert not torch.isclose(one, two).any()


def test_the_upper_half_of_a_document_id_changes_the_noise(device):
    one, other = (_added(_noise([(index, 0, 10, 10)], device)) for index in (1, 1 + 2**32))
    assert not torch.isclose(one, other).any()


def test_noise_does_not_change_the_gradient(device):
    weight, tokens = _weight(device).requires_grad_(), _tokens(10, device)
    grad = random(10, WIDTH, dtype=torch.float32, device=device, seed=2)
    (noisy,) = torch.autograd.grad(embedding(tokens, weight, _noise([(1, 0, 10, 10)], device)), weight, grad)
    (clean,) = torch.autograd.grad(embedding(tokens, weight), weight, grad)
    assert torch.equal(noisy, clean)


def test_the_sum_with_noise_is_rounded_once(dtype, device):
    weight, tokens = _weight(device, dtype), _tokens(10, device)
    noise = _noise([(1, 0, 10, 10)], device)
    expected = (F.embedding(tokens, weight).float() + _added(noise)).to(dtype)
    assert torch.equal(embedding(tokens, weight, noise), expected)


def test_equals_torch_in_float64(reference_device):
    weight, tokens = _weight(reference_device, torch.float64).requires_grad_(), _tokens(40, reference_device, 7)
    grad = random(40, WIDTH, dtype=torch.float64, device=reference_device, seed=2)
    ours, theirs = embedding(tokens, weight), F.embedding(tokens, weight)
    assert torch.equal(ours, theirs)
    found, expected = (torch.autograd.grad(out, weight, grad)[0] for out in (ours, theirs))
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def test_strides_do_not_change_results(device):
    """Strided ids, a weight inside a wider matrix, a transposed weight, and gradients of sums, whose strides are 0."""
    tokens, weight, noise = _tokens(7, device, 3), _weight(device), _noise([(1, 0, 7, 7)], device)
    row = random(WIDTH, dtype=torch.float32, device=device, seed=2)
    grads = [row.expand(7, WIDTH), row[:1].expand(7, WIDTH), torch.stack((row.expand(7, WIDTH),) * 2, dim=-1)[..., 0]]

    def results(tokens, weight, noise, grads):
        leaf = weight.detach().requires_grad_()
        out = embedding(tokens, leaf, noise)
        return out, *(torch.autograd.grad(out, leaf, grad, retain_graph=True)[0] for grad in grads)

    expected = results(tokens, weight, noise, [grad.contiguous() for grad in grads])
    spread = torch.stack((tokens, tokens), dim=1)[:, 0]
    noise = dataclasses.replace(
        noise, **{name: torch.stack((value, value), dim=1)[:, 0] for name, value in vars(noise).items() if name.endswith("_T")}
    )
    wide = torch.cat((weight, weight), dim=1)[:, :WIDTH]
    turned = weight.T.contiguous().T
    for given in (wide, turned):
        found = results(spread, given, noise, grads)
        assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


@pytest.mark.parametrize("integer", [torch.int32, torch.int16, torch.uint8])
def test_tokens_may_have_any_integer_dtype(integer, device):
    tokens, weight = _tokens(5, device), _weight(device)
    assert torch.equal(embedding(tokens.to(integer), weight), embedding(tokens, weight))


def test_two_runs_give_the_same_bits(dtype, device):
    weight, tokens, noise = _weight(device, dtype).requires_grad_(), _tokens(13, device, 2), _noise([(1, 0, 13, 13)], device)
    grad = random(13, WIDTH, dtype=dtype, device=device, seed=2)
    runs = []
    for _ in range(2):
        out = embedding(tokens, weight, noise)
        runs.append([out, *torch.autograd.grad(out, weight, grad)])
    assert all(torch.equal(one, other) for one, other in zip(*runs, strict=True))


@pytest.mark.parametrize("wrong", [-1, ROWS])
def test_a_token_that_is_no_row_raises(wrong):
    with pytest.raises(IndexError, match=f"token {wrong} is no row" if INTERPRETED else None):
        embedding(torch.tensor([3, wrong, 4]), _weight(torch.device("cpu")))


def test_offsets_beyond_31_bits_are_right(triton_device):
    tokens = torch.tensor([2, 0, 1, 2], device=triton_device)
    weight = _weight(triton_device, torch.float16)[:3]
    assert torch.equal(embedding(tokens, far_apart(weight)), embedding(tokens, weight))
    near, far = (module._embedding_backward(grad, tokens[:3], ROWS) for grad in (weight, far_apart(weight)))
    assert torch.equal(near, far)


def test_custom_operators_pass_torchs_checks(triton_device):
    tokens, weight = _tokens(5, triton_device), _weight(triton_device).requires_grad_()
    noise = _noise([(1, 0, 5, 5)], triton_device)
    torch.library.opcheck(module._embedding.registered, (tokens, weight, None, None, None, 0, 0))
    given = (noise.scale_T(WIDTH), noise.document_T, noise.position_T, noise.seed, noise.step)
    torch.library.opcheck(module._embedding.registered, (tokens, weight, *given))
    torch.library.opcheck(module._embedding_backward.registered, (weight.detach()[:5], tokens, ROWS))
