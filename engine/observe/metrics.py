"""Metrics of a run: a line on the console, metrics.jsonl, TensorBoard, and Weights & Biases.

All ranks call the same methods after the same steps; rank 0 writes. engine/README.md lists every name with its unit.
"""

import contextlib
import importlib.util
import itertools
import json
import math
import resource
import secrets
import statistics
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from tqdm import tqdm

from engine.distributed.ranks import Ranks
from engine.distributed.stragglers import slowest
from engine.observe.line_file import LineFile
from engine.observe.spikes import SpikeLog
from engine.observe.timing import mark, seconds_between
from engine.settings.sections import LogSettings
from model.folder import write_file

# Recent steps whose durations give step_seconds_p50 and step_seconds_p95.
_RECENT_STEPS = 100
# Report the largest value over ranks: it is what training lost.
_LARGEST = frozenset({"data_wait_seconds", "checkpoint_blocked_seconds"})

Line = dict[str, Any]  # a line of metrics.jsonl: name -> value


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
    """Collects step records and writes them every `log.every` steps.

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
        self._sinks: list[_Sink] = _open_sinks(out, settings, facts, self._spikes) if ranks.main else []
        self._refusing: list[_Sink] = []  # that could not write last time
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
        """Take a step's record. Returns True when it was written: every `log.every` steps and at the last step."""
        self._pending.append(record)
        self._marks.append(mark(self._ranks.device))
        self.bar.update()
        due = len(self._pending) == self._settings.every or record.step == self._facts.steps
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
        lines, speed = [_step_line(record) for record in self._pending], self._speed()
        self._write([{**line, **speed} for line in lines])
        self.message(_console_line(lines[-1], speed, self._facts.steps))
        self._pending, self._blocked_seconds = [], 0.0
        self.restart_clock()
        for line in lines:
            self._judge(line)

    def evaluation(self, step: int, values: dict[str, float]) -> None:
        """Write validation values. The time that they took does not count in the training speed."""
        self.flush()
        self._write([{"step": step, **values}])
        text = "  ".join(f"{name.removeprefix('eval/')} {value:.4f}" for name, value in values.items())
        self.message(f"step {step:>6}  held-out  {text}")
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
    def _reported(self, sink: "_Sink") -> Iterator[None]:
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

    def _speed(self) -> Line:
        """Speed, waits and memory of the pending steps, over all ranks."""
        facts, ranks, steps = self._facts, self._ranks.ranks, len(self._pending)
        seconds = time.perf_counter() - self._interval_start
        tokens, trained, flops, recomputed, data_wait = (
            sum(getattr(record, name) for record in self._pending)
            for name in ("tokens", "trained_tokens", "flops", "recomputed_flops", "data_wait")
        )
        self._recent_seconds.extend(itertools.starmap(seconds_between, itertools.pairwise(self._marks)))
        flops_per_gpu, recomputed_per_gpu = flops / seconds / ranks, recomputed / seconds / ranks
        speed = {
            "tokens_per_second": tokens / seconds,
            "tokens_per_second_per_gpu": tokens / seconds / ranks,
            "trained_tokens_per_second": trained / seconds,
            "mfu": None if facts.peak_flops is None else flops_per_gpu / facts.peak_flops,
            "hfu": None if facts.peak_flops is None else (flops_per_gpu + recomputed_per_gpu) / facts.peak_flops,
            "of_ceiling": None if facts.ceiling is None else flops_per_gpu / facts.ceiling,
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
        if speed["of_ceiling"] is not None:
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
    mfu, ceiling = ("n/a" if speed[name] is None else f"{speed[name]:.1%}" for name in ("mfu", "of_ceiling"))
    rewards = "".join(f"  {name} {line[name]:.3f}" for name in ("rewards/margins", "rewards/accuracies") if name in line)
    memory = ""
    if "memory_allocated_gib" in speed:
        memory = f"memory {speed['memory_allocated_gib']:.1f} of {speed['memory_planned_gib']:.1f} GiB planned  "
    left = speed["step_seconds"] * (steps - line["step"])
    return (
        f"step {line['step']:>6}/{steps}  loss {line['loss']:.4f}{rewards}  lr {line['learning_rate']:.2e}  "
        f"grad {line['gradient_norm']:.3f}  {speed['tokens_per_second']:,.0f} tok/s  MFU {mfu}  "
        f"of ceiling {ceiling}  {memory}left {tqdm.format_interval(left)}"
    )


class _Sink(Protocol):
    """A destination of lines, besides the console.

    after_refusal: what becomes of lines that could not be written, in words.
    """

    after_refusal: str

    def write(self, lines: list[Line]) -> None: ...

    def close(self, status: int) -> None: ...


def _open_sinks(out: Path, settings: LogSettings, facts: RunFacts, spikes: SpikeLog | None) -> list[_Sink]:
    kept, file = facts.start, out / "metrics.jsonl"
    sinks: list[_Sink] = [_JsonLines(file, kept)]
    if spikes is not None:
        sinks.append(_Spikes(spikes))
        _drop_lines_after(spikes.file, kept)
        spikes.resume(line["loss"] for line in logged_steps(file) if "skipped" not in line)
    if settings.tensorboard:
        try:
            sinks.append(_TensorBoard(out / "tensorboard", kept))
        except ImportError:
            print("tensorboard is not installed: no event files (pip install tensorboard, or log.tensorboard = false)")
    check_wandb(settings)
    if settings.wandb:
        sinks.append(_WeightsAndBiases(settings.wandb, out, facts))
    return sinks


class _JsonLines:
    after_refusal = "they come with the next ones, once there is room"

    def __init__(self, file: Path, kept: int) -> None:
        _drop_lines_after(file, kept)
        self._file = LineFile(file)

    def write(self, lines: list[Line]) -> None:
        self._file.add(json.dumps({name: _finite(value) for name, value in line.items()}) for line in lines)

    def close(self, status: int) -> None:
        self._file.add()


class _Spikes:
    """Gives spikes that could not be written another chance; `SpikeLog.check` adds them."""

    after_refusal = _JsonLines.after_refusal

    def __init__(self, spikes: SpikeLog) -> None:
        self._spikes = spikes

    def write(self, lines: list[Line]) -> None:
        self._spikes.write()

    def close(self, status: int) -> None:
        self._spikes.write()


def _finite(value: Any) -> Any:
    """JSON has no NaN and no infinity: they become null."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def logged_steps(file: Path) -> Iterator[Line]:
    """The training steps in a metrics.jsonl, without evaluations and without a line that a kill has cut short."""
    for text in file.read_text(encoding="utf-8").splitlines() if file.is_file() else []:
        with contextlib.suppress(json.JSONDecodeError):
            line = json.loads(text)
            if "loss" in line:
                yield line


def was_evaluated(file: Path, step: int) -> bool:
    """Whether a metrics.jsonl holds the validation values of a step, or no longer holds the step itself."""
    lines = [json.loads(text) for text in file.read_text(encoding="utf-8").splitlines()] if file.is_file() else []
    mine = [line for line in lines if line["step"] == step]
    return not mine or any(name.startswith("eval/") for line in mine for name in line)


def _drop_lines_after(file: Path, step: int) -> None:
    """Remove the lines of later steps, and a line that a kill has cut short."""
    if not file.is_file():
        return
    kept = []
    for line in file.read_text(encoding="utf-8").splitlines(keepends=True):
        with contextlib.suppress(json.JSONDecodeError, KeyError, TypeError):
            if json.loads(line)["step"] <= step:
                kept.append(line)
    write_file(file, "".join(kept))


class _TensorBoard:
    """Raises: ImportError when tensorboard is not installed."""

    # Its writing thread ends with the first error.
    after_refusal = "no further TensorBoard events from this process"

    def __init__(self, folder: Path, kept: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(folder), purge_step=kept + 1)

    def write(self, lines: list[Line]) -> None:
        for line in lines:
            for name, value in _numbers(line).items():
                self._writer.add_scalar(name, value, line["step"])

    def close(self, status: int) -> None:
        self._writer.close()


def check_wandb(settings: LogSettings) -> None:
    """Raises: ValueError when `log.wandb` is set and wandb is not installed."""
    if settings.wandb and importlib.util.find_spec("wandb") is None:
        raise ValueError("log.wandb is set but wandb is not installed: pip install wandb, or leave it empty")


class _WeightsAndBiases:
    """The run folder keeps the run's id, so that a resumed run continues the same run of Weights & Biases."""

    after_refusal = "Weights & Biases lacks them"

    def __init__(self, project: str, out: Path, facts: RunFacts) -> None:
        import wandb

        file = out / "wandb-id"
        if facts.start == 0 or not file.is_file():
            write_file(file, secrets.token_hex(8) + "\n")
        self._run = wandb.init(
            project=project,
            id=file.read_text(encoding="utf-8").strip(),
            name=out.name,
            dir=str(out),
            config=facts.config,
            resume="allow",
        )

    def write(self, lines: list[Line]) -> None:
        for line in lines:
            self._run.log(_numbers(line), step=line["step"])

    def close(self, status: int) -> None:
        self._run.finish(exit_code=status)


def _numbers(line: Line) -> Line:
    return {name: value for name, value in line.items() if name != "step" and value is not None}
