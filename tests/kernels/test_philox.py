"""Philox, against its published known answers and against Triton's, which the kernels use."""

import os
import subprocess
import sys

import pytest
import torch

from kernels.philox import philox, uniform_symmetric

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

TRITON = """
import torch, triton, triton.language as tl
from kernels.philox import philox

@triton.jit
def draw(out, seed, n: tl.constexpr):
    i = tl.arange(0, n)
    a, b, c, d = tl.philox(seed, i, i * 7 + 1, i * 13 + 5, i * 0 + 3)
    tl.store(out + i, a.to(tl.int32, bitcast=True))
    tl.store(out + n + i, b.to(tl.int32, bitcast=True))
    tl.store(out + 2 * n + i, c.to(tl.int32, bitcast=True))
    tl.store(out + 3 * n + i, d.to(tl.int32, bitcast=True))

out = torch.zeros(256, dtype=torch.int32)
draw[(1,)](out, (123456 << 32) | 987654, 64)
i = torch.arange(64)
words = philox((i, i * 7 + 1, i * 13 + 5, i * 0 + 3), (987654, 123456))
assert torch.equal(torch.stack(words).view(-1).to(torch.int32), out)
"""


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN)
def test_the_published_answers_come_out(counter, key, expected):
    words = philox(tuple(torch.tensor(word) for word in counter), key)
    assert tuple(int(word) for word in words) == expected


def test_equals_tritons(request):
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    # A file, not -c: Triton reads the source of what it compiles.
    script = request.getfixturevalue("tmp_path") / "draw.py"
    script.write_text(TRITON)
    environment["PYTHONPATH"] = str(request.config.rootpath)
    done = subprocess.run([sys.executable, str(script)], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_uniform_is_symmetric_and_open():
    ends = uniform_symmetric(torch.tensor([0x80000000, 0xFFFFFFFF, 0, 0x7FFFFFFF]))
    step = 2.0**-23
    assert ends.tolist() == [-1 + step / 2, -step / 2, step / 2, 1 - step / 2]
    words = philox((torch.arange(100_000), *(torch.tensor(0),) * 3), (1, 2))
    values = uniform_symmetric(torch.stack(words)).double()
    # Mean 0 and variance 1/3, within five standard errors of 400,000 draws.
    assert abs(values.mean()) < 5 * (1 / 3 / values.numel()) ** 0.5
    assert abs(values.var() - 1 / 3) < 5 * (4 / 45 / values.numel()) ** 0.5
