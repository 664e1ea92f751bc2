"""Tests that need a process of their own: the operators' in Triton's interpreter, with their mutants, and offline compilation.

The interpreter is chosen when Triton is imported, and offline compilation needs a Triton without it. The processes start when
the tests are collected and run beside the others, so that no core idles; `test_processes.py` waits for them.
"""

import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterable
from concurrent.futures import Future
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
    # The run of an operator's mutants begins with its tests as they are.
    found = {f"interpreted {name}, then its mutants": ([str(FOLDER / "mutation.py"), name], "1") for name in mutated}
    for path in sorted((ROOT / "tests").rglob("test_*.py")):
        name = path.stem.removeprefix("test_")
        if FIXTURE in path.read_text(encoding="utf-8") and name not in mutated:
            found[f"interpreted {name}"] = ([*PYTEST, "-m", "not gpu", str(path)], "1")
    return found | {"compilation": ([*PYTEST, str(FOLDER / "compilation.py")], "0")}


JOBS = _jobs()


class Processes:
    """Runs named jobs: those of the interpreter, and those without it, each in forks of one process."""

    def __init__(self, names: Iterable[str]) -> None:
        self.running: list[subprocess.Popen] = []
        self.done: dict[str, Future] = {name: Future() for name in names}
        for interpret in ("1", "0"):
            jobs = {name: JOBS[name][0] for name in self.done if JOBS[name][1] == interpret}
            if jobs:
                threading.Thread(target=self._run, args=(jobs, interpret), daemon=True).start()

    def _run(self, jobs: dict[str, list[str]], interpret: str) -> None:
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "TRITON_INTERPRET": interpret, "OMP_NUM_THREADS": "1"}
        with tempfile.TemporaryFile("w+", encoding="utf-8") as errors:
            process = subprocess.Popen(
                [sys.executable, str(FOLDER / "forks.py"), json.dumps(jobs)], cwd=ROOT, env=environment, text=True,
                stdout=subprocess.PIPE, stderr=errors, process_group=0,
            )  # fmt: skip
            # The session's own tests have one core to themselves: they take longer than any of these.
            os.setpriority(os.PRIO_PROCESS, process.pid, 10)
            self.running.append(process)
            assert process.stdout is not None
            for line in process.stdout:
                name, *outcome = json.loads(line)
                self.done[name].set_result(outcome)
            status = process.wait()
            errors.seek(0)
            said = errors.read()
        for name in jobs:
            if not self.done[name].done():
                self.done[name].set_result([status or 1, f"the process of all jobs has ended with status {status}\n{said}"])

    def result(self, name: str) -> tuple[int, str]:
        """(status, output) of a job, when it has ended."""
        return self.done[name].result()

    def stop(self) -> None:
        """End what still runs: the session was cut short."""
        for process in self.running:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
