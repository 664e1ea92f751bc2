"""The unattended run: its clock, what it keeps, what it resumes, what it exits with. Its parts are processes throughout."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks import gpu, gpu_parts
from benchmarks.gpu import Run, Task, limit_of
from benchmarks.measure import ROOT, run_part

# Stands for a part: writes the first rows, then the rest, or does what its name says in between. Needs no torch, to be quick.
_PART = """
import json, sys, time
part, task, out = sys.argv[1:4]
name = task or part
def write(rows, complete):
    outcome = "failed" if name == "untrue" else "passed"
    content = {"benchmark": name, "command": "passing", "when": "2026-01-01T00:00:00+00:00", "commit": "abc", "machine": {},
               "settings": {"of": name}, "complete": complete, "rows": [{"row": i, "outcome": outcome} for i in range(rows)]}
    open(out, "w").write(json.dumps(content))
print(name, "begins", flush=True)
if name == "silent":
    sys.exit(0)
write(1, False)
if name == "hanging":
    import tempfile
    print("left", tempfile.mkdtemp(), flush=True)
    print("waits", flush=True)
    time.sleep(600)
if name == "broken":
    raise ValueError("this is what went wrong")
write(2, True)
"""


def _task(part: str, seconds: float = 10, name: str = "") -> Task:
    return Task(part, seconds, name, module=("-c", _PART))


def _run(out: Path, *tasks: Task, seconds: float = 60, **options) -> tuple[bool, dict, Run]:
    run = Run(out, tasks, seconds=seconds, **options)
    done = run.run()
    return done, json.loads((out / "gpu-summary.json").read_text()), run


@given(
    st.floats(-10, 1000),
    st.lists(st.floats(1, 500), min_size=1, max_size=8),
    st.lists(st.floats(0, 1), min_size=8, max_size=8),
)
def test_tasks_together_never_get_more_than_there_is(total, lengths, used):
    tasks = [Task(str(i), seconds) for i, seconds in enumerate(lengths)]
    remaining = total
    for i, task in enumerate(tasks):
        limit = limit_of(remaining, tasks[i:])
        assert 0 <= limit <= max(0, remaining)
        # Nobody is cut off in its usual length while there is time, nor where time is plenty below its share.
        assert limit >= min(max(0, remaining), 1.5 * task.seconds)
        assert limit >= max(0, remaining) * task.seconds / sum(lengths[i:]) - 1e-6
        remaining -= limit * used[i]
    assert limit_of(remaining, tasks[-1:]) == pytest.approx(max(0, remaining))


def test_one_part_that_fails_takes_no_other_with_it(tmp_path, capsys):
    tasks = [_task("first"), _task("broken"), _task("silent"), _task("last")]
    done, summary, run = _run(tmp_path, *tasks)
    assert not done
    assert {name: entry["status"] for name, entry in summary["tasks"].items()} == {
        "first": "done", "broken": "failed (exit 1)", "silent": "failed (left no whole result)", "last": "done",
    }  # fmt: skip
    assert summary["tasks"]["broken"]["rows"] == 1
    assert summary["tasks"]["broken"]["output"][-1] == "ValueError: this is what went wrong"
    assert json.loads((tmp_path / "gpu-last.json").read_text())["command"] == "python -m benchmarks.gpu --parts last"
    log = (tmp_path / "gpu-log.txt").read_text()
    assert [line for line in log.splitlines() if line.endswith("begins")] == [f"{task.part} begins" for task in tasks]
    assert "broken (not whole)" in run.tables()
    assert "ValueError: this is what went wrong" in run.tables().splitlines()[-3]
    assert "last: done" in capsys.readouterr().out


def test_a_part_is_cut_off_at_its_limit_and_keeps_its_rows(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "_LEAST_SECONDS", 0.5)
    start = time.monotonic()
    done, summary, _ = _run(tmp_path, _task("hanging", 2), _task("after", 4), seconds=6)
    assert time.monotonic() - start < 6
    assert not done
    assert summary["tasks"]["hanging"]["status"] == "cut off after 3 s"
    assert summary["tasks"]["after"]["status"] == "done"
    assert 2 < summary["tasks"]["after"]["limit"] <= 3
    content = json.loads((tmp_path / "gpu-hanging.json").read_text())
    assert content["rows"] == [{"row": 0, "outcome": "passed"}]
    assert content["complete"] is False
    (left,) = [line.split()[1] for line in (tmp_path / "gpu-log.txt").read_text().splitlines() if line.startswith("left")]
    assert not Path(left).exists()


def test_the_tasks_of_a_part_share_its_file(tmp_path):
    done, _, _ = _run(tmp_path, _task("part", name="one"), _task("other"), _task("part", name="two"))
    assert done
    content = json.loads((tmp_path / "gpu-part.json").read_text())
    assert [(row["task"], row["row"]) for row in content["rows"]] == [("one", 0), ("one", 1), ("two", 0), ("two", 1)]
    assert content["settings"] == {"one": {"of": "one"}, "two": {"of": "two"}}
    assert content["complete"] is True
    # One of them that fails leaves the part to be resumed, and the other's rows.
    done, _, _ = _run(tmp_path, _task("part", name="broken"), _task("part", name="two"))
    assert not done
    content = json.loads((tmp_path / "gpu-part.json").read_text())
    assert [row["task"] for row in content["rows"]] == ["broken", "two", "two"]
    assert content["complete"] is False
    done, summary, _ = _run(tmp_path, _task("part", name="one"), _task("part", name="two"), resume=True)
    assert done
    statuses = {label: entry["status"] for label, entry in summary["tasks"].items() if label != "other"}
    assert statuses == {"part one": "done", "part two": "done before"}
    content = json.loads((tmp_path / "gpu-part.json").read_text())
    assert sorted((row["task"], row["row"]) for row in content["rows"]) == [("one", 0), ("one", 1), ("two", 0), ("two", 1)]
    assert content["settings"] == {"one": {"of": "one"}, "two": {"of": "two"}}
    assert content["complete"] is True


def test_no_time_left_starts_nothing(tmp_path):
    done, summary, _ = _run(tmp_path, _task("first"), seconds=3)
    assert not done
    assert summary["tasks"] == {"first": {"status": "not started: no time left"}}


def test_resume_runs_only_what_is_not_whole(tmp_path):
    _run(tmp_path, _task("first"), _task("broken"), _task("tests"))
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "gpu-broken.json", "gpu-first.json", "gpu-log.txt", "gpu-summary.json",
    ]  # fmt: skip
    (tmp_path / "gpu-torn.json").write_text('{"rows": [')
    tasks = [_task("first"), _task("broken"), _task("tests"), _task("torn"), _task("never")]
    _, summary, _ = _run(tmp_path, *tasks, resume=True)
    assert {name: entry["status"] for name, entry in summary["tasks"].items()} == {
        "first": "done before", "tests": "done before", "broken": "failed (exit 1)", "torn": "done", "never": "done",
    }  # fmt: skip
    assert summary["results"]["tests"]["rows"] == [{"row": 0, "outcome": "passed"}, {"row": 1, "outcome": "passed"}]
    # Without --resume all of them run anew.
    _, summary, _ = _run(tmp_path, _task("first"))
    assert summary["tasks"]["first"]["status"] == "done"
    assert "tests" in summary["results"]
    # What a rehearsal leaves is not what a GPU was to measure.
    assert not Run(tmp_path, [], seconds=1, rehearsal="cpu").kept
    assert Run(tmp_path, [_task("first")], seconds=1, rehearsal="cpu").result("first") is None


def test_all_done_is_told_from_failed_tests(tmp_path):
    assert _run(tmp_path, _task("first"))[0]
    done, summary, _ = _run(tmp_path, _task("untrue"))
    assert not done
    assert summary["tasks"]["untrue"]["status"] == "done, but 2 of 2 tests failed"
    done, summary, _ = _run(tmp_path, _task("untrue"), resume=True)
    assert not done
    assert summary["tasks"]["untrue"]["status"] == "done before, but 2 of 2 tests failed"


def test_the_folder_stays_small(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "_MOST_LOG_BYTES", 100)
    (tmp_path / "gpu-log.txt").write_text("x" * 1000)
    _run(tmp_path, _task("first"))
    assert (tmp_path / "gpu-log.txt").stat().st_size < 300
    # Besides the parts that have a file of their own: the summary and the log.
    assert len({task.part for task in gpu.TASKS} - gpu.IN_SUMMARY) + 2 <= 8


def test_a_run_that_is_stopped_ends_its_part_and_leaves_its_summary(tmp_path):
    script, marker = tmp_path / "script.py", f"# {tmp_path}"
    script.write_text(
        "import pathlib, sys\nfrom benchmarks import gpu\n"
        f"gpu.TASKS = [gpu.Task('hanging', 10, module=('-c', {_PART + marker!r}))]\n"
        "gpu.main(['--rehearse', '--out', sys.argv[1]])\n"
    )
    out = tmp_path / "out"
    process = subprocess.Popen(
        [sys.executable, str(script), str(out)], cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, stdout=subprocess.PIPE,
        text=True,
    )  # fmt: skip
    deadline = time.monotonic() + 60
    log = out / "rehearsal-log.txt"
    while not (log.exists() and "waits" in log.read_text()) and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 130
    summary = json.loads((out / "rehearsal-summary.json").read_text())
    assert summary["tasks"]["hanging"]["status"] == "interrupted"
    assert summary["tasks"]["hanging"]["rows"] == 1
    assert "interrupted" in output.splitlines()[-1]
    assert json.loads((out / "rehearsal-hanging.json").read_text())["complete"] is False
    assert not _running(marker)


def _running(argument: str) -> bool:
    lines = [path.read_bytes() for path in Path("/proc").glob("[0-9]*/cmdline") if path.exists()]
    return any(argument.encode() in line for line in lines)


def test_tests_leave_each_outcome(tmp_path):
    folder = tmp_path / "tests"
    folder.mkdir()
    (folder / "conftest.py").write_text("def pytest_configure(config):\n    config.addinivalue_line('markers', 'gpu: x')\n")
    # Not written out, as this file would then seem to hold such tests itself.
    mark = "pytest.mark." + "gpu"
    (folder / "test_some.py").write_text(
        "import pytest\n"
        "def test_unmarked():\n    assert False\n"
        f"@{mark}\ndef test_good():\n    pass\n"
        f"@{mark}\ndef test_bad():\n    assert 1 == 2, 'one is not two'\n"
        f"@{mark}\ndef test_skipped():\n    pytest.skip('no reason')\n"
        f"@{mark}\ndef test_unset(nothing):\n    pass\n"
    )
    (folder / "test_unread.py").write_text(f"import there_is_no_such_module\n# {mark}\n")
    (folder / "benchmarks").mkdir()
    (folder / "benchmarks" / "test_late.py").write_text(f"import pytest\n@{mark}\ndef test_last():\n    pass\n")
    (folder / "test_other.py").write_text("import there_is_no_such_module\n")
    out = tmp_path / "out.json"
    code = f"import pathlib\nfrom benchmarks.gpu_parts import gpu_tests\ngpu_tests(*map(pathlib.Path, [{str(out)!r}]), 'cpu', "
    status, output = run_part(["-c", f"{code}pathlib.Path({str(folder)!r}), processes=1)"], limit=60)
    assert status == "done", output
    content = json.loads(out.read_text())
    assert content["complete"]
    outcomes = {row["test"].rpartition("::")[2].rpartition("/")[2]: row["outcome"] for row in content["rows"]}
    assert outcomes == {
        "test_unread.py": "failed", "test_good": "passed", "test_bad": "failed", "test_skipped": "skipped",
        "test_unset": "failed", "test_last": "passed",
    }  # fmt: skip
    assert content["rows"][-1]["test"].endswith("test_last")
    assert any("one is not two" in line for row in content["rows"] for line in row.get("why", []))


def test_the_command_line_runs_the_chosen_parts(tmp_path):
    arguments = ["-m", "benchmarks.gpu", "--rehearse", "--parts", "environment", "--out", str(tmp_path)]
    status, output = run_part(arguments, limit=120)
    assert status == "done", output
    content = json.loads((tmp_path / "rehearsal-environment.json").read_text())
    assert content["complete"]
    assert all(row["reached"] > 0 for row in content["rows"])
    assert content["command"] == "python -m benchmarks.gpu --parts environment --rehearse cpu"
    assert "matrix product, bfloat16" in output


@pytest.mark.parametrize("rehearsal", ["", "cpu", "cuda"])
@pytest.mark.parametrize("task", [task for task in gpu.TASKS if task.part not in gpu_parts.CHECKS], ids=lambda task: task.label)
def test_each_task_has_settings_that_its_benchmark_takes(task, rehearsal):
    settings, run = gpu_parts.benchmark(task.part, task.name, "file", rehearsal=rehearsal)
    assert settings.device == (rehearsal or "cuda")
    assert settings.out == "file"
    assert callable(run)


def test_no_package_is_needed_that_a_machine_with_torch_may_lack():
    code = (
        "import sys\n"
        "sys.modules |= dict.fromkeys(['tyro', 'mistral_common', 'datasets', 'trl', 'liger_kernel'])\n"
        "from benchmarks import gpu, gpu_parts\n"
        "for task in gpu.TASKS:\n"
        "    if task.part not in gpu_parts.CHECKS:\n"
        "        print(task.label, gpu_parts.benchmark(task.part, task.name, 'file', rehearsal='')[0].out)\n"
    )
    status, output = run_part(["-c", code], limit=60)
    assert status == "done", output
    assert output.count("file") == len([task for task in gpu.TASKS if task.part not in gpu_parts.CHECKS])


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--parts", "kernel"], "unknown part 'kernel'"),
        (["--minutes", "0"], "must be above 0"),
        (["--minutes", "nan"], "above 0"),
    ],
)
def test_wrong_arguments_are_refused(arguments, says, capsys):
    with pytest.raises(SystemExit, match="2"):
        gpu.main(arguments)
    assert says in capsys.readouterr().err
