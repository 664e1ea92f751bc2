"""The modules that have kernels, and the tests that must find out their mutants."""

import ast
import hashlib
from dataclasses import dataclass
from pathlib import Path

from tests.kernels.mutation.mutators import Mutant, is_kernel, mutants

ROOT = Path(__file__).resolve().parents[3]
# Modules whose tests do not stand in the file of the same name.
TESTS = {"attention/tiles": ("attention/test_forward.py", "attention/test_backward.py")}
# Functions without @triton.jit that make what kernels read.
FUNCTIONS = {"attention/work": ("attention_work", "_keys_of", "_queries_of", "_listed")}


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
        """Changes when a test of the module, or what the tests share, changes."""
        shared = sorted((ROOT / "tests" / "kernels").glob("*.py"))
        return hashlib.sha256(b"".join(path.read_bytes() for path in (*self.tests, *shared))).hexdigest()[:16]


def modules() -> dict[str, Module]:
    """Every module that has mutants, by name."""
    found = {}
    for path in sorted((ROOT / "kernels").rglob("*.py")):
        name = path.relative_to(ROOT / "kernels").with_suffix("").as_posix()
        functions = [node for node in ast.parse(path.read_text(encoding="utf-8")).body if isinstance(node, ast.FunctionDef)]
        if name in FUNCTIONS or any(map(is_kernel, functions)):
            own = Path(name).parent / f"test_{Path(name).name}.py"
            found[name] = Module(name, tuple(ROOT / "tests" / "kernels" / test for test in TESTS.get(name, (str(own),))))
            missing = [str(test) for test in found[name].tests if not test.exists()]
            assert not missing, f"kernels/{name}.py has kernels and no tests {missing}: name its tests in TESTS"
    return found
