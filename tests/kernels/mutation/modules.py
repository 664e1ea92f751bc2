"""The modules that have kernels, and the tests that must detect their mutants."""

import ast
import functools
import hashlib
from dataclasses import dataclass
from pathlib import Path

from tests.kernels.mutation.mutators import Mutant, bare, is_kernel, mutants

ROOT = Path(__file__).resolve().parents[3]
# Functions without @triton.jit that make what kernels read.
FUNCTIONS = {"attention/work": ("attention_work", "_keys_of", "_queries_of", "_keys_in_order", "_list")}

# Tests of several modules at once.
ALSO = {
    "attention/forward": ("attention/test_nonfinite.py",),
    "attention/backward": ("attention/test_nonfinite.py",),
    "rms_norm": ("test_fp8.py",),
    "rotary": ("test_fp8.py",),
    "swiglu": ("test_fp8.py",),
}


@dataclass(frozen=True)
class Module:
    """A module with kernels, by its path in kernels/ without the suffix, and the files of its tests."""

    name: str
    tests: tuple[Path, ...]

    @property
    def path(self) -> Path:
        return ROOT / "kernels" / f"{self.name}.py"

    @property
    def imported(self) -> str:
        return f"kernels.{self.name.replace('/', '.')}"

    @property
    def source(self) -> str:
        return self.path.read_text(encoding="utf-8")

    def mutants(self) -> list[Mutant]:
        return mutants(self.source, FUNCTIONS.get(self.name, ()))

    def fingerprint(self) -> str:
        """A hash of the module's tests and of the files that all tests of kernels share, comments and docstrings aside."""
        shared = sorted(path for path in (ROOT / "tests" / "kernels").glob("*.py") if not path.name.startswith("test_"))
        texts = (bare(path.read_text(encoding="utf-8")) for path in (*self.tests, *shared))
        return hashlib.sha256("".join(texts).encode()).hexdigest()[:16]


def modules() -> dict[str, Module]:
    """Every module that has mutants, by name."""
    found = {}
    for name, tree in trees().items():
        functions = [node for node in tree.body if isinstance(node, ast.FunctionDef)]
        if name in FUNCTIONS or any(map(is_kernel, functions)):
            found[name] = Module(name, tests_of(name))
            assert found[name].tests, f"kernels/{name}.py has kernels, and neither it nor a module that imports it has tests"
    return found


@functools.cache
def trees() -> dict[str, ast.Module]:
    """The syntax tree of every module of kernels, by name."""
    folder = ROOT / "kernels"
    return {
        path.relative_to(folder).with_suffix("").as_posix(): ast.parse(path.read_text(encoding="utf-8"))
        for path in sorted(folder.rglob("*.py"))
    }


def tests_of(name: str) -> tuple[Path, ...]:
    """The test file with the module's name and those of `ALSO`; without them, the tests of the modules that import it."""
    folder = ROOT / "tests" / "kernels"
    own = folder / Path(name).parent / f"test_{Path(name).name}.py"
    if own.exists():
        return (own, *(folder / also for also in ALSO.get(name, ())))
    imported = f"kernels.{name.replace('/', '.')}"
    importers = [
        other
        for other, tree in trees().items()
        if any(isinstance(node, ast.ImportFrom) and node.module == imported for node in tree.body)
    ]
    return tuple(dict.fromkeys(test for other in importers for test in tests_of(other)))
