"""Find out whether the tests of every kernel fail on each wrong version of it.

    python -m tests.kernels.mutation.run [MODULE ...] [--all | --most 20] [--kinds mask,loop] [--seed 0] [--jobs 2]

For every mutant (see `mutators`), a forked process imports the mutant in place of the module and runs the module's tests in
Triton's interpreter until one fails. Memory behind every tensor's end is forbidden (see `guarded`); a mutant that passes all
tests is tried again where memory before every tensor's start is. If it passes again it is a survivor: either a test is missing,
or the mutant computes the same and belongs into `equivalent`. Exit status 1 where there is a survivor.

Outcomes are kept in build/mutants.jsonl, so that a run that was cut short goes on where it ended; a change of the module or of
its tests makes them void, and survivors are always tried again.
"""

import argparse
import contextlib
import gc
import importlib
import importlib.abc
import importlib.util
import json
import os
import resource
import signal
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.kernels.mutation.equivalent import EQUIVALENT
from tests.kernels.mutation.modules import FUNCTIONS, ROOT, Module, modules
from tests.kernels.mutation.mutators import drawn, listed

OUTCOMES = ROOT / "build" / "mutants.jsonl"
# A test failed, or the process was killed for touching foreign memory, or for never ending.
SIGNALS = (signal.SIGSEGV, signal.SIGBUS, signal.SIGABRT, signal.SIGXCPU)
FOUND_OUT = (int(pytest.ExitCode.TESTS_FAILED), *(-number for number in SIGNALS))
# CPU time of the unchanged module's tests at most; a mutant that takes three times as long as these never ends.
CPU_SECONDS = 600
FINDERS = "finders"
# Mutants of a module that are tried by default.
MOST = 50
# Without plugins that write, or that collect garbage for longer than a mutant lives.
WITHOUT = ("cacheprovider", "faulthandler", "unraisableexception", "threadexception")
ARGUMENTS = ("-x", "-q", "--no-header", "--tb=no", *(f"-pno:{name}" for name in WITHOUT))
# Tests of the wiring around the kernels, which are slow and say nothing about a kernel's arithmetic.
WIRING = "not custom_operator and not compiler and not compiles"
# Imported once here for all forked processes. None of these modules may import `kernels`.
IMPORTED = (
    "torch._dynamo",
    "triton.language",
    "transformers.models.mistral.modeling_mistral",
    "hypothesis.strategies",
    "tokenizers",
    "sentencepiece.sentencepiece_pb2",
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
    """Runs the tests that detected most mutants before all others, because they are likely to detect the next mutant.

    finders: a file with a line for each mutant that was detected: the test that detected it. running: the file that
    names the test that runs.
    """

    def __init__(self, finders: Path, running: Path) -> None:
        self.running = running
        self.found = Counter(finders.read_text(encoding="utf-8").splitlines() if finders.exists() else [])

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self.running.write_text(f"{nodeid}\n", encoding="utf-8")

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        items.sort(key=lambda item: -self.found[item.nodeid])


def start(module: Module, source: str, folder: Path, number: int, before: bool, seconds: int) -> int:
    """Fork a process that runs a module's tests with this source in the module's place. Returns its id.

    before: forbid memory before every tensor's start, instead of memory behind its end. seconds: CPU time at most.
    """
    child = os.fork()
    if child:
        return child
    status = 1
    try:
        resource.setrlimit(resource.RLIMIT_CPU, (seconds, 2 * seconds))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        # The first process compiles what all import.
        sys.dont_write_bytecode, sys.pycache_prefix = False, str(folder / "compiled")
        path = folder / f"mutant_{number}.py"
        path.write_text(source, encoding="utf-8")
        sys.meta_path.insert(0, Replaced(module.imported, path))
        with (
            path.with_suffix(".log").open("w") as output,
            contextlib.redirect_stdout(output),
            contextlib.redirect_stderr(output),
        ):
            importlib.import_module("tests.kernels.mutation.guarded").guard_everything(before)
            marked = "not gpu and not slow" + ("" if module.name in FUNCTIONS else " and kernels")
            arguments = [*ARGUMENTS, "-m", marked, "-k", WIRING, *map(str, module.tests)]
            status = int(pytest.main(arguments, [FindersFirst(folder / FINDERS, path.with_suffix(".running"))]))
    finally:
        # Skip the clean-up that the forking process does at its own end.
        os._exit(status)


@dataclass(frozen=True)
class Outcome:
    """number: of the job. status: exit status of its tests. seconds: CPU time. output: what the tests printed."""

    number: int
    status: int
    seconds: float
    output: str


def outcomes_of(module: Module, sources: Sequence[str], processes: int) -> Iterator[Outcome]:
    """The outcome of the module's tests with each source, as it ends, `processes` at once; the first one runs alone."""
    waiting, running = [(number, False) for number in range(len(sources))], {}
    seconds, most, at_once = [0.0] * len(sources), CPU_SECONDS, 1
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        while waiting or running:
            while waiting and len(running) < at_once:
                number, before = waiting.pop(0)
                running[start(module, sources[number], folder, number, before, most)] = number, before
            child, ended, used = os.wait4(-1, 0)
            number, before = running.pop(child)
            seconds[number] += used.ru_utime + used.ru_stime
            status = os.waitstatus_to_exitcode(ended)
            if number == 0:
                most, at_once = min(CPU_SECONDS, 10 + round(3 * seconds[0])), processes
            if status == 0 and not before:
                waiting.insert(0, (number, True))
                continue
            log, finder = (folder / f"mutant_{number}.{suffix}" for suffix in ("log", "running"))
            if status in FOUND_OUT and finder.exists():
                with (folder / FINDERS).open("a", encoding="utf-8") as file:
                    file.write(finder.read_text(encoding="utf-8"))
            yield Outcome(number, status, seconds[number], log.read_text(errors="replace") if log.exists() else "")


def main(arguments: Sequence[str] | None = None) -> int:
    known = modules()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("modules", nargs="*", metavar="MODULE", help=f"of {', '.join(known)}; default: all")
    parser.add_argument("--kinds", help="kinds of changes, separated by commas (default: all)")
    parser.add_argument("--most", type=int, default=MOST, help=f"mutants of a module to try, drawn by a seed (default: {MOST})")
    parser.add_argument("--all", action="store_true", help="try all mutants")
    parser.add_argument("--seed", type=int, default=0, help="which mutants are drawn (default: 0)")
    parser.add_argument("--afresh", action="store_true", help="try again what was tried before")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes at once")
    given = parser.parse_args(arguments)
    unknown = set(given.modules) - known.keys()
    if unknown:
        parser.error(f"no kernels in {', '.join(sorted(unknown))}: choose from {', '.join(known)}")
    chosen = [known[name] for name in given.modules or known]
    os.environ["TRITON_INTERPRET"] = "1"
    os.environ["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"
    for name in IMPORTED:
        importlib.import_module(name)
    assert "kernels" not in sys.modules, "mutants would not take the place of modules that are imported already"
    gc.collect()
    gc.freeze()

    done = {}
    if OUTCOMES.exists() and not given.afresh:
        lines = map(json.loads, OUTCOMES.read_text(encoding="utf-8").splitlines())
        done = {(line["mutant"], line["tests"]): line["status"] for line in lines if line["status"] in FOUND_OUT}
    OUTCOMES.parent.mkdir(exist_ok=True)
    failed = False
    for module in chosen:
        failed |= try_module(module, given, done)
    return int(failed)


def try_module(module: Module, given: argparse.Namespace, done: dict[tuple[str, str], int]) -> bool:
    """Try a module's mutants and print the survivors. Returns whether something is wrong."""
    every, tests = module.mutants(), module.fingerprint()
    equivalent, stale = listed(every, EQUIVALENT.get(module.name, {}))
    for name in stale:
        print(f"kernels/{module.name}.py: no mutant has the name\n    {name}\n  that `equivalent` lists: mend it there")
    kinds = given.kinds.split(",") if given.kinds else [mutant.kind for mutant in every]
    rest = [mutant for mutant in every if mutant.name not in equivalent and mutant.kind in kinds]
    tried = rest if given.all else drawn(rest, given.most, given.seed)
    new = [mutant for mutant in tried if (mutant.key, tests) not in done]
    # The unchanged module comes first: its tests must pass.
    sources = [module.source, *(mutant.source for mutant in new)] if new else []
    wrong = bool(stale)
    for outcome in outcomes_of(module, sources, given.jobs):
        status = outcome.status
        if outcome.number == 0 and status:
            print(f"kernels/{module.name}.py: its own tests end with status {status}\n{outcome.output[-4000:]}")
            wrong = True
        elif outcome.number:
            mutant = new[outcome.number - 1]
            done[mutant.key, tests] = status
            line = {"mutant": mutant.key, "tests": tests, "status": status, "seconds": round(outcome.seconds, 1)}
            with OUTCOMES.open("a", encoding="utf-8") as file:
                file.write(json.dumps({**line, "module": module.name, "name": mutant.name}) + "\n")
    survivors = [mutant for mutant in tried if done[mutant.key, tests] not in FOUND_OUT]
    for mutant in survivors:
        print(f"kernels/{module.name}.py: the tests end with status {done[mutant.key, tests]} in spite of\n    {mutant.name}")
    found = len(tried) - len(survivors)
    sample = f" drawn from {len(rest)} by seed {given.seed}" if len(tried) < len(rest) else ""
    print(
        f"kernels/{module.name}.py: {found} of {len(tried)} mutants{sample} were detected; "
        f"{len(equivalent)} of {len(every)} are equivalent",
        flush=True,
    )
    return wrong or bool(survivors)


if __name__ == "__main__":
    status = main()
    sys.stdout.flush()
    # Skip the interpreter's clean-up, which would print leaks of Triton's bindings.
    os._exit(status)
