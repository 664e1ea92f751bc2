"""Runs on two ranks whose second rank is killed, hangs, lags, computes NaN or has other settings."""

import json
import re
import signal
from typing import NamedTuple

import pytest

from engine.checkpoint.state import checkpoints
from engine.distributed.stragglers import slowest
from tests.engine.distributed.rank_runs import FAULTS

LOST = r"ConnectionError: rank 0: another rank stopped or did not answer within parallel.timeout"


class Fault(NamedTuple):
    codes: list[int]
    said: str
    lines: dict[str, list[dict]]  # by file of the run folder
    out: object


@pytest.fixture(scope="module")
def faults(tiny_model, tiny_data, tmp_path_factory, run_ranks):
    """{fault: Fault}. The lagging run is then replayed, and one of its steps is profiled."""
    folder = tmp_path_factory.mktemp("faults")

    def job(fault: str, timeout: float = 60.0, **more) -> dict:
        settings = {
            "model": str(tiny_model),
            "out": str(folder / fault),
            "sources": [{"path": str(tiny_data.text)}],
            "context_length": 32,
            "step_size": 256,
            "pack_tokens": 64,
            "steps": 4,
            "device": "cpu",
            "log": {"every": 1, "tensorboard": False},
            "parallel": {"timeout": timeout},
            "checkpoint_every": 3,
            **more,
        }
        runs = [["pretrain", settings]]
        if fault == "lags":
            runs.append(["pretrain", {**settings, "replay": 4}])
        return {"ranks": 2, "fault": fault if fault in FAULTS else None, "runs": runs}

    jobs = {
        "killed": job("killed"),
        "hangs": job("hangs", timeout=6.0),
        "lags": job("lags", profile={"steps": [2]}),
        "poisoned": job("poisoned"),
        # The second rank would make other groups of processes than the first, and each would wait for the other.
        "replicas": {**job("replicas", timeout=20.0), "differs": {"parallel": {"replicas": 2, "timeout": 20.0}}},
        "seed": {**job("seed"), "differs": {"seed": 1}},
    }
    ended = run_ranks(jobs)

    def lines_of(file):
        return [json.loads(line) for line in file.read_text().splitlines()]

    return {
        fault: Fault(codes, said, {file.name: lines_of(file) for file in (folder / fault).glob("*.jsonl")}, folder / fault)
        for fault, (codes, said) in ended.items()
    }


def test_the_other_rank_ends_when_one_is_killed_in_a_step(faults):
    assert faults["killed"].codes == [1, -signal.SIGKILL]
    assert re.search(LOST, faults["killed"].said)


def test_both_ranks_stop_when_one_computes_nan(faults):
    poisoned = faults["poisoned"]
    assert poisoned.codes == [1, 1]
    assert poisoned.said.count("FloatingPointError: step 3: loss nan") == 2
    assert [note["step"] for note in poisoned.lines["spikes.jsonl"]] == [3]
    assert checkpoints(poisoned.out) == []


def test_a_rank_that_hangs_prints_where_and_ends(faults):
    hangs = faults["hangs"]
    assert hangs.codes == [1, -signal.SIGALRM]
    assert re.search(LOST, hangs.said)
    assert "Timeout (0:00:06)!" in hangs.said
    assert re.search(r'File ".*rank_runs.py", line \d+ in hang_here', hangs.said)


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ("replicas", "parallel.replicas: rank 1 has 2, rank 0 has 1; start every rank with the same settings"),
        ("seed", "seed: rank 1 has 1, rank 0 has 0; start every rank with the same settings"),
    ],
)
def test_a_rank_with_another_setting_is_named_by_all_ranks_before_they_make_groups(faults, setting, said):
    assert faults[setting].codes == [1, 1]
    assert faults[setting].said.count(f"ValueError: {said}\n") == 2
    assert not faults[setting].out.exists()


def test_the_slowest_rank_is_named(faults):
    lags = faults["lags"]
    assert lags.codes == [0, 0]
    named = re.findall(r"rank (\d) is the slowest: the others wait \d+\.\d\d s for it in a step of \d+\.\d\d s", lags.said)
    # A busy machine may hold the other rank up once.
    assert named.count("1") > len(named) / 2
    assert all(line["rank_wait_seconds"] > 0 for line in lags.lines["metrics.jsonl"])


def test_a_step_of_several_ranks_is_replayed_to_the_bit(faults):
    said = faults["lags"].said
    assert re.search(r"replay     step 4 with the weights of .*/step-00000003\n", said)
    assert re.search(r"\nloss +\S+ \(logged \S+, the same\)\ngradient_norm \S+ \(logged \S+, the same\)\n", said)
    assert {"0", "1"} == set(re.findall(r"micro-batch rank (\d), ", said))


def test_a_profile_of_several_ranks_shows_their_communication(faults):
    lags = faults["lags"]
    for rank in (0, 1):
        profile = json.loads((lags.out / "profile" / "step-00000002" / f"rank-{rank}" / "time.json").read_text())
        assert profile["shares"]["communication"] > 0
    assert re.search(r"step 2: products \S+%, .*, communication \S+%, .*waiting \S+%; see", lags.said)


@pytest.mark.parametrize(
    ("waits", "expected"), [([0.5, 0.1, 0.6, 0.4], (1, 0.4)), ([0.0, 0.3], (0, 0.3)), ([0.2, 0.2], (0, 0.0))]
)
def test_the_slowest_rank_waits_least(waits, expected):
    assert slowest(waits) == pytest.approx(expected)
