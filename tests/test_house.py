"""The walls of the house: who imports whom, and how large a file may be."""

import ast
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
# Each folder may import the folders to its left.
ROOMS = ("kernels", "model", "engine", "recipes", "benchmarks")


def imports() -> dict[str, set[str]]:
    """module -> the project's modules that it imports when it is loaded."""
    files = {module_of(path): path for room in ROOMS for path in (ROOT / room).rglob("*.py")}
    found = {}
    for name, path in files.items():
        named = set()
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.Import):
                named |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module:
                named |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
        found[name] = named & files.keys() - {name}
    return found


def module_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def test_imports_run_downwards():
    wrong = [
        f"{name} imports {imported}"
        for name, found in imports().items()
        for imported in found
        if ROOMS.index(imported.split(".")[0]) > ROOMS.index(name.split(".")[0])
    ]
    assert not wrong


def test_no_modules_import_each_other_in_a_circle():
    found, done = imports(), set()

    def visit(name: str, path: tuple[str, ...]) -> None:
        assert name not in path, " -> ".join((*path[path.index(name) :], name))
        if name not in done:
            for imported in found[name]:
                visit(imported, (*path, name))
            done.add(name)

    for name in found:
        visit(name, ())


def test_only_tests_of_benchmarks_import_benchmarks():
    for path in (ROOT / "tests").rglob("*.py"):
        if path.relative_to(ROOT / "tests").parts[0] != "benchmarks":
            nodes = ast.walk(ast.parse(path.read_text(encoding="utf-8")))
            named = [node.module or "" for node in nodes if isinstance(node, ast.ImportFrom)]
            assert not any(name.split(".")[0] == "benchmarks" for name in named), path


def test_data_imports_nothing_above_it():
    above = tuple(f"engine.{room}" for room in ("estimate", "objectives", "optim", "distributed", "checkpoint", "observe"))
    assert not {
        f"{name} imports {imported}"
        for name, found in imports().items()
        for imported in found
        if name.startswith("engine.data") and imported.startswith((*above, "engine.run", "engine.loop"))
    }


def test_no_file_is_longer_than_500_lines_and_the_loop_is_shorter_than_250():
    paths = [path for room in (*ROOMS, "tests") for path in (ROOT / room).rglob("*.py")]
    sizes = {path: len(path.read_text(encoding="utf-8").splitlines()) for path in paths}
    assert not {str(path) for path, lines in sizes.items() if lines > 500}
    assert sizes[ROOT / "engine" / "loop.py"] < 250


def test_dataclasses_of_tensors_are_compared_by_identity():
    """A generated __eq__ would compare tensors, whose truth is ambiguous, and a generated __hash__ would not fit it."""
    holders, found = {"Tensor", "ndarray"}, {}
    for path in (path for room in ROOMS for path in (ROOT / room).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            decorators = [ast.unparse(decorator) for decorator in getattr(node, "decorator_list", [])]
            if isinstance(node, ast.ClassDef) and any(name.startswith("dataclass") for name in decorators):
                fields = [part.annotation for part in node.body if isinstance(part, ast.AnnAssign)]
                found[node.name] = (path, {name for part in fields for name in names_in(part)}, decorators)
    more = {"Tensor", "ndarray"}
    while more:
        more = {name for name, (_, fields, _) in found.items() if fields & holders} - holders
        holders |= more
    assert not {f"{found[name][0]}: {name}" for name in holders & found.keys() if "eq=False" not in " ".join(found[name][2])}


def names_in(annotation: ast.expr) -> set[str]:
    nodes = ast.walk(annotation)
    return {
        node.id if isinstance(node, ast.Name) else node.attr for node in nodes if isinstance(node, ast.Name | ast.Attribute)
    }
