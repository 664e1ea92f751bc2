"""Tests that need a process of their own: the operators' in Triton's interpreter, with their mutants, and offline compilation.

The interpreter is chosen when Triton is imported, and offline compilation needs a Triton without it. The processes start when
the tests are collected and run beside the others, so that no core idles; `test_processes.py` waits for them.
"""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterable, Sequence
from pathlib import Path

from tests.kernels.cases import cases

FOLDER = Path(__file__).parent
ROOT = FOLDER.parents[1]
PYTEST = ["-m", "pytest", "-q", "-p", "no:cacheprovider"]
# Files that say this fixture's name have tests for the interpreter.
FIXTURE = "triton_device"


def _jobs() -> dict[str, tuple[list[str], str]]:
    """(arguments of Python, TRITON_INTERPRET) of each process by its name."""
    mutated = [name for name, case in cases().items() if case.MUTANTS]
    # All of them take ten minutes of a core: `make mutants`.
    every = "1" if os.environ.get("MUTANTS") == "all" else "5"
    # The run of an operator's mutants begins with its tests as they are.
    found = {f"interpreted {name}, then its mutants": ([str(FOLDER / "mutation.py"), name, every], "1") for name in mutated}
    for path in sorted((ROOT / "tests").rglob("test_*.py")):
        name = path.stem.removeprefix("test_")
        if FIXTURE in path.read_text(encoding="utf-8") and name not in mutated:
            found[f"interpreted {name}"] = ([*PYTEST, "-m", "not gpu", str(path)], "1")
    return found | {"compilation": ([*PYTEST, str(FOLDER / "compilation.py")], "0")}


JOBS = _jobs()


class Processes:
    """Runs named jobs: those of the interpreter, and those without it, each in forks of one process.

    Outcomes are files of a folder, as the tests that ask for them may be in another process of this session.
    """

    def __init__(self, names: Iterable[str]) -> None:
        self._folder = _folder()
        self._folder.mkdir()
        self._running: list[subprocess.Popen] = []
        self._threads: list[threading.Thread] = []
        for interpret in ("1", "0"):
            jobs = {name: JOBS[name][0] for name in names if JOBS[name][1] == interpret}
            if jobs:
                self._threads.append(threading.Thread(target=self._run, args=(jobs, interpret), daemon=True))
                self._threads[-1].start()

    def _run(self, jobs: dict[str, list[str]], interpret: str) -> None:
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "TRITON_INTERPRET": interpret, "OMP_NUM_THREADS": "1"}
        missing = set(jobs)
        with tempfile.TemporaryFile("w+", encoding="utf-8") as errors:
            process = subprocess.Popen(
                [sys.executable, str(FOLDER / "forks.py"), json.dumps(jobs)], cwd=ROOT, env=environment, text=True,
                stdout=subprocess.PIPE, stderr=errors, process_group=0,
            )  # fmt: skip
            self._running.append(process)
            assert process.stdout is not None
            for line in process.stdout:
                name, *outcome = json.loads(line)
                self._write(name, outcome)
                missing.discard(name)
            status = process.wait()
            errors.seek(0)
            said = errors.read()
        for name in missing:
            self._write(name, [status or 1, f"the process of all jobs has ended with status {status}\n{said}"])

    def _write(self, name: str, outcome: Sequence) -> None:
        partial = self._folder / "partial" / name.replace("/", " ")
        partial.parent.mkdir(exist_ok=True)
        partial.write_text(json.dumps(outcome), encoding="utf-8")
        partial.rename(self._folder / partial.name)

    def finish(self, *, kill: bool) -> None:
        """Wait for what still runs, or end it: the session was cut short."""
        for process in self._running if kill else ():
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
        for thread in self._threads:
            thread.join()
        if kill:
            shutil.rmtree(self._folder, ignore_errors=True)


def result(name: str) -> tuple[int, str]:
    """(status, output) of a job, when it has ended."""
    path = _folder() / name.replace("/", " ")
    while not path.exists():
        time.sleep(0.1)
    status, output = json.loads(path.read_text(encoding="utf-8"))
    path.unlink()
    # Whoever reads the last one leaves nothing behind.
    with contextlib.suppress(OSError):
        (path.parent / "partial").rmdir()
        path.parent.rmdir()
    return status, output


def _folder() -> Path:
    """One for all processes of this session."""
    return Path(tempfile.gettempdir(), f"komainu-{os.environ.get('PYTEST_XDIST_TESTRUNUID', os.getpid())}")
