"""The table beside TRL: its data, what it compares, and a run of it."""

import importlib.util
import json

import numpy as np
import pytest

from benchmarks import finetune
from benchmarks.contest import Outcome
from benchmarks.definitions import Work
from benchmarks.finetune import FinetuneBenchSettings, comparison, row_of, write_data
from engine.data.dataset import TokenDataset


def measured(name, per_second, per_cpu_second, gib, slower=1.0, **fields):
    def one(value):
        return {"median": value, "low": value, "high": value, "samples": 5}

    return {
        "name": name, "tokens_per_second": one(per_second), "tokens_per_cpu_second": one(per_cpu_second),
        "tokens_per_second_with_reference": one(per_second / slower),
        "tokens_per_cpu_second_with_reference": one(per_cpu_second / slower), "memory": {"resident_gib": gib}, **fields,
    }  # fmt: skip


def test_each_measure_is_compared_with_the_path_that_is_best_in_it():
    rows = [measured("komainu", 300, 200, 1.0), measured("a", 150, 80, 2.0), measured("b", 120, 100, 3.0), {"missing": "c"}]
    row = comparison("sft", rows)
    assert row["ratio"] == {"tokens_per_second": 2.0, "tokens_per_cpu_second": 2.0}
    assert row["against"] == {"tokens_per_second": "a", "tokens_per_cpu_second": "b", "memory": "a"}
    assert row["memory_ratio"] == 0.5
    assert row["met"]


@pytest.mark.parametrize(
    ("stage", "theirs", "met"),
    [
        ("sft", measured("a", 200, 100, 2.0), True),
        ("sft", measured("a", 201, 100, 2.0), False),
        ("sft", measured("a", 100, 150, 2.0), False),
        ("sft", measured("a", 100, 100, 0.9), False),
        ("dpo", measured("a", 150, 80, 2.0), True),
        ("dpo", measured("a", 180, 80, 2.0), False),
        # Ours pays for its reference beforehand, a path that does not must not be beaten without it alone.
        ("dpo", measured("a", 150, 80, 2.0, slower=0.5), False),
    ],
)
def test_a_target_is_met_in_time_processor_time_and_memory_or_not(stage, theirs, met):
    assert comparison(stage, [measured("komainu", 300, 200, 1.0), theirs])["met"] is met


def test_nothing_is_compared_with_nothing():
    assert comparison("sft", [measured("komainu", 1, 1, 1.0), {"missing": "not installed"}])["missing"]
    assert comparison("sft", [{"missing": "out of memory"}, measured("a", 1, 1, 1.0)])["missing"] == "out of memory"


def test_a_reference_that_is_computed_beforehand_is_charged_to_every_token():
    settings = FinetuneBenchSettings(rounds=2, steps=1)
    works = [Work(places=98, documents=2, trained=50, flops=1, again=0)] * settings.needed_steps
    answer = {"seconds": [2.0], "cpu_seconds": 4.0, "counts": [{}], "loss": [0.7], "memory": {"resident_gib": 1.0}}
    outcome = Outcome(facts={"reference": {"seconds": 5.0, "cpu_seconds": 10.0}}, warmup=answer, rounds=[answer, answer])
    row = row_of(outcome, settings, works, outcome)
    assert row["tokens"] == 100
    assert row["tokens_per_second"]["median"] == 50
    # 5 steps of 100 tokens cost 5 s beforehand: 0.01 s a token, beside 0.02 s.
    assert row["tokens_per_second_with_reference"]["median"] == pytest.approx(1 / 0.03)
    assert row["tokens_per_cpu_second_with_reference"]["median"] == pytest.approx(1 / 0.06)
    assert row["tokens_per_second_with_reference"]["samples"] == 2
    assert row["reference"]["tokens"] == 500
    assert row["loss_largest_difference"] == 0


def test_losses_are_compared_only_where_the_steps_hold_the_same_tokens():
    settings = FinetuneBenchSettings(rounds=1, steps=1)
    works = [Work(places=98, documents=2, trained=50, flops=1, again=0)] * settings.needed_steps

    def outcome(loss, tokens):
        answer = {"seconds": [2.0], "cpu_seconds": 4.0, "loss": [loss], "memory": {"resident_gib": 1.0}}
        answer["counts"] = [{"tokens": tokens, "documents": 2}] if tokens else [{}]
        return Outcome(warmup=answer, rounds=[answer])

    ours = outcome(0.5, None)
    assert row_of(outcome(0.75, 100), settings, works, ours)["loss_largest_difference"] == 0.25
    assert row_of(outcome(0.75, 99), settings, works, ours)["loss_largest_difference"] is None


def test_pairs_are_real_where_there_are_any_each_once_and_short_enough(shared_data, tmp_path):
    settings = FinetuneBenchSettings(step_pairs=3, rounds=2, pair_length=200, data=str(shared_data))
    assert write_data(settings, "dpo", tmp_path / "data") == "ja_pairs.jsonl.gz"
    data = TokenDataset.open(tmp_path / "data")
    every = TokenDataset.open(tmp_path / "all-ja_pairs.jsonl.gz")
    assert len(data) == 2 * 3 * settings.needed_steps
    assert data.lengths.max() <= 200
    known = {(tuple(every.tokens(i).tolist()), int(every.prompt_lengths[i])): every.trained(i) for i in range(len(every))}
    chosen = [(tuple(data.tokens(i).tolist()), int(data.prompt_lengths[i])) for i in range(len(data))]
    assert all(np.array_equal(data.trained(i), known[document]) for i, document in enumerate(chosen))
    assert len(set(zip(chosen[0::2], chosen[1::2], strict=True))) == len(chosen) // 2


def test_a_run_without_the_data_or_the_peers_says_so(tmp_path, monkeypatch):
    """On random tokens, with one of TRL's paths: the same losses where TRL is installed, its absence where it is not."""
    monkeypatch.setitem(finetune.PEERS, "sft", ("TRL SFT padding-free",))
    out = tmp_path / "finetune.json"
    settings = FinetuneBenchSettings(
        stages=("sft",), preset="tiny", data=str(tmp_path / "nowhere"), step_tokens=150, conversation_length=64, rounds=1,
        threads=1, device="cpu", breakdown=False, out=str(out),
    )  # fmt: skip
    result = finetune.run(settings)
    assert json.loads(out.read_text()) == result
    ours, theirs, compared = result["rows"]
    assert ours["data"] == "random tokens"
    assert ours["tokens_per_second"]["samples"] == 1
    if importlib.util.find_spec("trl"):
        assert theirs["loss_largest_difference"] < 1e-4
        assert compared["target"] == 1.5
    else:
        assert theirs["missing"] == "trl is not installed"
        assert compared["missing"] == "no path of TRL was measured"
    assert "TRL SFT padding-free" in finetune.show(result)


@pytest.mark.parametrize(
    ("settings", "says"),
    [({"step_pairs": 0}, "step_pairs = 0: must be at least 1"), ({"stages": ()}, "stages: name sft, dpo or both")],
)
def test_wrong_settings_are_named(settings, says):
    with pytest.raises(ValueError, match=says):
        FinetuneBenchSettings(**settings)
