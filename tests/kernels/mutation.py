"""The tests of one operator, and of each of its mutants, in Triton's interpreter: python tests/kernels/mutation.py rms_norm.

With a number behind the name, of every so manieth mutant. Prints the mutants that the tests let pass, and ends with status 1
where there are any.
"""

import contextlib
import gc
import importlib.util
import json
import os
import signal
import sys
import tempfile
from pathlib import Path

import pytest

import kernels
from tests.kernels.cases import cases

FOLDER = Path(__file__).parent
# A test failed, or the process was killed for reading what is not its own.
FOUND_OUT = (pytest.ExitCode.TESTS_FAILED, -signal.SIGSEGV, -signal.SIGBUS)
SECONDS = 120
ARGUMENTS = ["-x", "-q", "--no-header", "-p", "no:cacheprovider", "-p", "no:faulthandler", "-m", "not gpu"]


class FindersFirst:
    """Sorts tests: first those that found out a mutant before, the quickest of them first, as they are likely to find the next.

    seconds: of each test. finders: the tests that failed.
    """

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.finders: list[str] = []

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self.seconds[report.nodeid] = self.seconds.get(report.nodeid, 0.0) + report.duration
        if report.failed:
            self.finders.append(report.nodeid)

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        # Sorting keeps the order of the others.
        items.sort(key=lambda item: self.seconds[item.nodeid] if item.nodeid in self.finders else float("inf"))


def put_in_place(name: str, source: str, path: Path) -> None:
    """Let `kernels.<name>` be a module of this source from now on."""
    path.write_text(source, encoding="utf-8")
    spec = importlib.util.spec_from_file_location(f"kernels.{name}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    setattr(kernels, name, module)
    spec.loader.exec_module(module)


def outcome(name: str, source: str, path: Path, order: FindersFirst) -> tuple[int, str]:
    """(status, output) of the operator's tests, up to the first that fails, where its module has this source.

    In a forked process: a mutant may end it by reading what is not its own.
    """
    log = path.with_suffix(".log")
    child = os.fork()
    if not child:
        # One that writes what is not its own may hang for ever: choose another.
        signal.alarm(SECONDS)
        with log.open("w", encoding="utf-8") as output, contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
            put_in_place(name, source, path)
            for imported in [imported for imported in sys.modules if imported.endswith(f"test_{name}")]:
                del sys.modules[imported]
            status = pytest.main([*ARGUMENTS, "--tb=no", str(FOLDER / f"test_{name}.py")], [order])
        path.with_suffix(".json").write_text(json.dumps(order.finders), encoding="utf-8")
        os._exit(int(status))
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    # What a signal ended left none.
    if path.with_suffix(".json").exists():
        order.finders = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
    return status, log.read_text(encoding="utf-8")


def main(name: str, every: str = "1") -> int:
    mutants = cases()[name].MUTANTS[:: int(every)]
    source = Path(kernels.__path__[0], f"{name}.py").read_text(encoding="utf-8")
    survivors = 0
    # In this process, so that what the forks import and prepare is ready.
    order = FindersFirst()
    status = pytest.main([*ARGUMENTS, str(FOLDER / f"test_{name}.py")], [order])
    if status:
        return int(status)
    # What is there now, the forks need not look through, nor copy for that, whenever they collect.
    gc.collect()
    gc.freeze()
    with tempfile.TemporaryDirectory() as folder:
        for number, (text, replacement) in enumerate(mutants):
            assert source.count(text) == 1, f"stands {source.count(text)} times in {name}.py: {text}"
            # A file of its own for each: Triton and tracebacks read sources by their paths.
            status, output = outcome(name, source.replace(text, replacement), Path(folder, f"{name}_{number}.py"), order)
            if status not in FOUND_OUT:
                survivors += 1
                print(f"{name}: the tests ended with status {status} where\n  {text}\nis\n  {replacement}\n{output[-2000:]}")
    print(f"{name}: {len(mutants) - survivors} of {len(mutants)} mutants were found out")
    return int(survivors > 0)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
