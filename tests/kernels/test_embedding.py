"""Embedding and NEFTune noise: the paper's scale, and independence of packing."""

import dataclasses
import math

import pytest
import torch
import torch.nn.functional as F

from kernels.embedding import EmbeddingNoise, embedding

WIDTH = 37  # no multiple of 4: the last group of words is cut


def _noise(documents, *, alpha=5.0, seed=3, step=7):
    """Noise of documents given as (id, first place, places, tokens of the whole document)."""
    document = torch.cat([torch.full((places,), index) for index, _, places, _ in documents])
    position = torch.cat([torch.arange(start, start + places) for _, start, places, _ in documents])
    length = torch.cat([torch.full((places,), tokens) for _, _, places, tokens in documents])
    return EmbeddingNoise(alpha, seed, step, document, position, length)


def _added(noise):
    weight = torch.zeros(11, WIDTH)
    return embedding(torch.zeros(len(noise.document_T), dtype=torch.long), weight, noise)


def test_without_noise_equals_torch():
    weight = torch.randn(50, WIDTH, requires_grad=True)
    tokens = torch.randint(0, 50, (200,))
    assert torch.equal(embedding(tokens, weight), F.embedding(tokens, weight))


@pytest.mark.parametrize("length", [1, 30, 4000])
def test_scale_is_the_papers(length):
    added = _added(_noise([(5, 0, length, length)]))
    bound = 5.0 / math.sqrt(length * WIDTH)
    assert added.abs().max() < bound
    # Variance of a uniform on (-b, b) is b^2 / 3; kurtosis 1.8 gives the standard error.
    variance, count = added.double().square().mean(), added.numel()
    assert abs(variance / (bound**2 / 3) - 1) < 6 * math.sqrt(0.8 / count)
    assert abs(added.double().mean()) < 6 * bound / math.sqrt(3 * count)


def test_noise_is_of_the_token_not_of_its_place_in_the_row():
    whole = _added(_noise([(1, 0, 10, 10), (2, 0, 6, 6), (9_000_000_000, 0, 4, 4)]))
    swapped = _added(_noise([(9_000_000_000, 0, 4, 4), (1, 0, 10, 10)]))
    assert torch.equal(whole[:10], swapped[4:])
    assert torch.equal(whole[16:], swapped[:4])
    # A document split over two rows keeps its noise, scaled by the whole document's length.
    first, second = _added(_noise([(1, 0, 7, 10)])), _added(_noise([(2, 0, 3, 6), (1, 7, 3, 10)]))
    assert torch.equal(torch.cat((first, second[3:])), whole[:10])


@pytest.mark.parametrize("change", ["seed", "step", "document_T", "position_T"])
def test_each_part_of_the_key_matters(change):
    noise = _noise([(1, 0, 10, 10)])
    other = dataclasses.replace(noise, **{change: getattr(noise, change) + 1})
    one, two = _added(noise), _added(other)
    # Shifted by a place the same words could come back; neither equal nor a copy elsewhere.
    assert not torch.isclose(one, two).any()


def test_upper_half_of_a_document_id_matters():
    assert not torch.isclose(_added(_noise([(1, 0, 10, 10)])), _added(_noise([(1 + 2**32, 0, 10, 10)]))).any()


def test_gradient_does_not_see_the_noise():
    weight = torch.randn(50, WIDTH, requires_grad=True)
    tokens = torch.randint(0, 50, (10,))
    grad = torch.randn(10, WIDTH)
    (noisy,) = torch.autograd.grad(embedding(tokens, weight, _noise([(1, 0, 10, 10)])), weight, grad)
    (clean,) = torch.autograd.grad(F.embedding(tokens, weight), weight, grad)
    assert torch.equal(noisy, clean)


def test_bfloat16_rounds_the_sum_once():
    weight = torch.randn(50, WIDTH).bfloat16()
    tokens = torch.randint(0, 50, (10,))
    noise = _noise([(1, 0, 10, 10)])
    expected = (F.embedding(tokens, weight).float() + _added(noise)).bfloat16()
    assert torch.equal(embedding(tokens, weight, noise), expected)
