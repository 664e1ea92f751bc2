"""Philox-4x32-10, a counter-based random number generator (Salmon et al. 2011, https://doi.org/10.1145/2063384.2063405).

The bits are a pure function of key and counter. Noise keyed by a token's identity (seed, step, document, position, column) is
therefore the same however the tokens are packed, sharded or resumed. Triton's `tl.philox` computes the same function.

A run's uses share its seed and steps, and their counters overlap. So each use has a number of its own below, which changes the
key (`key_of`): no two uses draw the same words.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

_MULTIPLIER = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
WORD = 0xFFFFFFFF  # all bits of an unsigned 32-bit word

# The uses: the four letters of a name, as ASCII.
NEFTUNE = 0x4E454654  # NEFT: noise on embeddings
ROUNDING = 0x524F554E  # ROUN: stochastic rounding of moments


def key_of(use: int, seed: int, step: int) -> tuple[int, int]:
    """The key of a use of random numbers: (use xor seed, step), 32 bits of each."""
    return (use ^ seed) & WORD, step & WORD


def philox(counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[int, int]) -> tuple[Tensor, ...]:
    """Ten rounds of Philox-4x32.

    Args: counter: four broadcastable int64 tensors of unsigned 32-bit words. key: two unsigned 32-bit words.
    Returns: four int64 tensors of the broadcast shape, of unsigned 32-bit words.
    """
    c0, c1, c2, c3 = torch.broadcast_tensors(*counter)
    k0, k1 = key
    for _ in range(10):
        high0, low0 = _multiply(c0, _MULTIPLIER[0])
        high1, low1 = _multiply(c2, _MULTIPLIER[1])
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + _WEYL[0]) & WORD, (k1 + _WEYL[1]) & WORD
    return c0, c1, c2, c3


def _multiply(word: Tensor, constant: int) -> tuple[Tensor, Tensor]:
    """High and low 32 bits of a 32 x 32-bit product, by 16-bit halves: the whole would overflow a signed 64-bit integer."""
    lower = word * (constant & 0xFFFF)
    upper = word * (constant >> 16) + (lower >> 16)
    return upper >> 16, ((upper & 0xFFFF) << 16) | (lower & 0xFFFF)


def uniform_symmetric(word: Tensor) -> Tensor:
    """float32 uniform on (-1, 1) from unsigned 32-bit words: 2^24 equally spaced values, symmetric about 0, never 0.

    The value is (s + 1/2) / 2^23 for the signed upper 24 bits s. It is exact in float32, so every implementation gives the same
    bits.
    """
    signed = (word >> 8) - ((word >> 31) << 24)
    return (signed.to(torch.float32) + 0.5) * 2.0**-23


@triton.jit
def philox_words(key, c0, c1, c2, c3):
    """One random word for each element: element 4n + w gets word w of the counter whose first word is c0[n]."""
    w0, w1, w2, w3 = tl.philox(key, c0, c1, c2, c3)
    return tl.interleave(tl.interleave(w0, w2), tl.interleave(w1, w3))
