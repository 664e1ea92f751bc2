"""The tables and drawings of benchmarks/README.md, from the committed results: python -m benchmarks.report [--check]

Fills the regions from `<!-- table NAME -->` to `<!-- end -->`, and draws benchmarks/plots/NAME.svg for tables with bars.
`--check` writes nothing and fails where the page differs from the results.
"""

import argparse
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.results import RESULTS, ROOT, flat, middle, number, read_result
from model.folder import write_file

PAGE = ROOT / "benchmarks" / "README.md"
_REGION = re.compile(r"(<!-- table (\S+) -->\n).*?(<!-- end -->)", re.DOTALL)


@dataclass(frozen=True)
class Table:
    result: str  # file in results/
    columns: Mapping[str, str]  # heading -> field of a flat row; "field %" shows a share in per cent, "field ms" milliseconds
    where: Mapping[str, Any] = field(default_factory=dict)  # values that the shown rows have
    bars: str = ""  # heading that is drawn


_PRECISION = {"run": "run", "precision": "precision", "held-out loss": "loss"}
_PRECISION |= {"difference to float32, mean %": "difference %", "largest %": "largest %"}
TABLES: dict[str, Table] = {
    "precision-text": Table("precision-text-intel-xeon", _PRECISION),
    "precision-stages": Table("precision-stages-intel-xeon", _PRECISION),
    "head": Table(
        "kernels-nvidia-h200",
        {"forward and backward": "provider", "ms": "seconds ms", "of the floor %": "floor_fraction %", "peak MiB": "peak_mib"}
        | {"error / allowed": "error", "remark": "wrong"},
        {"direction": "both"},
        bars="of the floor %",
    ),
}


def rows_of(table: Table) -> list[dict[str, Any]]:
    """The measured rows that the table shows, flat."""
    rows = [flat(row) for row in read_result(RESULTS / f"{table.result}.json")["rows"]]
    shown = [row for row in rows if all(row.get(name) == value for name, value in table.where.items())]
    fields = [name.removesuffix(" %").removesuffix(" ms") for name in list(table.columns.values())[1:]]
    return [row for row in shown if any(row.get(name) is not None for name in fields) and not row.get("missing")]


def cell(row: Mapping[str, Any], name: str) -> str:
    scale = 100.0 if name.endswith(" %") else 1e3 if name.endswith(" ms") else 1.0
    return number(row.get(name.removesuffix(" %").removesuffix(" ms")), scale).replace("|", "\\|")


def text_of(table: Table) -> str:
    """The table in Markdown, and where it comes from."""
    lines = [list(table.columns), ["---"] * len(table.columns)]
    lines += [[cell(row, name) for name in table.columns.values()] for row in rows_of(table)]
    content = read_result(RESULTS / f"{table.result}.json")
    machine, cut = content["machine"], "" if content.get("complete", True) else ", cut off before its end"
    versions = ", ".join(f"{name} {machine[name]}" for name in ("torch", "triton", "transformers") if machine.get(name))
    origin = (
        f"({content['when'][:10]}, {machine['device']}, {versions}, commit `{content['commit'][:12]}`, "
        f"`{content['command']}`{cut}: [{table.result}.json](results/{table.result}.json))"
    )
    return "".join(f"| {' | '.join(line)} |\n" for line in lines) + f"\n{origin}\n"


def filled(page: str) -> str:
    """The page with its tables made anew. Raises: ValueError for a table of an unknown name."""

    def region(match: re.Match[str]) -> str:
        if match[2] not in TABLES:
            raise ValueError(f"<!-- table {match[2]} -->: no such table; choose from {', '.join(TABLES)}")
        return match[1] + text_of(TABLES[match[2]]) + match[3]

    return _REGION.sub(region, page)


def draw(name: str, table: Table, folder: Path) -> None:
    """Bars of one column, ours in another colour."""
    from matplotlib import pyplot

    column = table.columns[table.bars]
    rows, key = rows_of(table), column.removesuffix(" %")
    scale = 100.0 if column.endswith(" %") else 1.0
    names = [str(row[next(iter(table.columns.values()))]) for row in rows]
    values = [scale * middle(row[key]) for row in rows]
    figure, axes = pyplot.subplots(figsize=(8, 0.7 + 0.4 * len(rows)), layout="constrained")
    colours = ["#0b6e99" if name.startswith("komainu") else "#a9b4bd" for name in names]
    axes.barh(names, values, color=colours)
    axes.invert_yaxis()
    axes.set_xlabel(f"{table.bars}, {read_result(RESULTS / f'{table.result}.json')['machine']['device']}")
    folder.mkdir(exist_ok=True)
    figure.savefig(folder / f"{name}.svg", metadata={"Date": None})
    pyplot.close(figure)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.report", description="Tables and drawings of the results.")
    parser.add_argument("--check", action="store_true", help="write nothing; fail where the page differs from the results")
    check = parser.parse_args(argv).check
    before = PAGE.read_text(encoding="utf-8")
    after = filled(before)
    if check:
        raise SystemExit(None if before == after else f"error: {PAGE.name} differs from the results; run benchmarks.report")
    write_file(PAGE, after)
    for name in _REGION.findall(after):
        if TABLES[name[1]].bars:
            draw(name[1], TABLES[name[1]], ROOT / "benchmarks" / "plots")


if __name__ == "__main__":
    main()
