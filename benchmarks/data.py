"""Whether data keep up: the time to make a step's micro-batches, and a step's wait for them.

    python -m benchmarks.data --step-seconds 0.1 1

Documents have random tokens and log-normal lengths. "waiting_share" is the share of a step that is spent waiting for its
micro-batches where the step itself takes `step_seconds` without the processor.
"""

import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from benchmarks.command import benchmark, check_least
from benchmarks.measure import spread
from benchmarks.own import SETTINGS, open_job
from benchmarks.results import Result, table
from benchmarks.train import TrainBenchSettings, make_job
from engine.environment import choose_device
from engine.run import Run

COLUMNS = "objective step_seconds seconds tokens_per_second wait_seconds first_wait_seconds waiting_share".split()


@dataclass(frozen=True, kw_only=True)
class DataSettings:
    """What to measure."""

    sequence: int = 4096
    """Places of the longest document (of each side of a pair)."""
    accumulate: int = 32
    """Micro-batches of a step."""
    steps: int = 10
    """Steps that are made."""
    step_seconds: tuple[float, ...] = (0.1, 1.0)
    """Times of a step for which the wait is measured."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where micro-batches go."""
    out: str = ""
    """Result file; default: print only."""

    def __post_init__(self) -> None:
        check_least(self, sequence=2, accumulate=1, steps=2, step_seconds=0)


def run(settings: DataSettings, command: str = "benchmarks.data.run") -> dict[str, Any]:
    """Measure, print a table; returns the result."""
    device = choose_device(settings.device)
    result = Result("data", command, device, settings)
    for objective in SETTINGS:
        with tempfile.TemporaryDirectory(prefix="komainu-") as folder:
            point = TrainBenchSettings(
                preset="small",
                objective=objective,  # type: ignore[arg-type]
                sequence=settings.sequence,
                accumulate=settings.accumulate,
                documents="mixed",
                dtype="float32",
                rounds=settings.steps,
            )
            opened = open_job(make_job(point, device, Path(folder)))
            result.add({"objective": objective, **making(opened, settings.steps)})
            for step_seconds in settings.step_seconds:
                result.add({"objective": objective, **waiting(opened, settings.steps, step_seconds)})
    print(table(result.rows, COLUMNS), flush=True)
    return result.finish()


def making(opened: Run, steps: int) -> dict[str, Any]:
    """Seconds of each step's making, and tokens a second."""
    seconds, tokens = [], 0
    for index in range(steps):
        start = time.perf_counter()
        tokens += opened.step(index).tokens
        seconds.append(time.perf_counter() - start)
    return {"seconds": spread(seconds), "tokens_per_second": tokens / sum(seconds)}


def waiting(opened: Run, steps: int, step_seconds: float) -> dict[str, Any]:
    """The wait for each step where a step takes `step_seconds`."""
    waits, stream = [], opened.stream()
    for _ in range(steps):
        start = time.perf_counter()
        next(stream)
        waits.append(time.perf_counter() - start)
        time.sleep(step_seconds)
    stream.close()
    first, *steady = waits
    share = sum(steady) / max(sum(steady) + len(steady) * step_seconds, 1e-12)
    found = {"wait_seconds": spread(steady), "first_wait_seconds": first, "waiting_share": share}
    return {"step_seconds": str(step_seconds), **found}


def main(argv: Sequence[str] | None = None) -> None:
    benchmark(DataSettings, run, "data", argv)


if __name__ == "__main__":
    main()
