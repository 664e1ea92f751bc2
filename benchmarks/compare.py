"""Two results of one benchmark, row by row: python -m benchmarks.compare OLD NEW [--other-machine]

Prints new / old for every measurement that both results have. "from" and "to" bound the ratio: a 20th percentile over the other
result's 80th. Where the ranges overlap, the difference is "within noise". Values that were measured once (memory) have no
range. Rows of one result alone are named.
"""

import argparse
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks import results as of

_NOT_COMPARED = ("memory_gib", "python", "driver")
Key = tuple[tuple[str, Any], ...]


def compare(old: dict[str, Any], new: dict[str, Any], *, other_machine: bool = False) -> str:
    """The comparison as text.

    Raises: ValueError for results of different benchmarks, for rows that cannot be told apart, and for results of different
        machines unless `other_machine`.
    """
    benchmark = old["benchmark"]
    if benchmark != new["benchmark"]:
        raise ValueError(f"results of different benchmarks: {benchmark} and {new['benchmark']}")
    unlike = _unlike(old["machine"], new["machine"])
    places = [name for name in ("device", "kind", "cores", "threads") if name in unlike]
    if places and not other_machine:
        differences = "; ".join(f"{name} {unlike[name]}" for name in places)
        raise ValueError(f"measured on different machines: {differences}; --other-machine compares them all the same")
    lines = [f"{benchmark}, new / old"]
    lines += [f"{side}: {result['when']}, commit {result['commit'][:12]}" for side, result in (("old", old), ("new", new))]
    lines += [f"{name}: {values}" for name, values in unlike.items() if name not in _NOT_COMPARED]
    settings = _unlike(*(of.flat(result["settings"]) for result in (old, new)))
    lines += [f"setting {name}: {values}" for name, values in settings.items() if name != "out"]

    before, after = _by_key(old), _by_key(new)
    ratios = [
        {"row": of.label(dict(key)), **_ratio(name, value, after[key][name])}
        for key, row in before.items()
        for name, value in row.items()
        if key in after and _is_measured(value) and _is_measured(after[key].get(name))
    ]
    if ratios:
        lines += ["", of.table(ratios, ["row", "measured", "old", "new", "new / old", "from", "to", "remark"])]
    for side, some, others in (("old", before, after), ("new", after, before)):
        lines += [f"only in {side}: {of.label(dict(key))}" for key in some if key not in others]
        for key, row in some.items():
            if key in others and row.get("missing") and not others[key].get("missing"):
                lines.append(f"missing in {side}: {of.label(dict(key))}: {row['missing']}")
    return "\n".join(lines)


def _unlike(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, str]:
    """The differences of two mappings, as text."""
    names = dict.fromkeys((*old, *new))
    return {name: f"{old.get(name)} and {new.get(name)}" for name in names if old.get(name) != new.get(name)}


def _by_key(result: dict[str, Any]) -> dict[Key, dict[str, Any]]:
    rows = [of.flat(row) for row in result["rows"]]
    keys = [tuple(of.identity(result["benchmark"], row).items()) for row in rows]
    twice = [key for key, count in Counter(keys).items() if count > 1]
    if twice:
        raise ValueError(f"two rows of the result of {result['when']} are '{of.label(dict(twice[0]))}'")
    return dict(zip(keys, rows, strict=True))


def _is_measured(value: Any) -> bool:
    return isinstance(value, float) or of.is_spread(value)


def _ratio(name: str, old: Any, new: Any) -> dict[str, Any]:
    """The cells of one measurement."""
    cells = {"measured": name.replace("_", " "), "old": of.number(old), "new": of.number(new)}
    if not of.middle(old):
        return cells
    cells["new / old"] = f"{of.middle(new) / of.middle(old):.3f}"
    if not all(of.is_spread(value) and value.get("samples") != 1 for value in (old, new)) or not old["low"]:
        return cells
    cells |= {"from": f"{new['low'] / old['high']:.3f}", "to": f"{new['high'] / old['low']:.3f}"}
    if new["low"] <= old["high"] and old["low"] <= new["high"]:
        cells["remark"] = "within noise"
    return cells


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.compare", description="Two results of one benchmark.")
    parser.add_argument("old", help="result file")
    parser.add_argument("new", help="result file")
    parser.add_argument("--other-machine", action="store_true", help="compare results of different machines too")
    parsed = parser.parse_args(argv)
    try:
        print(compare(of.read_result(parsed.old), of.read_result(parsed.new), other_machine=parsed.other_machine))
    except (ValueError, FileNotFoundError) as error:
        raise SystemExit(f"error: {error}") from None


if __name__ == "__main__":
    main()
