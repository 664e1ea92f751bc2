"""Train the same runs in float32, bfloat16 and FP8, and compare their held-out losses.

    python -m recipes.precision_comparison recipes/tiny/base.toml recipes/tiny/cpt.toml recipes/tiny/sft1.toml \\
        recipes/tiny/sft2.toml recipes/tiny/dpo.toml --fp8.bf16-first 0 --fp8.bf16-last 0

Each configuration is a training recipe's, with `heldout`; dotted overrides for all of them may follow. "faster" is float32 once
more, with a learning rate one per cent higher: where so small a change moves the loss as far as a precision does, the run
cannot tell that precision from float32. A run whose folder is there is continued, or read where it is finished.
OUT/comparison.json has every loss, the differences to float32, the commit and the versions; OUT/comparison.svg draws the
differences.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import shlex
import statistics
import sys
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from engine.settings.toml import read_table
from engine.settings.training import TrainSettings
from model.folder import write_file
from recipes import dpo, pretrain, sft
from recipes.drawing import new_figure, save_figure
from recipes.plan import settings_of

# Name -> the settings that it changes. The others are compared with the first.
PRECISIONS: dict[str, tuple[str, ...]] = {
    "float32": ("--dtype", "float32", "--precision", "dtype"),
    "faster": ("--dtype", "float32", "--precision", "dtype"),
    "bfloat16": ("--dtype", "bfloat16", "--precision", "dtype"),
    "fp8": ("--dtype", "bfloat16", "--precision", "fp8"),
}
EXACT, FASTER = list(PRECISIONS)[:2]
_FASTER = 1.01  # times the learning rate
# The largest difference of a held-out loss that FP8 is meant to make.
TARGET = 0.005


def train_one(settings: TrainSettings) -> float:
    """Train, or read a finished run: the mean over the held-out sets of the last evaluation's losses.

    Raises: ValueError where the run evaluates nothing.
    """
    if not settings.heldout:
        raise ValueError(f"{settings.out}: heldout is empty: name prepared folders to compare losses on")
    if isinstance(settings, dpo.DpoSettings):
        dpo.run(settings)
    elif isinstance(settings, sft.SftSettings):
        sft.run(settings)
    else:
        assert isinstance(settings, pretrain.PretrainSettings)
        pretrain.run(settings)
    lines = [json.loads(line) for line in (Path(settings.out) / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    found = [[value for name, value in line.items() if name.startswith("eval/") and name.endswith("/loss")] for line in lines]
    return statistics.fmean([losses for losses in found if losses][-1])


def compare(
    configs: Sequence[str],
    overrides: Sequence[str],
    seeds: Sequence[int],
    out: Path,
    origin: Mapping[str, Any],  # where the result comes from
) -> list[dict[str, Any]]:
    """Train every configuration in every precision with every seed; `out`/comparison.json is written anew after each run.

    Returns: `rows_of` the losses.
    """
    losses: dict[str, dict[str, list[float]]] = {}
    tables: dict[str, Any] = {}
    settings = {"seeds": list(seeds), "overrides": list(overrides), "configurations": tables}
    rows: list[dict[str, Any]] = []
    for config in configs:
        name = Path(config).stem
        losses[name] = {precision: [] for precision in PRECISIONS}
        tables[name] = read_table(Path(config))
        for seed in seeds:
            for precision, changes in PRECISIONS.items():
                run = ("--out", str(out / f"{name}-{precision}-{seed}"), "--seed", str(seed), *changes)
                chosen = settings_of(config, [*overrides, *run])
                if precision == FASTER:
                    schedule = dataclasses.replace(chosen.schedule, peak=chosen.schedule.peak * _FASTER)
                    chosen = dataclasses.replace(chosen, schedule=schedule)
                losses[name][precision].append(train_one(chosen))
                rows = rows_of(losses)
                complete = len(losses) == len(configs) and all(len(of) == len(seeds) for of in losses[name].values())
                content = {**origin, "settings": settings, "complete": complete, "rows": rows}
                write_file(out / "comparison.json", json.dumps(content, indent=1) + "\n")
    return rows


def rows_of(losses: Mapping[str, Mapping[str, Sequence[float]]]) -> list[dict[str, Any]]:
    """A row for each configuration and precision: its losses by seed, their mean, and the differences to float32.

    A difference is a loss over the loss of float32 with the same seed, minus 1. The largest has the largest absolute value.
    """
    rows: list[dict[str, Any]] = []
    for name, of_precision in losses.items():
        exact = of_precision[EXACT]
        for precision, values in of_precision.items():
            if not values:
                continue
            row: dict[str, Any] = {
                "run": name,
                "precision": precision,
                "losses": list(values),
                "loss": statistics.fmean(values),
            }
            if precision != EXACT:
                changes = [loss / base - 1 for loss, base in zip(values, exact, strict=False)]
                row |= {"differences": changes, "difference": statistics.fmean(changes), "largest": max(changes, key=abs)}
            rows.append(row)
    return rows


def lines_of(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """The rows as text."""
    lines = [f"{'run':<16}{'precision':<12}{'held-out loss':>14}{'difference to float32, mean':>29}{'largest':>10}"]
    for row in rows:
        line = f"{row['run']:<16}{row['precision']:<12}{row['loss']:>14.4f}"
        if "difference" in row:
            line += f"{row['difference']:>+29.3%}{row['largest']:>+10.3%}"
        lines.append(line)
    return lines


def draw(rows: Sequence[Mapping[str, Any]], file: Path) -> None:
    """The difference of each run to float32, a point a seed, between the lines of the target."""
    figure = new_figure(7.0, 3.6)
    if figure is None:
        return
    axes = figure.add_subplot(ylabel="held-out loss, difference to float32, %")
    names = list(dict.fromkeys(row["run"] for row in rows))
    for column, precision in enumerate(list(PRECISIONS)[1:]):
        shown = [row for row in rows if row["precision"] == precision]
        places = [names.index(row["run"]) + 0.2 * (column - 1) for row in shown for _ in row["differences"]]
        axes.plot(places, [100 * value for row in shown for value in row["differences"]], "o", label=precision)
    for level in (-TARGET, TARGET):
        axes.axhline(100 * level, color="#a9b4bd", linestyle="--")
    axes.axhline(0, color="#a9b4bd")
    axes.set_xticks(range(len(names)), labels=names)
    axes.legend()
    save_figure(figure, file)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m recipes.precision_comparison",
        description=__doc__,
        formatter_class=argparse.RawTextHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("configs", nargs="+", help="TOML files of training recipes")
    parser.add_argument("--out", type=Path, default=Path("runs/precision"), help="folder of the runs (default %(default)s)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="default 0 1 2")
    given = sys.argv[1:] if argv is None else list(argv)
    arguments, overrides = parser.parse_known_args(given)
    try:
        for config in arguments.configs:
            read_table(Path(config))
        # Loads torch: not before the configurations are known to be there.
        from engine.environment import choose_device, commit, machine

        arguments.out.mkdir(parents=True, exist_ok=True)
        origin = {
            "benchmark": "precision",
            "command": shlex.join(["python", "-m", "recipes.precision_comparison", *given]),
            "when": datetime.now(UTC).isoformat(timespec="seconds"),
            "commit": commit(),
            "machine": machine(choose_device("auto")),
        }
        rows = compare(arguments.configs, overrides, arguments.seeds, arguments.out, origin)
    except (ValueError, OSError) as error:
        raise SystemExit(f"error: {error}") from None
    draw(rows, arguments.out / "comparison.svg")
    print("\n".join(lines_of(rows)))


if __name__ == "__main__":
    main()
