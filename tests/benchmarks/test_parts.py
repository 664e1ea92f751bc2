"""Parts of a benchmark that run as processes of their own, and what of a machine their results tell."""

import os
import subprocess
import time

import torch

from benchmarks import measure
from benchmarks.measure import result, run_part

# Writes the id of a process that it starts in a session of its own, then waits for longer than any test.
_HANGING = """
import pathlib, subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=True)
pathlib.Path(sys.argv[1]).write_text(str(child.pid))
print("still here", flush=True)
time.sleep(600)
"""


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    state = subprocess.run(["ps", "-o", "stat=", "-p", str(pid)], capture_output=True, text=True, check=False).stdout
    return bool(state.strip()) and not state.startswith("Z")


def test_a_part_that_hangs_is_cut_off_with_everything_it_started(tmp_path):
    started = tmp_path / "pid"
    status, output = run_part(["-c", _HANGING, str(started)], limit=2)
    assert status == "cut off after 2 s"
    assert output == "still here\n"
    deadline = time.monotonic() + 10
    while _alive(int(started.read_text())) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not _alive(int(started.read_text()))


def test_a_part_says_how_it_ended_and_what_it_printed(tmp_path):
    log = tmp_path / "log"
    log.write_text("before\n")
    assert run_part(["-c", "print('fine')"], limit=60, log=log) == ("done", "fine\n")
    status, output = run_part(["-c", "import sys; print('x' * 9000); sys.exit(3)"], limit=60, log=log)
    assert status == "failed (exit 3)"
    assert output == "x" * 3999 + "\n"
    assert log.read_text() == "before\nfine\n" + "x" * 9000 + "\n"


def test_a_part_does_not_wait_for_input():
    assert run_part(["-c", "import sys; print(repr(sys.stdin.read()))"], limit=60) == ("done", "''\n")


def test_a_part_gets_its_environment():
    arguments = ["-c", "import os; print(os.environ['KOMAINU_COMMIT'], 'PATH' in os.environ)"]
    assert run_part(arguments, limit=60, environment={"KOMAINU_COMMIT": "abc"}) == ("done", "abc True\n")


def test_files_without_their_repository_may_be_told_their_commit(tmp_path, monkeypatch):
    monkeypatch.setattr(measure, "ROOT", tmp_path)
    monkeypatch.delenv("KOMAINU_COMMIT", raising=False)
    assert measure.commit() == "unknown"
    monkeypatch.setenv("KOMAINU_COMMIT", "abc")
    assert measure.commit() == "abc"


def test_a_result_holds_no_folders_of_the_machine():
    content = result(
        "train", "python -m benchmarks.train a/b.toml --out=/home/me/x/out.json --peers-python '/opt/my/bin/python'",
        torch.device("cpu"), {"data": "/home/me/data/text", "nested": {"peers": ("runs/a", "/x/y")}, "limit": 3.0},
        [{"shape": "64 x 8 / 2 heads", "unit": "tokens/s", "missing": "/usr/lib/python3/a.py:3: no such file", "n": 1}],
    )  # fmt: skip
    assert content["command"] == "python -m benchmarks.train a/b.toml --out=out.json --peers-python 'python'"
    assert content["settings"] == {"data": "text", "nested": {"peers": ["runs/a", "y"]}, "limit": 3.0}
    assert content["rows"] == [{"shape": "64 x 8 / 2 heads", "unit": "tokens/s", "missing": "a.py:3: no such file", "n": 1}]
