"""Metrics of a run: a line on the console, metrics.jsonl, TensorBoard, and Weights & Biases.

All ranks call the same methods after the same steps; rank 0 writes. engine/README.md lists every name with its unit.
"""

import contextlib
import itertools
import math
import resource
import statistics
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from engine.distributed.ranks import Ranks
from engine.distributed.stragglers import slowest
from engine.observe.logged import SAMPLES, Line, done_before
from engine.observe.sinks import Sink, open_sinks
from engine.observe.spikes import SpikeLog
from engine.observe.timing import mark, seconds_between
from engine.settings.sections import LogSettings

# Recent steps whose durations give step_seconds_p50 and step_seconds_p95.
_RECENT_STEPS = 100
# Report the largest value over ranks: it is what training lost.
_LARGEST = frozenset({"data_wait_seconds", "checkpoint_blocked_seconds"})
# Answers of an evaluation that the console shows, and characters of each.
_SHOWN_SAMPLES, _SHOWN_CHARACTERS = 3, 200


@dataclass(eq=False)
class StepRecord:
    """One training step. Its values stay on the device until a log line is due: reading them earlier would stall the host."""

    step: int  # numbered from 1
    learning_rate: float
    values: dict[str, torch.Tensor]  # scalars: loss, gradient_norm, skipped (1 without an update), the objective's own
    tokens: int  # of all ranks, without padding
    trained_tokens: int  # of all ranks; tokens that have a weight in the loss
    flops: int  # of all ranks, without recomputation
    data_wait: float  # seconds that this rank waited for the step's data
    epoch: float = 0.0  # passes over the data so far
    tokens_saved: int | None = None  # tokens that shared prompts saved; None, and not logged, where no prompt can be shared
    recomputed_flops: int = 0  # of all ranks; matrix products that the backward pass repeats


@dataclass(frozen=True)
class RunFacts:
    """Facts about a run that its metrics are reported against."""

    steps: int  # of the whole run
    start: int  # steps done before this process began; 0 for a fresh run
    planned_bytes: int  # planned peak memory of this rank's device
    config: dict[str, Any]  # resolved settings, for Weights & Biases
    peak_flops: float | None = None  # the device's published peak, operations a second; None if unknown
    ceiling: float | None = None  # measured speed of a large matrix product, operations a second; None if unknown
    skip_limit: int = 1  # consecutive non-finite steps that end the run
    lag: float = 0.0  # share of a step's time; a rank that holds the others up for longer is named; 0 names none


class Metrics:
    """Collects step records. Writes them at this process's first step, at each multiple of `log.every`, and at the last step.

    Steps are numbered from 1; the evaluation before the first step is step 0. Lines that an earlier attempt wrote after the
    step this run starts from are removed first.

    A context manager: an error inside ends the run in Weights & Biases as failed.
    Raises: ValueError when `log.wandb` is set and wandb is not installed.
    """

    def __init__(
        self,
        out: Path,  # run folder
        settings: LogSettings,
        ranks: Ranks,
        facts: RunFacts,
        spikes: SpikeLog | None = None,  # records steps whose loss stands out
        waits: Callable[[], float] = lambda: 0.0,  # seconds this rank waited for other ranks since the last call
    ) -> None:
        self._settings, self._ranks, self._facts, self._waits = settings, ranks, facts, waits
        self._spikes = spikes if ranks.main else None
        self._sinks: list[Sink] = []
        if ranks.main:
            self._sinks = open_sinks(out, settings, start=facts.start, config=facts.config, spikes=self._spikes)
        self._seconds_before, self._tokens = done_before(out / "metrics.jsonl") if ranks.main else (0.0, 0)
        self._begun = time.perf_counter()
        self._refusing: list[Sink] = []  # that could not write last time
        self._pending: list[StepRecord] = []
        self._recent_seconds: deque[float] = deque(maxlen=_RECENT_STEPS)
        self._blocked_seconds, self._skipped_in_a_row = 0.0, 0
        self.restart_clock()
        self.bar = tqdm(
            total=facts.steps,
            initial=facts.start,
            unit="step",
            disable=None if ranks.main else True,
            dynamic_ncols=True,
            smoothing=0.05,
        )

    def step(self, record: StepRecord) -> bool:
        """Take a step's record. Returns True when it was written."""
        self._pending.append(record)
        self._marks.append(mark(self._ranks.device))
        self.bar.update()
        due = record.step % self._settings.every == 0 or record.step in (self._facts.start + 1, self._facts.steps)
        if due:
            self.flush()
        return due

    def flush(self) -> None:
        """Write the pending steps. All ranks call this after the same step and leave it with the same error.

        Raises: FloatingPointError naming the step when `skip_limit` steps in a row had a loss or gradient norm that is not
            finite. The step is written before.
        """
        if not self._pending:
            # Lines that a full disk has refused get another chance before a checkpoint counts their steps as done.
            self._write([])
            return
        if self._ranks.device.type == "cuda":
            # The pending values are computed before the last update is; wait for the update to time it.
            self._marks[-1].synchronize()
        lines = [_step_line(record) for record in self._pending]
        seconds = list(itertools.starmap(seconds_between, itertools.pairwise(self._marks)))
        speed = self._speed(seconds)
        self._add_sums(lines, seconds)
        self._write([{**line, **speed} for line in lines])
        self.message(_console_line(lines[-1], speed, self._facts.steps))
        self._pending, self._blocked_seconds = [], 0.0
        self.restart_clock()
        for line in lines:
            self._judge(line)

    def evaluation(
        self,
        step: int,
        values: dict[str, float],  # held-out values and scores of tasks, by their names in the log
        samples: Sequence[dict[str, str]] = (),  # each with `prompt` and `answer`
    ) -> None:
        """Write an evaluation. Flush before it begins: then its time does not count in the training speed."""
        self.flush()
        lines: list[Line] = [{"step": step, **values}] if values else []
        self._write([*lines, {"step": step, SAMPLES: [*samples]}] if samples else lines)
        for kind, title in (("eval/", "held-out"), ("scores/", "scores")):
            found = {name.removeprefix(kind): value for name, value in values.items() if name.startswith(kind)}
            if found:
                self.message(f"step {step:>6}  {title}  " + "  ".join(f"{name} {value:.4f}" for name, value in found.items()))
        for sample in samples[:_SHOWN_SAMPLES]:
            self.message(f"step {step:>6}  sample  {_shown(sample['prompt'])} -> {_shown(sample['answer']) or '(nothing)'}")
        self.restart_clock()

    def message(self, text: str) -> None:
        """Print a line from rank 0 without tearing the progress bar."""
        if not self._ranks.main:
            return
        try:
            self.bar.write(text, file=sys.stdout)
        except BrokenPipeError:
            raise
        except OSError:
            # The console may be a file on a disk that is full now.
            pass

    @contextlib.contextmanager
    def saving(self) -> Iterator[None]:
        """Count the time inside as checkpoint_blocked_seconds and not in the training speed."""
        start = time.perf_counter()
        yield
        self._blocked_seconds += time.perf_counter() - start
        self.restart_clock()

    def restart_clock(self) -> None:
        """Start timing anew: evaluation and checkpoints do not count in the training speed."""
        self._interval_start, self._marks = time.perf_counter(), [mark(self._ranks.device)]

    def __enter__(self) -> "Metrics":
        return self

    def __exit__(self, _kind: type[BaseException] | None, error: BaseException | None, _traceback: object) -> None:
        status = 0 if error is None else 1
        if isinstance(error, SystemExit) and isinstance(error.code, int):
            status = error.code
        self.close(status)

    def close(self, status: int = 0) -> None:
        """Close the files. status: of the run; not 0 where it failed or was stopped."""
        self.bar.close()
        for sink in self._sinks:
            with self._reported(sink):
                sink.close(status)

    def _write(self, lines: list[Line]) -> None:
        for sink in self._sinks:
            with self._reported(sink):
                sink.write(lines)

    @contextlib.contextmanager
    def _reported(self, sink: Sink) -> Iterator[None]:
        """A sink that cannot write, as on a full disk, is reported once and does not end the run."""
        try:
            yield
        except OSError as error:
            if sink not in self._refusing:
                self._refusing.append(sink)
                self.message(f"metrics could not be written: {error}; {sink.after_refusal}")
        else:
            if sink in self._refusing:
                self._refusing.remove(sink)

    def _judge(self, line: Line) -> None:
        """Report a step that is not finite or stands out. Raises: FloatingPointError at the limit of `flush`."""
        what = f"step {line['step']}: loss {line['loss']}, gradient norm {line['gradient_norm']}"
        self._skipped_in_a_row = self._skipped_in_a_row + 1 if "skipped" in line else 0
        if "skipped" in line:
            self.message(f"{what}: not finite, no update")
        spike = self._spikes.check(line) if self._spikes is not None else None
        if spike:
            self.message(spike)
        if self._skipped_in_a_row == self._facts.skip_limit:
            raise FloatingPointError(
                f"{what}: training stopped. The weights are from before this step, and no checkpoint holds it. Resuming "
                "would repeat it: check the data, pass over it (optimizer.nonfinite = skip), or branch off an earlier "
                "checkpoint (from) with a lower learning rate (schedule.peak)"
            )

    def _add_sums(self, lines: list[Line], seconds: list[float]) -> None:
        """Add what each pending step has in sum since the run's first start. seconds: that each step took."""
        now = self._seconds_before + time.perf_counter() - self._begun
        for number, (line, record) in enumerate(zip(lines, self._pending, strict=True), 1):
            self._tokens += record.tokens
            line.update(wall_seconds=now - sum(seconds[number:]), tokens_seen=self._tokens, epoch=record.epoch)

    def _speed(self, step_seconds: list[float]) -> Line:
        """Speed, waits and memory of the pending steps, over all ranks. Values that are not known are left out."""
        facts, ranks, steps = self._facts, self._ranks.ranks, len(self._pending)
        seconds = time.perf_counter() - self._interval_start
        tokens, trained, flops, recomputed, data_wait = (
            sum(getattr(record, name) for record in self._pending)
            for name in ("tokens", "trained_tokens", "flops", "recomputed_flops", "data_wait")
        )
        self._recent_seconds.extend(step_seconds)
        flops_per_gpu, recomputed_per_gpu = flops / seconds / ranks, recomputed / seconds / ranks
        shares: Line = {}
        if facts.peak_flops is not None:
            shares["mfu"] = flops_per_gpu / facts.peak_flops
            shares["hfu"] = (flops_per_gpu + recomputed_per_gpu) / facts.peak_flops
        if facts.ceiling is not None:
            shares["of_ceiling"] = flops_per_gpu / facts.ceiling
        speed = {
            "tokens_per_second": tokens / seconds,
            "tokens_per_second_per_gpu": tokens / seconds / ranks,
            "trained_tokens_per_second": trained / seconds,
            **shares,
            "step_seconds": seconds / steps,
            "step_seconds_p50": statistics.median(self._recent_seconds),
            "step_seconds_p95": sorted(self._recent_seconds)[math.ceil(0.95 * len(self._recent_seconds)) - 1],
            "data_wait_seconds": data_wait / steps,
            "checkpoint_blocked_seconds": self._blocked_seconds,
            **_memory(self._ranks.device),
            "memory_planned_gib": facts.planned_bytes / 2**30,
        }
        waited = self._waits() / steps
        if self._ranks.mesh is not None:
            speed["rank_wait_seconds"] = self._over_ranks(speed, waited)
        return speed

    def _over_ranks(self, speed: Line, waited: float) -> float:
        """Replace memory and waits by the largest over ranks, and `of_ceiling` by the share of the mean ceiling.

        Names a rank that holds the others up. Args: waited: seconds a step that this rank waited for others.
        Returns: the largest such wait of any rank.
        """
        names = [name for name in speed if name.startswith("memory_") or name in _LARGEST]
        mine = [*(speed[name] for name in names), self._facts.ceiling or 0.0, waited]
        table = torch.zeros(self._ranks.ranks, len(mine), dtype=torch.float64)
        table[self._ranks.rank] = torch.tensor(mine, dtype=torch.float64)
        *columns, ceilings, waits = self._ranks.sum_(table).T.tolist()
        speed.update({name: max(column) for name, column in zip(names, columns, strict=True)})
        if "of_ceiling" in speed:
            speed["of_ceiling"] *= (self._facts.ceiling or 0.0) / statistics.mean(ceilings)
        rank, lead = slowest(waits)
        if self._facts.lag and lead > self._facts.lag * speed["step_seconds"]:
            self.message(
                f"rank {rank} is the slowest: the others wait {lead:.2f} s for it in a step of {speed['step_seconds']:.2f} s"
            )
        return max(waits)


def _step_line(record: StepRecord) -> Line:
    """A step's values, read from the device."""
    values = {name: float(value) for name, value in record.values.items()}
    if not values.get("skipped"):
        values.pop("skipped", None)
    saved = {} if record.tokens_saved is None else {"tokens_saved": record.tokens_saved}
    return {"step": record.step, "learning_rate": record.learning_rate, "tokens": record.tokens, **saved, **values}


def _memory(device: torch.device) -> dict[str, float]:
    if device.type == "cuda":
        return {
            "memory_allocated_gib": torch.cuda.max_memory_allocated() / 2**30,
            "memory_reserved_gib": torch.cuda.max_memory_reserved() / 2**30,
        }
    # Linux counts in KiB.
    return {"memory_peak_rss_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20}


def _console_line(line: Line, speed: Line, steps: int) -> str:
    left = speed["step_seconds"] * (steps - line["step"])
    parts = [
        f"step {line['step']:>6}/{steps}",
        f"loss {line['loss']:.4f}",
        *(f"{name} {line[name]:.3f}" for name in ("rewards/margins", "rewards/accuracies") if name in line),
        f"lr {line['learning_rate']:.2e}",
        f"grad {line['gradient_norm']:.3f}",
        f"{speed['tokens_per_second']:,.0f} tok/s",
        *(f"{title} {speed[name]:.1%}" for title, name in (("MFU", "mfu"), ("of ceiling", "of_ceiling")) if name in speed),
    ]
    if "memory_allocated_gib" in speed:
        parts.append(f"memory {speed['memory_allocated_gib']:.1f} of {speed['memory_planned_gib']:.1f} GiB planned")
    return "  ".join([*parts, f"left {tqdm.format_interval(left)}"])


def _shown(text: str) -> str:
    """A text on one line, cut to what a console line holds."""
    line = " ".join(text.split())
    return line if len(line) <= _SHOWN_CHARACTERS else f"{line[:_SHOWN_CHARACTERS]}..."
