"""Tables and plots of all committed results: python -m benchmarks.report [--check]

Reads benchmarks/results/*.json, writes benchmarks/README.md, benchmarks/plots/*.svg and, in the root README, what stands
between `<!-- results:NAME -->` or `<!-- plot:NAME -->` and `<!-- end -->`; NAME is a benchmark or the name of one result file.
Nothing is written from any other source: what has no result file is not claimed. `--check` writes nothing and fails, naming
the files, where one is not what the results give.
"""

import argparse
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import rows as of
from benchmarks.plot import Bar, bar_chart
from model.folder import write_file

ROOT = Path(__file__).resolve().parents[1]
_REGION = re.compile(r"(<!-- (results|plot):(\S+) -->)\n(.*?)(<!-- end -->)", re.DOTALL)
_NOT_VERSIONS = ("device", "kind", "cores", "threads", "memory_gib", "driver")


@dataclass(frozen=True)
class View:
    """How a benchmark's results are shown."""

    title: str
    what: str
    subject: str
    """The field that names what is compared: a bar's name."""
    brief: tuple[str, ...] = ()
    """The columns that come first, and in the root README alone; none: all."""
    bars: tuple[tuple[str, str, float], ...] = ()
    """(column, title with its unit, the value that others are held against or 0) of each plot."""
    only: tuple[str, ...] = ()
    """The subjects that are plotted; none: all."""
    split: str = ""
    """A field each of whose values has a table of its own."""
    apart: str = ""
    """A field whose rows have a table of their own, behind the others."""
    first: int = 0
    """Rows of a table that are shown, and those whose field `always` is true; 0: all."""
    always: str = ""


VIEWS: dict[str, View] = {
    "train": View(
        "Training steps",
        "Whole training steps, ours beside those of peers that train on the same tokens from the same weights. Padding never "
        "counts as tokens. MFU counts the operations that the step needs, attended pairs exactly, against the published peak; "
        "HFU those that are computed; of ceiling: those needed against a large matrix product in the same process.",
        "name",
        brief=(
            "name", "tokens_per_second", "tokens_per_cpu_second", "mfu", "hfu", "of_ceiling", "memory allocated_gib",
            "memory reserved_gib", "memory resident_gib", "plan_gib", "loss_first_difference",
        ),
        bars=(("tokens_per_second", "Tokens per second", 0),),
    ),
    "finetune": View(
        "Fine-tuning",
        "Supervised fine-tuning and preference tuning beside every path of TRL: the same weights and documents, side by side "
        "in turns. A token is a non-padding token of a conversation, or of a chosen or rejected answer with its prompt, which "
        "counts for both. With reference: each token also bears its part of what the reference's log-probabilities took.",
        "name",
        brief=(
            "stage", "name", "tokens_per_second", "tokens_per_cpu_second", "tokens_per_second_with_reference",
            "tokens_per_cpu_second_with_reference", "memory allocated_gib", "memory reserved_gib", "memory resident_gib",
            "loss_largest_difference", "ratio tokens_per_second", "ratio tokens_per_cpu_second",
            "ratio tokens_per_second_with_reference", "ratio tokens_per_cpu_second_with_reference", "memory_ratio", "target",
            "met",
        ),
        bars=(
            ("tokens_per_second", "Tokens per second", 0), ("tokens_per_cpu_second", "Tokens per CPU-second", 0),
        ),
        apart="met",
    ),
    "kernels": View(
        "Operators",
        "Each operator on random data with cold caches, ours beside the peers'. The floor is the larger of the bytes that must "
        "be moved over the measured rate of a copy and the operations over that of a matrix product.",
        "provider",
        brief=(
            "operator", "direction", "shape", "provider", "seconds", "floor_fraction", "speed_over_best_peer", "best_peer",
            "peak_mib", "error", "wrong",
        ),
        bars=(("speed_over_best_peer", "Speed of our operators, the best peer's = 1", 1),),
        only=("komainu",),
    ),
    "data": View(
        "Data",
        "Preparing text, conversations and pairs, and encoding alone; how full packs of real distributions of lengths are; how "
        "long a step waits for its micro-batches; and making the order of a whole run.",
        "packer",
        brief=(
            "what", "provider", "lengths", "packer", "kind", "documents", "step_seconds", "seconds", "utilisation",
            "tokens_per_second", "documents_per_second", "places_per_second", "wait_seconds", "waiting_share", "peak_gib",
        ),
        bars=(("utilisation", "Share of a pack that holds places", 1),),
        split="part",
    ),
    "checkpoint": View(
        "Checkpoints",
        "Saving until all is on the disk, and loading from it until a model and its optimizer are ready to go on. Blocked: "
        "until training can go on. Above: the most host memory beyond what was held before.",
        "provider",
        brief=(
            "operation", "provider", "gib", "seconds", "gb_per_second", "blocked_seconds", "peak_host_gib", "above_gib",
            "wrong",
        ),
        bars=(("gb_per_second", "GB/s", 0),),
    ),
    "resize": View(
        "New rows of a resized vocabulary",
        "A small Mistral is trained on the base vocabulary, resized by each method, and trained on with text that the base has "
        "not seen, beside the base that is trained on with its own vocabulary. Bits per character of held-out text; operations "
        "count from the resizing on, those of distillation included.",
        "method",
        bars=(("bits_per_character_ja", "Bits per character of held-out Japanese", 0),),
        split="after",
    ),
    "streaming": View(
        "Models that pass through",
        "A model of full size is imported, resized and exported, each in a process of its own, beside a plain copy of its "
        "files. The peak is that of the resident set, mapped files included; GB/s are of what is read and written together.",
        "operation",
        bars=(("gb_per_second", "GB/s", 0),),
    ),
    "tune": View(
        "Launches",
        "How each kernel might be launched, beside the entry of `kernels.configurations` of that commit (in table): the best, "
        "timed by the operator that launches it. The file has all that were tried.",
        "candidate",
        brief=("candidate", "in_table", "seconds", "speed_over_table"),
        split="kernel",
        first=3,
        always="in_table",
    ),
    "environment": View("Ceilings", "What a machine reaches.", "what"),
}  # fmt: skip
_INTRODUCTION = """\
# Benchmarks

Generated by `python -m benchmarks.report` from the files in `results/`; a test fails where this page says anything else.
Medians with the 20th and 80th percentile in parentheses. What could not be measured is named as missing, never guessed.

| command | measures |
| --- | --- |
| `python -m benchmarks.train` | training steps: beside peers (`--peers all`), over a `--sweep`, part by part (`--ladder`) |
| `python -m benchmarks.finetune` | supervised fine-tuning and preference tuning beside TRL |
| `python -m benchmarks.kernels` | every operator beside torch and the peers |
| `python -m benchmarks.checkpoint` | writing and reading checkpoints |
| `python -m benchmarks.data` | tokenising, packing, loading, planning |
| `python -m benchmarks.resize` | what new rows are worth: bits per character after each method of resizing |
| `python -m benchmarks.streaming` | import, resize and export of a model of full size: memory, GB/s |
| `python -m benchmarks.tune` | which launch of each kernel is the fastest on a GPU |
| `python -m benchmarks.gpu` | all of them and the tests that need a GPU, unattended; `--rehearse` tries it on a CPU |
| `python -m benchmarks.compare OLD NEW` | two result files, as ratios with the noise beside them |

Peers are those that are installed: `pip install -r benchmarks/requirements.txt` in an environment of their own, whose
interpreter `--peers-python` names. `--out benchmarks/results/<benchmark>-<machine>.json` keeps a result for this page.
"""
_NOTHING = "No result has been committed yet, so there is nothing to report: no speed is claimed.\n"


@dataclass(frozen=True)
class Result:
    """A result file's content, its rows flat."""

    name: str
    content: dict[str, Any]
    rows: list[dict[str, Any]]

    @property
    def benchmark(self) -> str:
        return self.content["benchmark"]

    @property
    def view(self) -> View:
        return VIEWS[self.benchmark]


def read_results(folder: Path) -> list[Result]:
    """All results of a folder, in the order of `VIEWS` and then of their names.

    Raises: ValueError naming a file that is no result, has an unknown benchmark or another benchmark's or machine's name.
    """
    results = []
    for path in sorted(folder.glob("*.json")):
        content = of.read_result(path)
        benchmark = content["benchmark"]
        if benchmark not in VIEWS:
            raise ValueError(f"{path}: unknown benchmark '{benchmark}'; there are {', '.join(VIEWS)}")
        machine = slug(content["machine"]["device"])
        if not (path.stem.startswith(f"{benchmark}-") and path.stem.endswith(f"-{machine}")):
            raise ValueError(f"{path}: a result of {benchmark} on this machine is named {benchmark}-{machine}.json")
        results.append(Result(path.stem, content, [of.flat(row) for row in content["rows"]]))
    return sorted(results, key=lambda result: (list(VIEWS).index(result.benchmark), result.name))


def slug(device: str) -> str:
    """A device's name as it stands in a file's name."""
    return "-".join(re.findall(r"[a-z0-9]+", device.lower()))


def page(results: Sequence[Result]) -> str:
    """benchmarks/README.md."""
    blocks = [_INTRODUCTION]
    for benchmark, view in VIEWS.items():
        some = [result for result in results if result.benchmark == benchmark]
        if some:
            blocks.append(f"## {view.title}\n\n{view.what}\n")
        for result in some:
            blocks.append(f"### {result.content['machine']['device']}\n\n{_origin(result)}\n")
            blocks += [f"![{title}](plots/{name})\n" for name, title, _ in _plots(result)]
            blocks.append(_tables(result, everything=True))
            blocks.append(f"<details><summary>Settings</summary>\n\n```toml\n{_settings(result)}\n```\n\n</details>\n")
    return "\n".join(blocks if results else [*blocks, _NOTHING])


def _origin(result: Result) -> str:
    """When, where, with what, from which commit and by which command."""
    content, machine = result.content, result.content["machine"]
    versions = [f"{name} {value}" for name, value in machine.items() if name not in _NOT_VERSIONS and value is not None]
    driver = f", driver {machine['driver']}" if machine.get("driver") else ""
    commit = str(content["commit"])
    changed = " with changes that were not committed" if commit.endswith("+") else ""
    whole = "" if content.get("complete", True) else " It was cut off; rows are lacking."
    return (
        f"Measured {content['when'][:10]} on {machine['device']} ({machine.get('cores')} cores, {machine.get('threads')} "
        f"threads, {machine.get('memory_gib')} GiB of main memory{driver}) with {', '.join(versions)}, at commit "
        f"`{commit.rstrip('+')[:12]}`{changed}, by `{content['command']}` ([{result.name}.json](results/{result.name}.json))."
        f"{whole}"
    )


def _settings(result: Result) -> str:
    settings = {name: value for name, value in of.flat(result.content["settings"]).items() if value not in (None, "")}
    return "\n".join(f"{name} = {json.dumps(value, ensure_ascii=False)}" for name, value in settings.items())


def _tables(result: Result, *, everything: bool) -> str:
    """What all rows share, a table of those of each task that were measured, and what is missing; `everything`: all columns,
    those that matter less folded away."""
    measured = [row for row in result.rows if not row.get("missing")]
    names = [name for name in of.columns_of(measured, result.view.brief) if name not in ("task", result.view.split)]
    unknown = [name for name in names if {of.number(row.get(name)) for row in measured} <= {"missing", "-"}]
    shared = [name for name in names if len(measured) > 1 and len({repr(row.get(name)) for row in measured}) == 1]
    shared = [name for name in shared if name != result.view.subject]
    names = [name for name in names if name not in (*shared, *unknown)]
    keys = [name for name in names if any(name in of.identity(result.benchmark, row) for row in measured)]
    brief = [name for name in names if name in result.view.brief] or names
    main = [*(name for name in keys if name not in brief), *brief]
    rest = [name for name in names if name not in main]
    blocks = []
    said = {name: measured[0][name] for name in shared if name not in unknown and measured[0][name] != ""}
    if said and everything:
        blocks.append(f"All rows: {', '.join(_named(name, value) for name, value in said.items())}.\n")
    for heading, group in grouped(result.view, measured):
        first, always = result.view.first or len(group), result.view.always
        rows = [row for number, row in enumerate(group) if number < first or row[always]]
        if heading:
            blocks.append(f"**{heading}**\n")
        blocks.append(_grid(rows, main))
        if rest and everything:
            more = _grid(rows, [*(name for name in main if name in keys), *rest])
            blocks.append(f"<details><summary>More columns</summary>\n\n{more}\n</details>\n")
    missing: dict[str, list[str]] = {}
    for name in [*unknown, *names]:
        for why in dict.fromkeys(of.why_missing(row.get(name)) for row in measured):
            if why is not None:
                missing.setdefault(why, []).append(of.words(name))
    for row in result.rows:
        if row.get("missing"):
            what = {name: value for name, value in of.identity(result.benchmark, row).items() if name not in shared}
            missing.setdefault(str(row["missing"]), []).append(of.label(what))
    if missing:
        blocks.append("Not measured:\n\n" + "".join(f"- {'; '.join(rows)}: {_cell(why)}\n" for why, rows in missing.items()))
    return "\n".join(blocks)


def grouped(view: View | None, rows: Sequence[dict[str, Any]]) -> list[tuple[str, list[dict[str, Any]]]]:
    """Flat rows by table, each with its heading (empty for the only one, and for what stands apart behind the others)."""
    groups: dict[tuple[str, bool], list[dict[str, Any]]] = {}
    for row in rows:
        heading = ", ".join(row[name] for name in ("task", view.split if view else "") if row.get(name))
        apart = view is not None and view.apart in row
        groups.setdefault((heading, apart), []).append(row)
    return [("" if apart else heading, some) for (heading, apart), some in groups.items()]


def _named(name: str, value: Any) -> str:
    divisor, _ = of.unit_of(name, [value])
    return f"{of.head(name, [value])} {of.number(value, divisor)}"


def _grid(rows: Sequence[dict[str, Any]], names: Sequence[str]) -> str:
    """The columns of these names that any of the rows has."""
    names = [name for name in names if any(row.get(name) not in (None, "") for row in rows)]
    columns = {name: [row.get(name) for row in rows] for name in names}
    divisors = {name: of.unit_of(name, values)[0] for name, values in columns.items()}
    lines = [[of.head(name, values) for name, values in columns.items()], ["---"] * len(names)]
    lines += [[of.number(row.get(name), divisors[name]) for name in names] for row in rows]
    return "".join(map(_line, lines))


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(_cell(cell) for cell in cells)} |\n"


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def _plots(result: Result) -> list[tuple[str, str, str]]:
    """(file name, title, SVG) of each plot."""
    plots, view = [], result.view
    for column, title, reference in view.bars:
        rows = [row for row in result.rows if not view.only or row.get(view.subject) in view.only]
        rows = [row for row in rows if row.get(column) is not None and of.why_missing(row[column]) is None]
        groups: dict[str, list[Bar]] = {}
        for row, heading in zip(rows, _headings(result, rows), strict=True):
            name, value = str(row.get(view.subject)), row[column]
            low, median, high = (value["low"], value["median"], value["high"]) if of.is_spread(value) else (value,) * 3
            bar = Bar(heading if len(view.only) == 1 else name, median, low, high, of.number(value), name.startswith("komainu"))
            groups.setdefault("" if len(view.only) == 1 else heading, []).append(bar)
        if groups:
            chart = bar_chart(f"{title}: {result.content['machine']['device']}", list(groups.items()), reference)
            plots.append((f"{result.name}-{slug(column)}.svg", title, chart))
    return plots


def _headings(result: Result, rows: Sequence[dict[str, Any]]) -> list[str]:
    """What tells each row from those of the same subject: as few of its key's fields as do."""
    subject = result.view.subject
    identities = [of.identity(result.benchmark, row) for row in rows]
    names = dict.fromkeys(name for keys in identities for name in keys if name != subject)
    varying = [name for name in names if len({repr(keys.get(name)) for keys in identities}) > 1]
    for count in range(len(varying) + 1):
        headings = [of.label({name: keys[name] for name in varying[:count] if name in keys}) for keys in identities]
        if len({(heading, row.get(subject)) for heading, row in zip(headings, rows, strict=True)}) == len(rows):
            break
    return headings


def filled(text: str, results: Sequence[Result]) -> str:
    """A page with its marked regions filled anew. Raises: ValueError for a region of a name that nothing has."""

    def region(match: re.Match[str]) -> str:
        opening, kind, name, _, end = match.groups()
        some = [result for result in results if name in (result.benchmark, result.name)]
        if not some and name not in VIEWS:
            raise ValueError(f"<!-- {kind}:{name} -->: no benchmark or result file has this name; there are {', '.join(VIEWS)}")
        blocks = []
        for result in some:
            if kind == "plot":
                blocks += [f"![{title}](benchmarks/plots/{file})\n" for file, title, _ in _plots(result)]
            else:
                origin = _origin(result).replace("](results/", "](benchmarks/results/")
                blocks.append(_tables(result, everything=False) + f"\n{origin}\n")
        inside = "\n".join(blocks) or f"No result of `benchmarks.{name}` has been committed yet.\n"
        return f"{opening}\n{inside}{end}"

    opened, closed = len(re.findall(r"<!-- (?:results|plot):", text)), len(_REGION.findall(text))
    if opened != closed:
        raise ValueError("a region <!-- results:NAME --> or <!-- plot:NAME --> has no <!-- end --> or stands in another")
    return _REGION.sub(region, text)


def generated(root: Path) -> dict[Path, str]:
    """Every file that the results of a checkout give, with its text."""
    folder = root / "benchmarks"
    results = read_results(folder / "results")
    files = {folder / "README.md": page(results)}
    for result in results:
        files.update({folder / "plots" / name: svg for name, _, svg in _plots(result)})
    readme = root / "README.md"
    if readme.is_file():
        try:
            files[readme] = filled(readme.read_text(encoding="utf-8"), results)
        except ValueError as error:
            raise ValueError(f"{readme}: {error}") from None
    return files


def stale(root: Path) -> list[Path]:
    """Files that are not what the results of a checkout give, among them plots that no result gives."""
    files = generated(root)
    wrong = [path for path, text in files.items() if not path.is_file() or path.read_bytes() != text.encode()]
    return wrong + [path for path in sorted((root / "benchmarks" / "plots").glob("*")) if path not in files]


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.report", description="Tables and plots of committed results.")
    parser.add_argument("--check", action="store_true", help="write nothing; fail where a file is not what the results give")
    check = parser.parse_args(argv).check
    try:
        wrong = stale(ROOT)
    except ValueError as error:
        raise SystemExit(f"error: {error}") from None
    if check and wrong:
        names = ", ".join(str(path.relative_to(ROOT)) for path in wrong)
        raise SystemExit(f"error: not what the results give: {names}; run python -m benchmarks.report")
    files = generated(ROOT)
    for path in wrong:
        if path in files:
            path.parent.mkdir(exist_ok=True)
            write_file(path, files[path])
        else:
            path.unlink()
        print(path.relative_to(ROOT))


if __name__ == "__main__":
    main()
