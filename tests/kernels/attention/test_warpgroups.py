"""Attention's forward kernel for warpgroups: its source on a CPU, and on a GPU beside its plain twin."""

import ast
import importlib.util
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from kernels.attention import forward, warpgroups
from kernels.attention.tiles import LOG2_E, rows_and_parts
from kernels.configurations import TABLES, Configuration
from tests.kernels.attention import gluon_on_cpu
from tests.kernels.attention.gluon_on_cpu import Descriptor, Stuck, on_cpu
from tests.kernels.attention_rows import ROWS, Row, plain, with_nans
from tests.kernels.error_rule import check

# The rows of the plain kernel's tests, with two or four query heads for each key/value head.
PAIRED = {
    name: replace(row, heads=(2 * row.heads[0], row.heads[1]) if row.heads[0] == row.heads[1] else row.heads, size=16)
    for name, row in ROWS.items()
    if row.heads[0] // row.heads[1] != 3
}


def simulated(row, query, key, value, block=16, slots=2, seed=0, module=warpgroups):
    """(output, log-sum-exp) by the kernel's source, on a CPU, in programs of 16 queries."""
    lists = row.work()
    heads, kv_heads = row.heads
    rows, parts = rows_and_parts(row.tile, Configuration(rows=16))
    out = torch.full((row.tokens, heads, row.size), torch.nan, dtype=query.dtype)
    log_sum_exp = torch.full((heads, row.tokens), torch.nan)
    on_cpu(
        module,
        "_forward_kernel",
        lists.query_tiles * parts * heads // 2,
        Descriptor(query.flatten(1), (rows, row.size)),
        Descriptor(key.flatten(1), (block, row.size)),
        Descriptor(value.flatten(1), (block, row.size)),
        lists.work,
        lists.query_tiles + lists.key_tiles,
        row.tokens,
        lists.window,
        row.size**-0.5 * LOG2_E.value,
        out,
        log_sum_exp,
        HEADS=heads,
        GROUP=heads // kv_heads,
        SIZE=row.size,
        PARTS=parts,
        ROWS=rows,
        BLOCK=block,
        SLOTS=slots,
        seed=seed,
    )
    return out, log_sum_exp


@pytest.mark.parametrize(("block", "slots"), [(16, 2), (32, 3), (16, 1)])
@pytest.mark.parametrize("name", PAIRED)
def test_the_kernels_source_is_right_and_never_stuck(name, block, slots):
    row = PAIRED[name]
    query, key, value, _ = row.inputs(torch.float16, "cpu")
    seen = row.visible()
    exact = plain(query.double(), key.double(), value.double(), seen)
    usual = plain(query, key, value, seen)
    out, lse = simulated(row, query, key, value, block, slots)
    check("out", out, exact[0], usual[0])
    some = seen.any(dim=1)
    check("log-sum-exp", lse[:, some], exact[1][:, some], usual[1].float()[:, some])
    assert (out[~some] == 0).all()
    assert (lse[:, ~some] == float("-inf")).all()


def test_no_order_of_copies_and_partitions_changes_a_bit():
    row = PAIRED["prompt that only a tile's first part sees"]
    inputs = row.inputs(torch.float16, "cpu")[:3]
    expected = simulated(row, *inputs)
    for seed in range(1, 6):
        found = simulated(row, *inputs, slots=1 + seed % 3, seed=seed)
        assert all(torch.equal(one, other) for one, other in zip(expected, found, strict=True))


@pytest.mark.parametrize("block", [16, 32])
def test_another_documents_nans_change_no_bit(block):
    """The last block of keys of the first document reaches into the second."""
    row = Row((21, 25, 9), 40, 32, (2, 1))
    inputs = row.inputs(torch.float16, "cpu")[:3]
    spoilt, others = with_nans(inputs, slice(21, 46))
    before, after = simulated(row, *inputs, block), simulated(row, *spoilt, block)
    assert torch.equal(before[0][others], after[0][others])
    assert torch.equal(before[1][:, others], after[1][:, others])
    assert after[0][~others].isnan().all()


# Of the kernel's source: (lines, what stands there instead).
ARRIVAL = "            mbarrier.arrive(value_empty.index(before), count=1)\n"
PRODUCT = "            acc = warpgroup_mma_wait(0, deps=(running,))\n"
MISTAKES = {
    "keys are read too early": ("            mbarrier.wait(key_full.index(slot), (number // SLOTS) & 1)\n", ""),
    "the last values are read too early": ("        mbarrier.wait(value_full.index(last), ((blocks - 1) // SLOTS) & 1)\n", ""),
    "a slot is filled while it is read": ("            mbarrier.wait(value_empty.index(slot), over)\n", ""),
    "values are freed before their product": (PRODUCT + ARRIVAL, ARRIVAL + PRODUCT),
    "keys are never freed": ("            mbarrier.arrive(key_empty.index(slot), count=1)\n", ""),
    "the producer waits for the other phase": ("over = ((number // SLOTS) & 1) ^ 1", "over = (number // SLOTS) & 1"),
    "scores are read in flight": ("warpgroup_mma_wait(1, deps=(started,))", "warpgroup_mma_wait(2, deps=(started,))"),
    "no fence behind stores": ("        fence_async_shared()\n", "        pass\n"),
    "blocks are skipped": ("    first += BLOCK\n", "    first += 2 * BLOCK\n"),
    "values behind the end stay": ("            if rest < ROWS:", "            if rest < 0:"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_cpu_finds_mistakes_of_the_kernels_source(mistake, tmp_path, monkeypatch):
    """A partition that waits for ever, a rule that is broken, or wrong numbers."""
    monkeypatch.setattr(gluon_on_cpu, "PATIENCE", 0.3)
    right, wrong = MISTAKES[mistake]
    path, source = tmp_path / "warpgroups.py", Path(warpgroups.__file__).read_text(encoding="utf-8")
    assert source.count(right) == 1
    path.write_text(source.replace(right, wrong), encoding="utf-8")
    spec = importlib.util.spec_from_file_location("mistaken", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    row = Row((100, 25), 90, 32, (2, 1))
    inputs, others = with_nans(row.inputs(torch.float16, "cpu")[:3], slice(100, 125))
    expected = plain(*(tensor.double() for tensor in inputs), row.visible())[0][others]
    try:
        out, _ = simulated(row, *inputs, module=module)
    except (Stuck, AssertionError):
        return
    assert not torch.allclose(out[others].double(), expected, rtol=0.01, atol=0.01)


def entry(**changed):
    return replace(Configuration(rows=64, block=128, stages=2, warpgroups=True), **changed)


def test_the_configuration_chooses_the_kernel_where_it_can_run(monkeypatch):
    started = []
    monkeypatch.setattr(warpgroups, "launch", lambda kernel, grid, *arguments, **named: started.append(grid))
    monkeypatch.setattr(forward, "launch_tiles", lambda *arguments, **named: started.append("plain"))

    def run(heads=(8, 2), size=64, dtype=torch.bfloat16, tile=128):
        row = Row((100, 60), 50, tile, heads, size=size)
        query, key, value, _ = row.inputs(dtype, "cpu")
        work = row.work()
        forward.attention_forward(query, key, value, work.work, *work.numbers)

    run()
    for table in TABLES.values():
        monkeypatch.setitem(table, "attention_forward", entry())
    run()
    run(size=128, dtype=torch.float16)
    for other in ({"heads": (2, 2)}, {"heads": (6, 2)}, {"size": 32}, {"dtype": torch.float32}, {"tile": 32}):
        run(**other)
    # Two documents of a tile each, in two parts, for four pairs of heads.
    assert started == ["plain", (16,), (16,), *["plain"] * 5]


def test_nothing_experimental_is_imported_before_it_is_used():
    for path in Path(forward.__file__).parents[1].rglob("*.py"):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, (ast.Import, ast.ImportFrom)) and path != Path(warpgroups.__file__):
                names = [getattr(node, "module", None) or "", *(alias.name for alias in node.names)]
                assert not any("experimental" in name or "warpgroups" in name for name in names), path


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("block", "slots"), [(128, 2), (64, 2), (64, 3), (128, 3)])
@pytest.mark.parametrize(
    "row",
    [
        Row((2000, 1, 63, 64, 65, 500), 700, 128, (8, 2), size=128),
        Row((300, 200, 257), None, 128, (4, 2), (-1, 0, 0), padding=40, size=64),
        Row((1500, 700, 129), 1024, 128, (4, 1), (-1, 0, 0), size=128),
    ],
    ids=["documents", "shared prompt, no window", "shared prompt beyond the window"],
)
def test_a_gpu_gives_what_the_plain_kernel_gives(row, block, slots, dtype, monkeypatch):
    if torch.cuda.get_device_capability()[0] != 9:
        pytest.skip("needs Hopper: sm_90")
    query, key, value, _ = row.inputs(dtype, "cuda")
    work = row.work("cuda")
    twin = forward.attention_forward(query, key, value, work.work, *work.numbers)
    monkeypatch.setitem(TABLES[90], "attention_forward", entry(block=block, stages=slots))
    found, again = (forward.attention_forward(query, key, value, work.work, *work.numbers) for _ in range(2))
    assert all(torch.equal(one, other) for one, other in zip(found, again, strict=True))
    seen = row.visible()
    exact = plain(query.double(), key.double(), value.double(), seen)
    check("out", found[0], exact[0], twin[0])
    some = seen.any(dim=1).to("cuda")
    check("log-sum-exp", found[1][:, some], exact[1][:, some], twin[1][:, some])
    assert (found[0][~some] == 0).all()
    assert (found[1][:, ~some] == float("-inf")).all()
    # Another document's NaN.
    spoilt, others = with_nans([query, key, value], slice(0, row.lengths[0]) if row.prefixes is None else slice(-1, None))
    after = forward.attention_forward(*spoilt, work.work, *work.numbers)
    assert torch.equal(found[0][others], after[0][others])
