"""The instruments: order statistics, order of calls, memory, result files, processes."""

import json
import subprocess
import sys
import time

import pytest
import torch

from benchmarks import measure, processes, results
from benchmarks.checkpoint import CheckpointSettings

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


def test_each_call_gets_a_fresh_argument_whose_making_is_not_timed(monkeypatch):
    now, prepared, given = [0.0], [], []
    monkeypatch.setattr(measure.time, "perf_counter", lambda: now[0])

    def prepare():
        now[0] += 100.0
        prepared.append(object())
        return prepared[-1]

    def work(argument):
        now[0] += 3.0
        given.append(argument)

    assert measure.kernel_seconds(work, CPU, repeats=4, warmup=2, prepare=prepare) == [3.0] * 4
    assert given == prepared
    assert len(set(given)) == 6


def test_a_process_says_how_it_ended(tmp_path):
    with (tmp_path / "output").open("w+") as output:
        assert processes.run_apart(["-c", "print('a word')"], limit=60, output=output) == "done"
        assert processes.run_apart(["-c", "raise SystemExit(3)"], limit=60, output=output) == "failed (exit 3)"
        assert processes.run_apart(["-c", "import time; time.sleep(60)"], limit=1, output=output) == "cut off after 1 s"
        output.seek(0)
        assert output.read() == "a word\n"


def test_the_end_of_a_process_ends_everything_that_it_started(tmp_path):
    """A child with a session of its own ends too; torchrun starts such children."""
    psutil = pytest.importorskip("psutil")
    mark = tmp_path / "pid"
    child = f"import os, pathlib, time; pathlib.Path({str(mark)!r}).write_text(str(os.getpid())); time.sleep(60)"
    parent = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}], start_new_session=True)"
    process = subprocess.Popen([sys.executable, "-c", parent], start_new_session=True)

    def wait_for(happens):
        deadline = time.monotonic() + 60
        while not happens():
            assert time.monotonic() < deadline
            time.sleep(0.05)

    def gone():
        # Nobody waited for it: a process that has ended may still be listed.
        number = int(mark.read_text())
        return not psutil.pid_exists(number) or psutil.Process(number).status() == psutil.STATUS_ZOMBIE

    wait_for(lambda: mark.exists() and mark.read_text())
    processes.end(process)
    wait_for(gone)


def test_a_function_runs_in_its_own_process_and_its_failure_is_reported():
    assert processes.call_apart("json", "dumps", {"obj": [1]}, limit=60) == "[1]"
    with pytest.raises(processes.ApartError, match=r"failed \(exit 1\): TypeError"):
        processes.call_apart("json", "dumps", {}, limit=60)


def test_a_table_has_a_line_for_each_row_and_a_dash_for_an_absent_value():
    rows = [
        {"name": "a", "seconds": {"median": 0.5, "low": 0.25, "high": 1.0, "samples": 3}, "count": 12, "of": 12345},
        {"name": "longer", "missing": "not installed", "of": True},
    ]
    assert results.table(rows, ["name", "count", "seconds", "missing", "of", "nowhere"]).split("\n") == [
        "name    count  seconds          missing        of",
        "a       12     0.5 (0.25 to 1)  -              12,345",
        "longer  -      -                not installed  yes",
    ]


def test_a_result_is_written_after_each_row_and_keeps_no_folders_of_the_machine(tmp_path):
    path = tmp_path / "new" / "file.json"
    settings = CheckpointSettings(out=str(path), rounds=1)
    result = results.Result("checkpoint", "command --folder /home/me/disk", CPU, settings, {"preset": "small"}, extra=1.5)
    result.add({"provider": "a", "missing": "no /home/me/file"})
    assert not json.loads(path.read_text())["complete"]
    content = result.finish()
    assert json.loads(path.read_text()) == content == results.read_result(path)
    assert content["complete"]
    assert content["machine"]["torch"] == torch.__version__
    assert (content["settings"]["preset"], content["settings"]["out"], content["extra"]) == ("small", "file.json", 1.5)
    assert (content["command"], content["rows"][0]["missing"]) == ("command --folder disk", "no file")


@pytest.mark.gpu
def test_on_a_gpu_calls_are_queued_and_memory_is_the_allocators():
    device, calls = torch.device("cuda"), []

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
