"""Train the same runs in float32, bfloat16 and FP8, and compare their held-out losses.

    python -m recipes.precision_comparison recipes/tiny/base.toml recipes/tiny/cpt.toml recipes/tiny/sft1.toml \\
        recipes/tiny/sft2.toml recipes/tiny/dpo.toml --fp8.bf16-first 0 --fp8.bf16-last 0

Each configuration is a training recipe's, with `heldout`; dotted overrides for all of them may follow. A run whose folder is
there is continued, or read where it is finished. OUT/comparison.json has every loss, OUT/comparison.svg the differences to
float32.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from engine.settings.training import TrainSettings
from model.folder import write_file
from recipes import dpo, pretrain, sft
from recipes.drawing import new_figure, save_figure
from recipes.plan import settings_of

# Name -> the settings that it changes. The first is compared with.
PRECISIONS: dict[str, tuple[str, ...]] = {
    "float32": ("--dtype", "float32", "--precision", "dtype"),
    "bfloat16": ("--dtype", "bfloat16", "--precision", "dtype"),
    "fp8": ("--dtype", "bfloat16", "--precision", "fp8"),
}
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


def compare(configs: Sequence[str], overrides: Sequence[str], seeds: Sequence[int], out: Path) -> dict[str, Any]:
    """Train every configuration in every precision with every seed. The result is written after each run.

    Returns: configuration -> precision -> the losses, in the order of the seeds.
    """
    losses: dict[str, dict[str, list[float]]] = {}
    for config in configs:
        name = Path(config).stem
        losses[name] = {precision: [] for precision in PRECISIONS}
        for seed in seeds:
            for precision, changes in PRECISIONS.items():
                run = ("--out", str(out / f"{name}-{precision}-{seed}"), "--seed", str(seed), *changes)
                settings = settings_of(config, [*overrides, *run])
                losses[name][precision].append(train_one(settings))
                result = {"seeds": list(seeds), "losses": losses, "differences": differences(losses)}
                write_file(out / "comparison.json", json.dumps(result, indent=1) + "\n")
    return losses


def differences(losses: dict[str, dict[str, list[float]]]) -> dict[str, dict[str, list[float]]]:
    """Each loss over the loss of float32 with the same seed, minus 1."""
    base = next(iter(PRECISIONS))
    return {
        name: {
            precision: [loss / exact - 1 for loss, exact in zip(found[precision], found[base], strict=False)]
            for precision in list(PRECISIONS)[1:]
        }
        for name, found in losses.items()
    }


def lines_of(losses: dict[str, dict[str, list[float]]]) -> list[str]:
    """The losses and differences as text, one line a configuration and precision."""
    found = differences(losses)
    lines = [f"{'run':<16}{'precision':<12}{'held-out loss':>14}{'difference to float32, mean':>29}{'largest':>10}"]
    for name, of_precision in losses.items():
        for precision, values in of_precision.items():
            line = f"{name:<16}{precision:<12}{statistics.fmean(values):>14.4f}"
            if precision in found[name]:
                changes = found[name][precision]
                line += f"{statistics.fmean(changes):>+29.3%}{max(changes, key=abs):>+10.3%}"
            lines.append(line)
    return lines


def draw(losses: dict[str, dict[str, list[float]]], file: Path) -> None:
    """The difference of each run to float32, a point a seed, between the lines of the target."""
    figure = new_figure(7.0, 3.6)
    if figure is None:
        return
    axes = figure.add_subplot(ylabel="held-out loss, difference to float32, %")
    found, precisions = differences(losses), list(PRECISIONS)[1:]
    for column, precision in enumerate(precisions):
        places = [row + 0.3 * column - 0.15 for row, name in enumerate(found) for _ in found[name][precision]]
        values = [100 * value for of_run in found.values() for value in of_run[precision]]
        axes.plot(places, values, "o", label=precision)
    for level in (-TARGET, TARGET):
        axes.axhline(100 * level, color="#a9b4bd", linestyle="--")
    axes.axhline(0, color="#a9b4bd")
    axes.set_xticks(range(len(found)), labels=list(found))
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
    arguments, overrides = parser.parse_known_args(argv)
    arguments.out.mkdir(parents=True, exist_ok=True)
    try:
        losses = compare(arguments.configs, overrides, arguments.seeds, arguments.out)
    except (ValueError, OSError) as error:
        raise SystemExit(f"error: {error}") from None
    draw(losses, arguments.out / "comparison.svg")
    print("\n".join(lines_of(losses)))


if __name__ == "__main__":
    main()
