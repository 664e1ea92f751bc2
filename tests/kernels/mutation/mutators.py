"""Wrong versions of a kernel, made from the structure of its source.

`mutants` walks the syntax tree of every @triton.jit function of a module (and of other functions that are named) and makes one
small change at a time:

    a bound      < becomes <=, > becomes >=, == becomes !=, and the other way round
    an operand   a + b, a - b, a * b, a / b, a % b, a >> b become a; a & b and a | b become a, and b
    a sum        total += x becomes total = x
    a mask       mask= and other= of a load or store go; other=<not 0> becomes 0
    a store      tl.store(...) goes
    a cast       x.to(tl.int64), tl.cast(x, tl.int64) and x.to(tl.float32) become x
    a choice     tl.where(c, a, b) becomes a, and b; minimum becomes maximum, and the other way round
    a condition  if, while and if-else become always true, and always false
    a loop       the first step of a range goes, and the last step
    a sign       -x and ~x become x; tl.abs(x) and tl.trans(x) become x
"""

import ast
import hashlib
import keyword
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

STRICTER: dict[type[ast.cmpop], type[ast.cmpop]] = {
    ast.Lt: ast.LtE,
    ast.LtE: ast.Lt,
    ast.Gt: ast.GtE,
    ast.GtE: ast.Gt,
    ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq,
}
OPPOSITE = {"minimum": "maximum", "maximum": "minimum", "min": "max", "max": "min"}
CASTS = {"int64", "float32"}
LOST = {"abs", "trans"}


@dataclass(frozen=True)
class Mutant:
    """One changed module.

    kind: of the change, see above. function: the function that is changed. before, after: the changed expression. number: 1, or
    2, 3, ... where the same change of the same expression was made before in this function. source: the whole module.
    """

    kind: str
    function: str
    before: str
    after: str
    number: int
    source: str

    @property
    def name(self) -> str:
        again = f" (number {self.number})" if self.number > 1 else ""
        return f"{self.function}: {self.before} -> {self.after}{again}"

    @property
    def key(self) -> str:
        """A hash of the changed module, comments and docstrings aside."""
        return hashlib.sha256(bare(self.source).encode()).hexdigest()[:16]


def mutants(source: str, functions: Iterable[str] = ()) -> list[Mutant]:
    """Every mutant of the kernels in a module's source, and of its other functions that are named."""
    tree, named = ast.parse(source), set(functions)
    found, seen = [], Counter[tuple[str, str, str]]()
    for function in tree.body:
        if isinstance(function, ast.FunctionDef) and (function.name in named or is_kernel(function)):
            for parent, field, index, node in places(function):
                for kind, changed in changes(node):
                    # The first line names a statement with a body.
                    before, after = (ast.unparse(ast.fix_missing_locations(code)).split("\n")[0] for code in (node, changed))
                    put(parent, field, index, changed)
                    text = ast.unparse(tree)
                    put(parent, field, index, node)
                    seen[function.name, before, after] += 1
                    found.append(Mutant(kind, function.name, before, after, seen[function.name, before, after], text))
    return found


def bare(source: str) -> str:
    """The source without comments and docstrings."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        match node:
            case ast.Module() | ast.FunctionDef() | ast.ClassDef() if ast.get_docstring(node) is not None:
                node.body[0] = ast.Pass()
    return ast.unparse(tree)


def drawn(found: Sequence[Mutant], most: int, seed: int) -> list[Mutant]:
    """At most so many of the mutants. Each has its own lot: another mutant more changes the draw by one."""

    def lot(mutant: Mutant) -> bytes:
        return hashlib.sha256(f"{seed} {mutant.name}".encode()).digest()

    chosen = set(sorted(map(lot, found))[:most])
    return [mutant for mutant in found if lot(mutant) in chosen]


def listed(found: Sequence[Mutant], names: Iterable[str]) -> tuple[set[str], list[str]]:
    """(names of the mutants that a list names, names that no mutant has).

    A name that no mutant has stands for the mutant of the same shape: functions and variables may be renamed.
    """
    names, existing = set(names), {mutant.name for mutant in found}
    unlisted, stale = defaultdict(list), defaultdict(list)
    for mutant in found:
        if mutant.name not in names:
            unlisted[shape(mutant.name)].append(mutant.name)
    for name in sorted(names - existing):
        stale[shape(name)].append(name)
    renamed = {form for form in stale if len(unlisted[form]) == len(stale[form])}
    return (
        (names & existing).union(*(unlisted[form] for form in renamed)),
        [name for form in stale.keys() - renamed for name in stale[form]],
    )


def shape(name: str) -> str:
    """A mutant's name with numbers in place of the names of its function and variables."""
    numbers: dict[str, int] = {}

    def number(word: re.Match[str]) -> str:
        kept = word[0] == "tl" or keyword.iskeyword(word[0])
        return word[0] if kept else f"#{numbers.setdefault(word[0], len(numbers))}"

    expression, again, counted = name.partition(" (number ")
    # Neither attributes nor keywords of a call, nor what stands in quotes.
    return re.sub(r"(?<![\w.'])[A-Za-z_]\w*(?![\w='])", number, expression) + again + counted


def is_kernel(function: ast.FunctionDef) -> bool:
    """Whether a function stands under @triton.jit or @triton.jit(...)."""
    return any(
        ast.unparse(decorator.func if isinstance(decorator, ast.Call) else decorator) == "triton.jit"
        for decorator in function.decorator_list
    )


def places(function: ast.FunctionDef) -> Iterator[tuple[ast.AST, str, int | None, ast.AST]]:
    """(parent, field, index in the field or None, node) of every node in a function's body, outside of annotations."""
    waiting: list[ast.AST] = [function]
    while waiting:
        parent = waiting.pop(0)
        for field, value in ast.iter_fields(parent):
            if field in ("args", "decorator_list", "returns", "annotation") and not isinstance(parent, ast.Call):
                continue
            for index, node in enumerate(value) if isinstance(value, list) else [(None, value)]:
                if isinstance(node, ast.AST):
                    yield parent, field, index, node
                    waiting.append(node)


def put(parent: ast.AST, field: str, index: int | None, node: ast.AST) -> None:
    if index is None:
        setattr(parent, field, node)
    else:
        getattr(parent, field)[index] = node


def changes(node: ast.AST) -> Iterator[tuple[str, ast.AST]]:
    """(kind of change, what may stand in the node's place)."""
    match node:
        case ast.Compare(left, [operator], right) if type(operator) in STRICTER:
            yield "bound", ast.Compare(left, [STRICTER[type(operator)]()], right)
        case ast.BinOp(left, operator, right):
            yield "operand", left
            if isinstance(operator, ast.BitAnd | ast.BitOr):
                yield "operand", right
        case ast.AugAssign(target, _, value):
            yield "sum", ast.Assign([target], value)
        case ast.UnaryOp(ast.USub() | ast.Invert() | ast.Not(), operand) if not isinstance(operand, ast.Constant):
            yield "sign", operand
        case ast.Expr(ast.Call(ast.Attribute(_, "store"))):
            yield "store", ast.Pass()
        case ast.If(_, body, orelse):
            yield "condition", ast.If(ast.Constant(True), body, orelse)
            yield "condition", ast.If(ast.Constant(False), body, orelse)
        case ast.IfExp(_, body, orelse):
            yield "condition", body
            yield "condition", orelse
        case ast.While(_, body, orelse):
            yield "condition", ast.If(ast.Constant(True), body, orelse)
        case ast.For(target, ast.Call(ast.Name("range"), bounds), body, orelse):
            for fewer in shorter(bounds):
                yield "loop", ast.For(target, ast.Call(ast.Name("range"), fewer, []), body, orelse)
        case ast.Call():
            yield from changed_calls(node)


def shorter(bounds: list[ast.expr]) -> Iterator[list[ast.expr]]:
    """The arguments of a range without its first step, and without its last."""
    start, stop, step = {
        1: lambda: (ast.Constant(0), *bounds, ast.Constant(1)),
        2: lambda: (*bounds, ast.Constant(1)),
        3: lambda: bounds,
    }[len(bounds)]()
    yield [ast.BinOp(start, ast.Add(), step), stop, step]
    yield [start, ast.BinOp(stop, ast.Sub(), step), step]


def changed_calls(call: ast.Call) -> Iterator[tuple[str, ast.AST]]:
    match call.func:
        case ast.Attribute(value, name):
            pass
        case ast.Name(name):
            value = None
        case _:
            return
    arguments, keywords = call.args, call.keywords
    given = {keyword.arg: keyword.value for keyword in keywords}
    if name in OPPOSITE:
        opposite = ast.Name(OPPOSITE[name]) if value is None else ast.Attribute(value, OPPOSITE[name])
        yield "choice", ast.Call(opposite, arguments, keywords)
    elif name == "where":
        for chosen in arguments[1:]:
            yield "choice", chosen
    elif name in LOST:
        yield "sign", arguments[0]
    elif name == "to" and isinstance(arguments[0], ast.Attribute) and arguments[0].attr in CASTS and not keywords:
        assert value is not None
        yield "cast", value
    elif name == "cast" and isinstance(arguments[1], ast.Attribute) and arguments[1].attr in CASTS:
        yield "cast", arguments[0]
    elif name in ("load", "store"):
        if "mask" in given:
            yield (
                "mask",
                ast.Call(call.func, arguments, [keyword for keyword in keywords if keyword.arg not in ("mask", "other")]),
            )
        if "other" in given and ast.unparse(given["other"]) not in ("0", "0.0"):
            others = [keyword if keyword.arg != "other" else ast.keyword("other", ast.Constant(0)) for keyword in keywords]
            yield "mask", ast.Call(call.func, arguments, others)
