"""Find out whether the tests of every kernel fail on each wrong version of it.

    python -m tests.kernels.mutation.run [MODULE ...] [--kinds mask,loop] [--sample 0.1] [--seed 0] [--jobs 2]

For every mutant (see `mutators`), a forked process imports the mutant in place of the module and runs the module's tests in
Triton's interpreter until one fails. A mutant that passes all of them is a survivor: either a test is missing, or the mutant
computes the same and belongs into `equivalent`. Exit status 1 where there is a survivor.

Outcomes are kept in build/mutants.jsonl, so that a run that was cut short goes on where it ended; a change of the module or of
its tests makes them void.
"""

import argparse
import contextlib
import gc
import importlib
import importlib.abc
import importlib.util
import json
import os
import random
import resource
import signal
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.kernels.mutation.equivalent import EQUIVALENT
from tests.kernels.mutation.modules import FUNCTIONS, ROOT, Module, modules

OUTCOMES = ROOT / "build" / "mutants.jsonl"
# A test failed, or the process was killed for touching foreign memory, or for never ending.
SIGNALS = (signal.SIGSEGV, signal.SIGBUS, signal.SIGABRT, signal.SIGXCPU)
FOUND_OUT = (int(pytest.ExitCode.TESTS_FAILED), *(-number for number in SIGNALS))
CPU_SECONDS = 60
ARGUMENTS = ("-x", "-q", "--no-header", "--tb=no", "-p", "no:cacheprovider", "-p", "no:faulthandler", "-p", "no:xdist")
# Tests of the wiring around the kernels, which are slow and say nothing about a kernel's arithmetic.
WIRING = "not custom_operator and not compiler and not compiles"
# Imported once here for all forked processes. None of these modules may import `kernels`.
IMPORTED = (
    "torch._dynamo",
    "triton.language",
    "transformers.models.mistral.modeling_mistral",
    "hypothesis.strategies",
    "tokenizers",
    "sentencepiece",
    "safetensors.torch",
    "tyro",
    "jinja2",
    "tqdm",
)


class Replaced(importlib.abc.MetaPathFinder):
    """Imports a module from another file."""

    def __init__(self, name: str, path: Path) -> None:
        self.name, self.path = name, path

    def find_spec(self, fullname, path=None, target=None):
        return importlib.util.spec_from_file_location(fullname, self.path) if fullname == self.name else None


class FindersFirst:
    """Runs the tests that detected a mutant before all others, because they are likely to detect the next mutant.

    path: a file with a line for each test that failed.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.finders = path.read_text(encoding="utf-8").splitlines() if path.exists() else []

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed and report.nodeid not in self.finders:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(f"{report.nodeid}\n")

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        items.sort(key=lambda item: item.nodeid not in self.finders)


def start(module: Module, source: str, folder: Path, number: int) -> int:
    """The process, forked from this one, that runs a module's tests where the module has this source."""
    child = os.fork()
    if child:
        return child
    status = 1
    try:
        resource.setrlimit(resource.RLIMIT_CPU, (CPU_SECONDS, 2 * CPU_SECONDS))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        path = folder / f"mutant_{number}.py"
        path.write_text(source, encoding="utf-8")
        sys.meta_path.insert(0, Replaced(module.imported, path))
        with (
            path.with_suffix(".log").open("w") as output,
            contextlib.redirect_stdout(output),
            contextlib.redirect_stderr(output),
        ):
            importlib.import_module("tests.kernels.mutation.guarded").guard_everything()
            marked = "not gpu and not slow" + ("" if module.name in FUNCTIONS else " and kernels")
            arguments = [*ARGUMENTS, "-m", marked, "-k", WIRING, *map(str, module.tests)]
            status = int(pytest.main(arguments, [FindersFirst(folder / f"{module.name.replace('/', '.')}.finders")]))
    finally:
        # Without what the forking process would do at its end.
        os._exit(status)


def outcomes_of(jobs: Sequence[tuple[Module, str]], processes: int):
    """(number of the job, exit status, output) of each job (module, source) as it ends, `processes` at once."""
    waiting, running = list(enumerate(jobs)), {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        while waiting or running:
            while waiting and len(running) < processes:
                number, (module, source) = waiting.pop(0)
                running[start(module, source, folder, number)] = number
            child, status = os.wait()
            number = running.pop(child)
            log = folder / f"mutant_{number}.log"
            yield number, os.waitstatus_to_exitcode(status), log.read_text(errors="replace") if log.exists() else ""


def main(arguments: Sequence[str] | None = None) -> int:
    known = modules()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("modules", nargs="*", metavar="MODULE", help=f"of {', '.join(known)}; default: all")
    parser.add_argument("--kinds", help="kinds of changes, separated by commas (default: all)")
    parser.add_argument("--sample", type=float, default=1.0, help="share of the mutants to try, drawn at random (default: 1)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the sample")
    parser.add_argument("--afresh", action="store_true", help="try again what was tried before")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes at once")
    given = parser.parse_args(arguments)
    unknown = set(given.modules) - known.keys()
    if unknown:
        parser.error(f"no kernels in {', '.join(sorted(unknown))}: choose from {', '.join(known)}")
    chosen = [known[name] for name in given.modules or known]
    os.environ["TRITON_INTERPRET"] = "1"
    for name in IMPORTED:
        importlib.import_module(name)
    assert "kernels" not in sys.modules, "mutants would not take the place of modules that are imported already"
    gc.collect()
    gc.freeze()

    done = {}
    if OUTCOMES.exists() and not given.afresh:
        lines = map(json.loads, OUTCOMES.read_text(encoding="utf-8").splitlines())
        done = {(line["mutant"], line["tests"]): line["status"] for line in lines}
    OUTCOMES.parent.mkdir(exist_ok=True)
    failed = False
    for module in chosen:
        failed |= try_module(module, given, done)
    return int(failed)


def try_module(module: Module, given: argparse.Namespace, done: dict[tuple[str, str], int]) -> bool:
    """Try a module's mutants and print the survivors. Returns whether something is wrong."""
    every, tests, equivalent = module.mutants(), module.fingerprint(), EQUIVALENT.get(module.name, {})
    stale = equivalent.keys() - {mutant.name for mutant in every}
    for name in sorted(stale):
        print(f"kernels/{module.name}.py: no mutant has the name\n    {name}\n  that `equivalent` lists: mend it there")
    kinds = given.kinds.split(",") if given.kinds else [mutant.kind for mutant in every]
    tried = [mutant for mutant in every if mutant.name not in equivalent and mutant.kind in kinds]
    if given.sample < 1:
        tried = random.Random(given.seed).sample(tried, min(len(tried), max(1, round(given.sample * len(tried)))))
    new = [mutant for mutant in tried if (mutant.key, tests) not in done]
    # The unchanged module comes first: its tests must pass.
    sources = [module.source, *(mutant.source for mutant in new)] if new else []
    wrong = bool(stale) and len(tried) + len(equivalent) == len(every)
    for number, status, output in outcomes_of([(module, source) for source in sources], given.jobs):
        if number == 0 and status:
            print(f"kernels/{module.name}.py: its own tests end with status {status}\n{output[-4000:]}")
            wrong = True
        elif number:
            mutant = new[number - 1]
            done[mutant.key, tests] = status
            with OUTCOMES.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"mutant": mutant.key, "tests": tests, "status": status, "name": mutant.name}) + "\n")
    survivors = [mutant for mutant in tried if done[mutant.key, tests] not in FOUND_OUT]
    for mutant in survivors:
        print(f"kernels/{module.name}.py: the tests end with status {done[mutant.key, tests]} in spite of\n    {mutant.name}")
    found = len(tried) - len(survivors)
    print(
        f"kernels/{module.name}.py: {found} of {len(tried)} mutants were detected, of {len(every)} in all, "
        f"{len(equivalent)} of them equivalent",
        flush=True,
    )
    return wrong or bool(survivors)


if __name__ == "__main__":
    status = main()
    sys.stdout.flush()
    # Without the interpreter's clean-up, which would print leaks of Triton's bindings.
    os._exit(status)
