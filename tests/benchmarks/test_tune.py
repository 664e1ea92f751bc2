"""The search for launches: what it tries, what it leaves in the table, what it writes. Only a GPU gives its times a meaning."""

import dataclasses
import json

import pytest
import torch

from benchmarks import tune
from benchmarks.operators import OPERATORS
from benchmarks.tune import SEARCHES, Candidate, TuneSettings, candidates, in_table
from kernels.configurations import TABLES, Configuration

CPU = torch.device("cpu")


@pytest.mark.parametrize("kernel", SEARCHES)
def test_a_search_names_an_operator_its_direction_and_fields_of_the_table(kernel):
    search = SEARCHES[kernel]
    assert search.direction in OPERATORS[search.operator].directions
    fields = {field.name for field in dataclasses.fields(Configuration)}
    assert all(set(grid) <= fields for grid in search.grids)
    for table in TABLES.values():
        found = candidates(kernel, table[kernel])
        assert found[0] == Candidate(kernel, table[kernel])
        assert len({candidate.text for candidate in found}) == len(found) > 1


def test_the_table_is_restored_also_after_an_error():
    other = Candidate("adamw", dataclasses.replace(TABLES[90]["adamw"], block=64))
    before, seen = TABLES[90]["adamw"], []

    def fail():
        seen.append(TABLES[90]["adamw"].block)
        raise RuntimeError

    with pytest.raises(RuntimeError), in_table(other, CPU):
        fail()
    assert seen == [64]
    assert TABLES[90]["adamw"] is before


def test_rows_are_sorted_and_compared_with_the_table(tmp_path, monkeypatch):
    """Five candidates: one cannot be compiled, one fails when it is measured; the times are made up."""
    blocks = (512, 1024, 256, 2048, 4096)
    monkeypatch.setitem(SEARCHES, "adamw", dataclasses.replace(SEARCHES["adamw"], grids=({"block": blocks},)))

    def compiled(settings, device, tried):
        return {candidate: "does not fit" if candidate.configuration.block == 2048 else None for candidate in tried}

    def compile_one(bench, candidate):
        return "out of memory" if candidate.configuration.block == 4096 else None

    def seconds(bench, candidate):
        median = candidate.configuration.block / 1e6
        return {"median": median, "low": median, "high": median, "samples": 1}

    monkeypatch.setattr(tune, "_compiled", compiled)
    monkeypatch.setattr(tune.Bench, "compile", compile_one)
    monkeypatch.setattr(tune.Bench, "seconds", seconds)
    out = tmp_path / "tune.json"
    tune.run(TuneSettings(kernels=("adamw",), preset="small", tokens=16, device="cpu", out=str(out)))
    content = json.loads(out.read_text())
    assert content["complete"]
    measured, missing = content["rows"][:3], content["rows"][3:]
    assert [row["candidate"] for row in measured] == [f"block {block}" for block in (256, 512, 1024)]
    assert [row["in_table"] for row in measured] == [False, False, True]
    assert [row["speed_over_table"] for row in measured] == [4.0, 2.0, 1.0]
    reasons = {row["candidate"]: row["missing"] for row in missing}
    assert reasons == {"block 2048": "does not fit", "block 4096": "out of memory"}


def test_a_candidate_is_timed_by_its_operator():
    bench = tune.Bench(TuneSettings(preset="small", tokens=16, repeats=2), CPU)
    (entry, *_) = candidates("swiglu", TABLES[90]["swiglu"])
    assert bench.compile(entry) is None
    assert bench.seconds(entry)["samples"] == 2
    bench.work = lambda candidate: 1 / 0
    assert bench.compile(entry) == "ZeroDivisionError: division by zero"


@pytest.mark.parametrize(("given", "says"), [({"kernels": ("adam",)}, "unknown 'adam'"), ({"tokens": 0}, "tokens = 0")])
def test_wrong_settings_are_refused(given, says):
    with pytest.raises(ValueError, match=says):
        TuneSettings(**given)
