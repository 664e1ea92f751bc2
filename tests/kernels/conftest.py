"""The tests of an operator run three ways from one text.

On a CPU they test the eager reference; with TRITON_INTERPRET=1, the kernels in Triton's interpreter; marked `gpu`, the kernels
on a GPU. `make test` runs the first two.
"""

import numpy as np
import pytest
import torch
import triton.language as tl
import triton.runtime.interpreter

from kernels.launch import INTERPRETED

# The interpreter truncates float32 to bfloat16 instead of rounding, and multiplies bfloat16 wrongly.
DTYPES = [torch.float32, torch.float16, *([] if INTERPRETED else [torch.bfloat16])]


def pytest_generate_tests(metafunc):
    """Run a test that takes `dtype` in each dtype, unless its own marks say which."""
    if "dtype" in metafunc.fixturenames and "dtype" not in _parameters(metafunc):
        metafunc.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))


def _parameters(metafunc) -> set[str]:
    """The names of the parameters that a test's own marks give."""
    return {
        name.strip()
        for mark in metafunc.definition.iter_markers("parametrize")
        for name in (mark.args[0].split(",") if isinstance(mark.args[0], str) else mark.args[0])
    }


@pytest.fixture(autouse=True)
def _poisoned():
    """Fill every tensor that is made without values with NaN, so that elements which a kernel fails to write show."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def _e4m3_as_on_a_gpu(monkeypatch):
    """Casts of E4M3 in the interpreter: its own lose the carry of a rounded mantissa (triton #8322) and read NaN as 480."""
    convert = triton.runtime.interpreter._convert_float

    def cast(values, source, target, mode):
        if (source, target) == (tl.float32, tl.float8e4nv):
            codes = torch.from_numpy(np.ascontiguousarray(values)).clamp(-448, 448).to(torch.float8_e4m3fn)
            return codes.view(torch.uint8).numpy().reshape(values.shape)
        if (source, target) == (tl.float8e4nv, tl.float32):
            codes = torch.from_numpy(np.ascontiguousarray(values)).view(torch.float8_e4m3fn)
            return codes.float().numpy().reshape(values.shape)
        return convert(values, source, target, mode)

    monkeypatch.setattr(triton.runtime.interpreter, "_convert_float", cast)
