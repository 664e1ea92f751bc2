"""Tests that need a process of their own: the operators' in Triton's interpreter, with their mutants, and offline compilation.

The interpreter is chosen when Triton is imported, and offline compilation needs a Triton without it. The processes start when
the tests are collected and run beside the others, so that no core idles; `test_processes.py` waits for them.
"""

import os
import subprocess
import sys
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from tests.kernels.cases import cases

FOLDER = Path(__file__).parent
ROOT = FOLDER.parents[1]
PYTEST = ["-m", "pytest", "-q", "-p", "no:cacheprovider"]
# Files that say this fixture's name have tests for the interpreter.
FIXTURE = "triton_device"
_SECONDS = 1200


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
    """Runs named jobs, as many at once as there are cores."""

    def __init__(self, names: Iterable[str]) -> None:
        self.running: set[subprocess.Popen] = set()
        self.pool = ThreadPoolExecutor(os.cpu_count())
        self.done: dict[str, Future] = {name: self.pool.submit(self._run, *JOBS[name]) for name in names}

    def _run(self, arguments: list[str], interpret: str) -> tuple[int, str]:
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "TRITON_INTERPRET": interpret}
        process = subprocess.Popen(
            [sys.executable, *arguments], cwd=ROOT, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )
        # The session's own tests have one core to themselves: they take longer than any of these.
        os.setpriority(os.PRIO_PROCESS, process.pid, 10)
        self.running.add(process)
        try:
            output, _ = process.communicate(timeout=_SECONDS)
        finally:
            process.kill()
            self.running.discard(process)
        return process.returncode, output

    def result(self, name: str) -> tuple[int, str]:
        """(status, output) of a job, when it has ended."""
        return self.done[name].result()

    def stop(self) -> None:
        """End what still runs: the session was cut short."""
        self.pool.shutdown(wait=False, cancel_futures=True)
        for process in list(self.running):
            process.kill()
