"""Mutants are made of every kernel, each is a program of its own, and the tests detect a few of them."""

import subprocess
import sys

import pytest

from kernels.launch import INTERPRETED
from tests.kernels.mutation.modules import ROOT, modules
from tests.kernels.mutation.mutators import drawn, listed, mutants

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
    explained = moved.replace("def host(n):", 'def host(n):\n    """One more."""')
    assert [mutant.key for mutant in mutants(explained)] == [mutant.key for mutant in mutants(explained.replace("One", "Two"))]


def test_a_listed_mutant_is_known_again_after_its_variables_and_functions_are_renamed():
    names = ["kernel: at > 1 -> at >= 1", "kernel: tl.load(x + at, mask=at < n, other=0.0) -> tl.load(x + at)"]
    renamed = KERNEL.replace("at ", "place ").replace(" at,", " place,").replace("def kernel", "def other")
    known, stale = listed(mutants(renamed), names)
    assert known == {
        "other: place > 1 -> place >= 1",
        "other: tl.load(x + place, mask=place < n, other=0.0) -> tl.load(x + place)",
    }
    assert not stale


def test_a_listed_mutant_that_is_no_more_is_named():
    name = "kernel: at > 1 -> at >= 1"
    assert listed(mutants(KERNEL.replace("at > 1", "at > 2")), [name]) == (set(), [name])


def test_a_draw_is_fixed_by_its_seed_and_changes_by_one_where_a_mutant_is_added():
    found = mutants(KERNEL)
    chosen = drawn(found, 10, seed=0)
    assert len(chosen) == 10
    assert chosen == drawn(found, 10, seed=0) != drawn(found, 10, seed=1)
    assert len({mutant.name for mutant in drawn(found[1:], 10, seed=0)} - {mutant.name for mutant in chosen}) <= 1
    assert drawn(found, len(found) + 1, seed=0) == found


@pytest.mark.slow
@pytest.mark.parametrize("module", modules().values(), ids=modules())
def test_all_mutants_of_a_module_differ(module):
    made = module.mutants()
    assert len({mutant.name for mutant in made}) == len(made)
    for mutant in made:
        assert mutant.source != module.source
        compile(mutant.source, str(module.path), "exec")


@pytest.mark.slow
@pytest.mark.skipif(INTERPRETED, reason="starts the interpreter itself")
def test_the_tests_detect_a_few_mutants():
    arguments = ["gradient_norm", "--kinds", "sum,store,mask", "--jobs", "1", "--afresh"]
    done = subprocess.run(
        [sys.executable, "-m", "tests.kernels.mutation.run", *arguments], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "mutants were detected" in done.stdout
