"""Philox, against its published known answers and against the words that kernels draw."""

import pytest
import torch
import triton
import triton.language as tl

from kernels.adamw import _noise
from kernels.embedding import EmbeddingNoise, noise_reference
from kernels.launch import launch
from kernels.philox import NEFTUNE, ROUNDING, key_of, philox, philox_words, uniform_symmetric

# The known-answer test of the Random123 library for philox4x32, 10 rounds.
KNOWN = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


@triton.jit
def _draw(out, key: tl.int64, GROUPS: tl.constexpr):
    group = tl.arange(0, GROUPS)
    words = philox_words(key, group, group * 7 + 1, group * 13 + 5, group * 0 + 3)
    tl.store(out + tl.arange(0, 4 * GROUPS), words.to(tl.int32, bitcast=True))


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN)
def test_the_published_answers_come_out(counter, key, expected):
    words = philox(tuple(torch.tensor(word) for word in counter), key)
    assert tuple(int(word) for word in words) == expected


def test_kernels_draw_the_same_words(triton_device):
    drawn = torch.zeros(256, dtype=torch.int32, device=triton_device)
    launch(_draw, (1,), drawn, (123456 << 32) | 987654, GROUPS=64, device=triton_device, warps=4)
    group = torch.arange(64)
    words = philox((group, group * 7 + 1, group * 13 + 5, group * 0 + 3), (987654, 123456))
    assert torch.equal(drawn.cpu(), torch.stack(words, dim=1).flatten().to(torch.int32))


def test_uniform_is_symmetric_and_open():
    ends = uniform_symmetric(torch.tensor([0x80000000, 0xFFFFFFFF, 0, 0x7FFFFFFF]))
    step = 2.0**-23
    assert ends.tolist() == [-1 + step / 2, -step / 2, step / 2, 1 - step / 2]
    words = philox((torch.arange(100_000), *(torch.tensor(0),) * 3), (1, 2))
    values = uniform_symmetric(torch.stack(words)).double()
    # Mean 0 and variance 1/3, within five standard errors of 400,000 draws.
    assert abs(values.mean()) < 5 * (1 / 3 / values.numel()) ** 0.5
    assert abs(values.var() - 1 / 3) < 5 * (4 / 45 / values.numel()) ** 0.5


def test_noise_and_rounding_draw_different_words():
    """With the same seed, step and counter: document 0 at place 0, and parameter 0 from its first element on."""
    place = torch.zeros(1, dtype=torch.int64)
    noise = noise_reference(EmbeddingNoise(1.0, 5, 9, place, place, place + 1), 4)[0]
    rounding = uniform_symmetric(_noise(0, 4, 0, key_of(ROUNDING, 5, 9), torch.device("cpu"))) * 0.5
    assert (noise != rounding).all()
    # The same key would have given the same words.
    assert torch.equal(noise, uniform_symmetric(_noise(0, 4, 0, key_of(NEFTUNE, 5, 9), torch.device("cpu"))) * 0.5)


def test_a_key_takes_32_bits_of_seed_and_step():
    assert key_of(NEFTUNE, -1, 2**32 + 7) == (NEFTUNE ^ 0xFFFFFFFF, 7)
