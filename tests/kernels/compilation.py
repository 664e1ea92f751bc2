"""Offline compilation of every kernel for each chip, as launched for Mistral's shapes: no GPU is needed, nothing is executed.

What is compiled is what the public functions launch: they run on tensors without data, under a driver that only names a target.
Prints registers, shared memory and instructions; `python -m pytest -s tests/kernels/compilation.py` shows them.
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
from tests.kernels.cases import cases

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
# Bytes of shared memory that a program may have.
SHARED = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}
# Bytes of spilled registers that a kernel may have on a chip. Those on sm_90 cost less than what would avoid them: smaller
# blocks were measured to be slower (`benchmarks.tune`).
SPILLS = {(80, "query_kernel"): 128, (80, "key_kernel"): 128, (90, "key_kernel"): 64}
# The instructions of warpgroups' matrix products, which kernels with products there must have: wgmma and tcgen05.
PRODUCTS = {90: "HGMMA", 100: "UTCHMMA"}
# Kernels whose tiles may have fewer rows than these instructions take: what they read costs more than what they compute.
FEW_ROWS = {"split_kernel"}
# Kernels whose data allows no loads of 16 bytes.
NARROW: set[str] = set()
CASES = {name: launches for case in cases().values() for name, launches in case.LAUNCHES.items()}


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
    """compiled(chip, call) -> [(kernel, what Triton made of it)] of all launches of the call."""
    assert not kernels.launch.INTERPRETED

    def compile_all(chip, call):
        done = []
        run = JITFunction.run

        def compile_only(self, *arguments, grid, warmup, **keywords):
            done.append((self, run(self, *arguments, grid=grid, warmup=True, **keywords)))

        with monkeypatch.context() as patch:
            patch.setattr(JITFunction, "run", compile_only)
            patch.setattr(kernels.launch, "INTERPRETED", True)
            patch.setattr(kernels.configurations, "chip", lambda device: chip)
            triton.runtime.driver.set_active(Target(chip))
            call()
        return done

    return compile_all


@pytest.mark.parametrize("chip", [80, 90, 100])
@pytest.mark.parametrize("name", CASES)
def test_compiles_without_spills(name, chip, compiled, tmp_path):
    done = compiled(chip, lambda: CASES[name](torch.bfloat16, 200))
    assert done
    for kernel, binary in done:
        usage = resources(binary.asm["cubin"], tmp_path)
        loads = Counter(re.findall(r"(ld\.global\S*|st\.global\S*)", binary.asm["ptx"]))
        title = kernel.__name__.strip("_")
        print(
            f"\nsm_{chip} {name:28} {title:24} {usage['REG']:3} registers, {binary.metadata.shared:6} B shared, "
            f"{usage['instructions']:5} instructions, {binary.metadata.num_warps} warps",
            end="",
        )
        spilled = usage["STACK"] + usage["LOCAL"]
        assert spilled <= SPILLS.get((chip, title), 0), f"{title} spills {spilled} B of registers"
        assert binary.metadata.shared <= SHARED[chip], f"{title} needs {binary.metadata.shared} B of shared memory"
        wide = [load for load in loads if load.startswith("ld") and load.endswith(("v4.b32", "v8.b32", "v2.b64", "v4.b64"))]
        copied = "cp.async.bulk.tensor" in binary.asm["ptx"] or "cp.async.cg" in binary.asm["ptx"]
        assert wide or copied or title in NARROW, f"{title} loads {dict(loads)}: nothing 16 bytes wide"
        if "tt.dot" in binary.asm["ttir"] and chip in PRODUCTS and title not in FEW_ROWS:
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


@pytest.mark.parametrize("name", CASES)
def test_any_number_of_tokens_is_one_kernel(name, compiled):
    """At most one more where a single token lets a whole dimension vanish."""
    keys = []
    for tokens in (1, 16, 127, 8192, 2**31 - 1):
        done = compiled(90, lambda tokens=tokens: CASES[name](torch.bfloat16, tokens))
        keys.append([(kernel.__name__, binary.hash) for kernel, binary in done])
    assert all(key == keys[0] for key in keys)
