"""Mutants are made of every kernel, each is a program of its own, and the tests detect a few of them."""

import subprocess
import sys

import pytest

from kernels.launch import INTERPRETED
from tests.kernels.mutation.modules import ROOT, modules
from tests.kernels.mutation.mutators import mutants

KERNEL = """
@triton.jit
def kernel(x, n, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    total = tl.load(x + at, mask=at < n, other=0.0)
    for step in range(0, n, BLOCK):
        total += tl.where(at > 1, tl.maximum(total, 0.0), -total)
    if n > 0:
        tl.store(x + at, total, mask=at < n)

def host(n):
    return n + 1
"""


def names(source, functions=()):
    return {mutant.name.removeprefix("kernel: ") for mutant in mutants(source, functions)}


def test_every_kind_of_change_is_made():
    assert names(KERNEL) >= {
        "at < n -> at <= n",
        "at < n -> at <= n (number 2)",
        "tl.program_id(0).to(tl.int64) -> tl.program_id(0)",
        "tl.program_id(0).to(tl.int64) * BLOCK -> tl.program_id(0).to(tl.int64)",
        "tl.load(x + at, mask=at < n, other=0.0) -> tl.load(x + at)",
        "for step in range(0, n, BLOCK): -> for step in range(0 + BLOCK, n, BLOCK):",
        "for step in range(0, n, BLOCK): -> for step in range(0, n - BLOCK, BLOCK):",
        "tl.where(at > 1, tl.maximum(total, 0.0), -total) -> tl.maximum(total, 0.0)",
        "tl.where(at > 1, tl.maximum(total, 0.0), -total) -> -total",
        "tl.maximum(total, 0.0) -> tl.minimum(total, 0.0)",
        "-total -> total",
        "if n > 0: -> if True:",
        "if n > 0: -> if False:",
        "tl.store(x + at, total, mask=at < n) -> pass",
    }


def test_functions_that_are_no_kernels_are_changed_only_by_name():
    assert not any(name.startswith("host") for name in names(KERNEL))
    assert "host: n + 1 -> n" in names(KERNEL, ["host"])


def test_mutants_do_not_depend_on_lines_or_comments():
    moved = "import os\n\n# A comment.\n" + KERNEL.replace("    if n > 0:", "\n    # Another one.\n    if n > 0:")
    assert names(moved) == names(KERNEL)


@pytest.mark.slow
@pytest.mark.parametrize("module", modules().values(), ids=modules())
def test_all_mutants_of_a_module_differ(module):
    made = module.mutants()
    assert len({mutant.name for mutant in made}) == len(made)
    for mutant in made:
        assert mutant.source != module.source
        compile(mutant.source, str(module.path), "exec")


@pytest.mark.skipif(INTERPRETED, reason="starts the interpreter itself")
def test_the_tests_detect_a_few_mutants():
    arguments = ["gradient_norm", "--kinds", "sum,store,mask", "--jobs", "1", "--afresh"]
    done = subprocess.run(
        [sys.executable, "-m", "tests.kernels.mutation.run", *arguments], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "mutants were detected" in done.stdout
