"""Offline compilation of every kernel as training launches it: no GPU is needed and nothing is executed.

The launched kernels are compiled by running the operators on tensors without data, under a driver that only names a chip.
`make test` compiles one launch of each kernel for sm_90; `make test-all` all launches for all chips. To see registers, shared
memory and instructions: python -m pytest -s tests/kernels/test_compilation.py
"""

import re
import subprocess
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

import kernels.configurations
import kernels.launch
from tests.kernels.launches import ALL, FP8, QUICK

pytestmark = pytest.mark.skipif(kernels.launch.INTERPRETED, reason="the interpreter compiles nothing")
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
# Bytes of shared memory that a program may have.
SHARED = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}
# Bytes of spilled registers that a kernel may have on a chip. None on sm_90 by Triton 3.9.
SPILLS = {
    (80, "key_kernel"): 72,
    # Outside of the loops over blocks.
    (100, "query_kernel"): 56,
    (100, "key_kernel"): 32,
}
# The assemblers of older Tritons spill more, nearly all outside of the loops over blocks (seen with 3.6 and 3.8).
if tuple(map(int, triton.__version__.split(".")[:2])) < (3, 9):
    SPILLS |= {(80, "query_kernel"): 32, (90, "query_kernel"): 72, (90, "key_kernel"): 24}
# Launches that are made for one chip (`kernels.configurations` says why).
ONLY = {"attention, gradients in one pass": 90, "attention by warpgroups": 90}
# The instructions of warpgroups' matrix products that a kernel with products must have on these chips: wgmma and tcgen05.
PRODUCTS = {90: "HGMMA", 100: "UTCHMMA"}
# Kernels whose tiles may have fewer rows than these instructions take: their cost is reading, not computing.
FEW_ROWS = {"split_kernel", "rows_kernel"}
# Kernels that read a few numbers for each token, and no row of them.
NARROW = {"largest_scale_kernel"}
# The launches, and for which chips; the rest of ALL x SHARED is slow.
CASES = [
    pytest.param(name, chip, id=f"{name}, sm_{chip}", marks=[] if name in QUICK and chip == 90 else pytest.mark.slow)
    for chip in SHARED
    for name in ALL
    if (chip >= 90 or name not in FP8) and ONLY.get(name, chip) == chip
]


@dataclass(frozen=True)
class Target:
    """A driver that knows a chip and no device."""

    chip: int

    def get_current_target(self):
        return GPUTarget("cuda", self.chip, 32)

    def get_current_device(self):
        return self.chip

    def get_current_stream(self, device):
        return 0


@pytest.fixture
def compiled(monkeypatch):
    """compiled(chip, launch, tokens) -> [(kernel, its binary)] of everything that the launch starts."""

    def compile_all(chip, launch, tokens):
        done = []
        run = JITFunction.run

        def compile_only(self, *arguments, grid, warmup, **keywords):
            done.append((self, run(self, *arguments, grid=grid, warmup=True, **keywords)))

        with monkeypatch.context() as patch:
            patch.setattr(JITFunction, "run", compile_only)
            patch.setattr(kernels.launch, "INTERPRETED", True)
            patch.setattr(kernels.configurations, "chip", lambda device: chip)
            triton.runtime.driver.set_active(Target(chip))
            launch(torch.bfloat16, tokens)
        assert done
        return done

    return compile_all


@pytest.mark.parametrize(("name", "chip"), CASES)
def test_kernels_compile_once_without_spills_and_load_16_bytes_at_once(name, chip, compiled, tmp_path):
    done = compiled(chip, ALL[name], 200)
    for tokens in (1, 16, 127, 8192, 2**31 - 1):
        again = compiled(chip, ALL[name], tokens)
        assert [binary.hash for _, binary in again] == [binary.hash for _, binary in done], (
            f"{tokens} tokens are another kernel"
        )
    for kernel, binary in done:
        usage = resources(binary.asm["cubin"], tmp_path)
        loads = Counter(re.findall(r"(ld\.global\S*|st\.global\S*)", binary.asm["ptx"]))
        title = kernel.__name__.strip("_")
        print(
            f"\nsm_{chip} {name:32} {title:24} {usage['REG']:3} registers, {binary.metadata.shared:6} B shared, "
            f"{usage['instructions']:5} instructions, {binary.metadata.num_warps} warps",
            end="",
        )
        spilled = usage["STACK"] + usage["LOCAL"]
        assert spilled <= SPILLS.get((chip, title), 0), f"{title} spills {spilled} B of registers"
        assert binary.metadata.shared <= SHARED[chip], f"{title} needs {binary.metadata.shared} B of shared memory"
        wide = [load for load in loads if load.startswith("ld") and load.endswith(("v4.b32", "v8.b32", "v2.b64", "v4.b64"))]
        copied = "cp.async.bulk.tensor" in binary.asm["ptx"] or "cp.async.cg" in binary.asm["ptx"]
        assert wide or copied or title in NARROW, f"{title} loads {dict(loads)}: nothing 16 bytes wide"
        if (
            ("tt.dot" in binary.asm.get("ttir", "") or "warp_group_dot" in binary.asm["ttgir"])
            and chip in PRODUCTS
            and title not in FEW_ROWS
        ):
            assert usage[PRODUCTS[chip]], f"{title} has no {PRODUCTS[chip]} instructions"


def resources(cubin: bytes, folder: Path) -> dict[str, int]:
    """Registers, bytes of stack and local memory, and instructions of a binary, by Triton's own cuobjdump."""
    path = folder / "kernel.cubin"
    path.write_bytes(cubin)

    def dump(option: str) -> str:
        return subprocess.run([TOOLS / "cuobjdump", option, path], capture_output=True, text=True, check=True).stdout

    usage = {name: int(value) for name, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", dump("-res-usage"))}
    # Every instruction of SASS begins with its offset in a comment of hexadecimal digits.
    lines = re.findall(r"^\s+/\*[0-9a-f]{4,}\*/.*", dump("-sass"), re.MULTILINE)
    products = {name: sum(name in line for line in lines) for name in PRODUCTS.values()}
    return usage | products | {"instructions": len(lines)}
