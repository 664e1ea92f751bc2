"""What needs a process of its own: the operators' tests in Triton's interpreter, their mutants, and offline compilation.

The interpreter is chosen when Triton is imported, and offline compilation needs a Triton without it. The processes run side by
side, as many as there are cores.
"""

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.kernels.cases import cases

FOLDER = Path(__file__).parent
ROOT = FOLDER.parents[1]
INTERPRETED = {"TRITON_INTERPRET": "1"}
MUTANTS = {name: case.MUTANTS for name, case in cases().items()}
PYTEST = ["-m", "pytest", "-q", "-p", "no:cacheprovider"]


def jobs() -> dict[str, tuple[list[str], dict[str, str]]]:
    """(arguments of Python, environment) of each process by its name, the longest first."""
    files = {f"mutants of {name}": ([str(FOLDER / "mutation.py"), name], INTERPRETED) for name in MUTANTS}
    for path in sorted((ROOT / "tests").rglob("test_*.py")):
        if "triton_device" in path.read_text(encoding="utf-8") and path != Path(__file__):
            files[f"interpreted {path.stem}"] = ([*PYTEST, "-m", "not gpu", str(path)], INTERPRETED)
    return files | {"compilation": ([*PYTEST, str(FOLDER / "compilation.py")], {"TRITON_INTERPRET": "0"})}


JOBS = jobs()


@pytest.fixture(scope="module")
def processes(request):
    """The processes of the tests that were chosen, by name."""
    names = [item.callspec.params["name"] for item in request.session.items if "processes" in getattr(item, "fixturenames", ())]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        yield {name: pool.submit(run, *JOBS[name]) for name in JOBS if name in names}


def run(arguments: list[str], environment: dict[str, str]) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT), **environment}, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=600, check=False,
    )  # fmt: skip


@pytest.mark.parametrize("name", JOBS)
def test_process(name, processes):
    done = processes[name].result()
    assert done.returncode == 0, f"{' '.join(done.args)}\n{done.stdout[-8000:]}"


@pytest.mark.parametrize("name", MUTANTS)
def test_what_mutants_replace_is_there_once(name):
    source = (ROOT / "kernels" / f"{name}.py").read_text(encoding="utf-8")
    assert {text: source.count(text) for text, _ in MUTANTS[name]} == {text: 1 for text, _ in MUTANTS[name]}
