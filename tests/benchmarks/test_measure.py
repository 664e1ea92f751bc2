"""The instrument itself: order statistics, order of calls, memory, result files."""

import json
import subprocess

import pytest
import torch

from benchmarks import measure

CPU = torch.device("cpu")


def test_spread_is_median_and_nearest_rank_percentiles():
    assert measure.spread([5.0, 1.0, 4.0, 2.0, 3.0, 6.0]) == {"median": 3.5, "low": 2.0, "high": 5.0, "samples": 6}
    assert measure.spread([7.0]) == {"median": 7.0, "low": 7.0, "high": 7.0, "samples": 1}
    # Of 11 values the 20th percentile is the third and the 80th the ninth.
    assert measure.spread(range(11)) == {"median": 5, "low": 2, "high": 8, "samples": 11}


def test_candidates_take_turns_and_another_begins_each_round():
    calls = []

    def candidate(name):
        def work():
            calls.append(name)
            return float(len(calls))

        return work

    samples = measure.alternate({name: candidate(name) for name in "abc"}, 4)
    assert "".join(calls) == "abcbcacababc"
    assert samples == {"a": [1.0, 6.0, 8.0, 10.0], "b": [2.0, 4.0, 9.0, 11.0], "c": [3.0, 5.0, 7.0, 12.0]}


def test_kernel_seconds_counts_every_call_and_prepares_each_one_anew():
    prepared, given = [], []

    def prepare():
        prepared.append(object())
        return prepared[-1]

    seconds = measure.kernel_seconds(given.append, CPU, repeats=4, warmup=2, prepare=prepare)
    assert len(seconds) == 4
    assert min(seconds) > 0
    assert given == prepared
    assert len(given) == 6

    calls = []
    assert len(measure.kernel_seconds(lambda: calls.append(1), CPU, repeats=3, warmup=0)) == 3
    assert len(calls) == 3


def test_preparation_is_outside_the_time_taken(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(measure.time, "perf_counter", lambda: now[0])

    def prepare():
        now[0] += 100.0
        return 3.0

    def work(seconds):
        now[0] += seconds

    assert measure.kernel_seconds(work, CPU, repeats=2, prepare=prepare) == [3.0, 3.0]


def test_ceilings_are_positive():
    reached = measure.ceilings(CPU, torch.float32, repeats=1)
    assert set(reached) == {"product_flops", "copy_bytes"}
    assert all(value > 0 for value in reached.values())


def test_allocated_peak_counts_what_was_alive_together():
    million = torch.ones(250_000)

    def two_at_once():
        first = million + 1
        second = first + 1
        del first
        # In the place of the first: never three at once.
        return second * 2

    assert 2 * 10**6 <= measure.allocated_peak(two_at_once, CPU) < 2.1 * 10**6
    assert measure.allocated_peak(lambda: million.mul_(1), CPU) < 10**5


def test_the_peak_of_the_resident_set_can_be_forgotten():
    torch.ones(2**25)
    before = measure.peak_memory(CPU)["resident_gib"]
    measure.reset_peak_resident()
    low = measure.peak_memory(CPU)["resident_gib"]
    if low == before:
        pytest.skip("this system does not let a process reset its peak")
    assert low < before - 0.1
    torch.ones(2**25)
    assert measure.peak_memory(CPU)["resident_gib"] > low + 0.1


def test_a_part_says_how_it_ended():
    status, output = measure.run_part(["-c", "print('a word')"], limit=60)
    assert (status, output) == ("done", "a word\n")
    assert measure.run_part(["-c", "raise SystemExit(3)"], limit=60)[0] == "failed (exit 3)"
    assert measure.run_part(["-c", "import time; time.sleep(60)"], limit=1)[0] == "cut off after 1 s"
    status, output = measure.run_part(
        ["-c", "import os; print(os.environ['KOMAINU_WORD'])"], limit=60, environment={"KOMAINU_WORD": "given"}
    )
    assert (status, output) == ("done", "given\n")


def test_a_table_has_a_line_for_each_row_and_a_dash_for_what_is_not_there():
    rows = [
        {"name": "a", "seconds": {"median": 0.5, "low": 0.25, "high": 1.0, "samples": 3}, "count": 12},
        {"name": "longer", "missing": "not installed"},
    ]
    assert measure.table(rows, ["name", "count", "seconds", "missing"]).split("\n") == [
        "name    count  seconds          missing",
        "a       12     0.5 (0.25 to 1)  -",
        "longer  -      -                not installed",
    ]


def test_a_result_says_where_and_with_what(tmp_path):
    content = measure.result("kernels", "the command", CPU, {"a": 1}, [{"b": 2}], complete=False)
    path = tmp_path / "new" / "file.json"
    measure.write_result(path, content)
    read = json.loads(path.read_text())
    assert read == content
    assert read["machine"]["torch"] == torch.__version__
    assert read["machine"]["kind"] == "cpu"
    assert not read["complete"]


def test_commit_is_the_checkouts_with_a_plus_where_files_differ(tmp_path, monkeypatch):
    def git(*arguments):
        identity = ["-c", "user.name=n", "-c", "user.email=e@example.com"]
        command = ["git", *identity, *arguments]
        return subprocess.run(command, cwd=tmp_path, check=True, capture_output=True, text=True).stdout.strip()

    monkeypatch.setattr(measure, "ROOT", tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    monkeypatch.delenv("KOMAINU_COMMIT", raising=False)
    assert measure.commit() == "unknown"
    monkeypatch.setenv("KOMAINU_COMMIT", "abc")
    assert measure.commit() == "abc"
    monkeypatch.delenv("KOMAINU_COMMIT")
    git("init", "-q")
    result = tmp_path / "benchmarks" / "results" / "train.json"
    result.parent.mkdir(parents=True)
    for path in (tmp_path / "file", result):
        path.write_text("1")
    git("add", ".")
    git("commit", "-q", "-m", "first")
    assert measure.commit() == git("rev-parse", "HEAD")
    # What is measured with is the same while its result is written.
    result.write_text("2")
    assert measure.commit() == git("rev-parse", "HEAD")
    (tmp_path / "file").write_text("2")
    assert measure.commit() == git("rev-parse", "HEAD") + "+"


@pytest.mark.gpu
def test_on_a_gpu_calls_are_queued_and_memory_is_the_allocators():
    device = torch.device("cuda")
    calls = []

    def work(tensor):
        calls.append(tensor)
        tensor.add_(1)

    seconds = measure.kernel_seconds(work, device, repeats=4, warmup=1, prepare=lambda: torch.zeros(2**20, device=device))
    assert len(seconds) == 4
    assert min(seconds) > 0
    assert [float(tensor.sum()) for tensor in calls] == [2.0**20] * 5

    held = torch.ones(2**20, device=device)
    # Two results of 4 MiB are alive together.
    assert measure.allocated_peak(lambda: (held + 1) * 2, device) == 2 * held.nbytes
    assert all(value > 0 for value in measure.ceilings(device).values())
