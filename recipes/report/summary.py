"""The figures at the head of a report: how far a run is, its losses, speed and memory."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from recipes.report.curves import Table
from recipes.report.reading import Floats, RunRecord

Fact = tuple[str, str, str]  # name, value, remark


def facts(run: RunRecord, steps: Table) -> list[Fact]:
    """What is known of a run. steps: the run's, with `tokens_seen` and `wall_seconds`."""
    found = [*_progress(run, steps), *_losses(run, steps), *_speed(steps)]
    if run.spikes:
        found.append(("Spikes", f"{len(run.spikes):,}", f"last at step {run.spikes[-1]['step']:,}"))
    if skipped := int(np.nansum(steps.get("skipped", np.zeros(1)))):
        found.append(("Steps without update", f"{skipped:,}", "loss or gradient not finite"))
    return found


def _progress(run: RunRecord, steps: Table) -> Iterator[Fact]:
    if not steps:
        return
    whole = run.settings.get("steps")
    done = int(steps["step"][-1])
    yield "Steps", f"{done:,}", f"of {whole:,}" if isinstance(whole, int) else ""
    epoch = _last(steps, "epoch")
    if (tokens := _last(steps, "tokens_seen")) is not None:
        yield "Tokens", amount(tokens), "" if epoch is None else f"epoch {epoch:.3g}"
    if (seconds := _last(steps, "wall_seconds")) is not None:
        yield "Time", duration(seconds), ""


def _losses(run: RunRecord, steps: Table) -> Iterator[Fact]:
    losses = steps["loss"][np.isfinite(steps["loss"])] if steps else ()
    if len(losses):
        # One step's loss depends on its documents.
        last = min(50, -(-len(losses) // 20))
        yield (
            "Training loss",
            number(float(np.mean(losses[-last:]))),
            f"mean of the last {last} steps" if last > 1 else "last step",
        )
    for name, column in run.evaluations.items():
        if name.startswith("eval/") and name.endswith("/loss") and np.isfinite(column).any():
            best = int(np.nanargmin(column))
            place = f"{name.removeprefix('eval/').removesuffix('/loss')}, step {int(run.evaluations['step'][best]):,}"
            yield "Best held-out loss", number(column[best]), place
    for name, column in run.evaluations.items():
        if name.startswith("eval/") and name.endswith("/rewards/accuracies") and (share := _last_of(column)) is not None:
            place = name.removeprefix("eval/").removesuffix("/rewards/accuracies")
            yield "Held-out accuracy", f"{share:.1%}", f"{place}, last evaluation"


def _speed(steps: Table) -> Iterator[Fact]:
    if (speed := _median(steps, "tokens_per_second")) is not None:
        each = _median(steps, "tokens_per_second_per_gpu")
        several = each is not None and speed > 1.5 * each
        yield "Tokens/s", amount(speed), f"median; {amount(each or speed)} a GPU" if several else "median"
    for name, kind in (("memory_reserved_gib", "GPU, reserved"), ("memory_peak_rss_gib", "process")):
        if name in steps and np.isfinite(steps[name]).any():
            planned = _last(steps, "memory_planned_gib")
            yield (
                "Peak memory",
                f"{np.nanmax(steps[name]):.3g} GiB",
                kind + ("" if planned is None else f"; {planned:.3g} planned"),
            )
    if (share := _median(steps, "of_ceiling")) is not None:
        mfu = _median(steps, "mfu")
        yield "Share of the ceiling", f"{share:.1%}", "median" + ("" if mfu is None else f"; MFU {mfu:.1%}")


def _last(steps: Table, name: str) -> float | None:
    return _last_of(steps[name]) if name in steps else None


def _last_of(column: Floats) -> float | None:
    finite = column[np.isfinite(column)]
    return float(finite[-1]) if len(finite) else None


def _median(steps: Table, name: str) -> float | None:
    finite = steps[name][np.isfinite(steps[name])] if name in steps else ()
    return float(np.median(finite)) if len(finite) else None


def number(value: float) -> str:
    return f"{value:.4f}" if 1e-3 <= abs(value) < 1e4 or value == 0 else f"{value:.3e}"


def amount(value: float) -> str:
    """A count in at most four places: 950, 12.3k, 4.56M."""
    for size, letter in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:.3g}{letter}"
    return f"{value:.3g}"


def duration(seconds: float) -> str:
    """Seconds in the two largest units: 42 s, 3 min 20 s, 2 h 5 min, 1 d 3 h."""
    if seconds < 60:
        return f"{seconds:.3g} s"
    for size, name, part, small in ((86400, "d", 3600, "h"), (3600, "h", 60, "min"), (60, "min", 1, "s")):
        if seconds >= size:
            return f"{int(seconds // size)} {name} {int(seconds % size // part)} {small}"
    raise AssertionError(seconds)
