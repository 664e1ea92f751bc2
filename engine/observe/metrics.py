"""Metrics of a run: a line on the console, metrics.jsonl, TensorBoard, and Weights & Biases where installed."""

import contextlib
import itertools
import json
import math
import resource
import statistics
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from engine.distributed.ranks import Ranks
from engine.distributed.stragglers import slowest
from engine.observe.spikes import SpikeLog
from engine.observe.timing import mark, seconds_between
from engine.settings.sections import LogSettings
from model.folder import write_file

# Steps that the quantiles of their time are of.
_LATEST = 100
# Of the ranks' seconds the largest is what training has lost.
_LARGEST = frozenset({"data_wait_seconds", "checkpoint_blocked_seconds"})


@dataclass
class StepRecord:
    """One step, its values still on the device: reading them would make the host wait for it.

    tokens: places that were computed, which the speed counts; padding is none. tokens_saved: places more that pairs would have
    taken without sharing their prompts; None where nothing could be shared, and then it is not written. flops: of the whole
    step; recomputed_flops: of products that the backward pass makes again, which are none of those.
    """

    step: int
    learning_rate: float
    values: dict[str, torch.Tensor]
    tokens: int
    trained_tokens: int
    flops: int
    data_wait: float
    tokens_saved: int | None = None
    recomputed_flops: int = 0


class Metrics:
    """Writes what a run reports. Steps are numbered from 1 by updates done; evaluation before the first step is step 0.

    Args: ceiling: operations a second of a large product, as measured on this rank's device; None for unknown. spikes: where
        steps that stand out are noted. waits: gives the seconds that this rank has waited for others since the last call, for
        `lag` (see `GuardSettings`).
    """

    def __init__(
        self, out: Path, settings: LogSettings, *, steps: int, start: int, peak_flops: float | None, config: dict[str, Any],
        ranks: Ranks, planned_bytes: int, skip_limit: int = 1, ceiling: float | None = None, spikes: SpikeLog | None = None,
        waits: Callable[[], float] = lambda: 0.0, lag: float = 0.0,
    ) -> None:  # fmt: skip
        self.settings, self.steps, self.peak_flops = settings, steps, peak_flops
        self._ranks, self._skip_limit, self._skipped_in_a_row = ranks, skip_limit, 0
        self._planned_bytes, self._ceiling, self._spikes, self._waits, self._lag = planned_bytes, ceiling, spikes, waits, lag
        self._file = out / "metrics.jsonl"
        self._writer = self._wandb = None
        if ranks.main:
            # A fresh run evaluates before its first step, so nothing that an earlier attempt left counts, not even step 0.
            kept = start if start else -1
            _drop_lines_after(self._file, kept)
            if spikes is not None:
                _drop_lines_after(spikes.file, kept)
                spikes.resume(line["loss"] for line in logged_steps(self._file) if "skipped" not in line)
            if settings.tensorboard:
                self._writer = SummaryWriter(str(out / "tensorboard"), purge_step=kept + 1)
            if settings.wandb:
                self._wandb = _start_wandb(settings.wandb, out, config)
        self._pending: list[StepRecord] = []
        self._saving = 0.0
        self._latest: deque[float] = deque(maxlen=_LATEST)
        self.restart_clock()
        self.bar = tqdm(
            total=steps, initial=start, unit="step", disable=None if ranks.main else True, dynamic_ncols=True, smoothing=0.05
        )

    def step(self, record: StepRecord) -> bool:
        """Take a step's values; written every `log.every` steps and at the last. Returns: whether they were written."""
        self._pending.append(record)
        self._marks.append(mark(self._ranks.device))
        self.bar.update()
        due = len(self._pending) == self.settings.every or record.step == self.steps
        if due:
            self.flush()
        return due

    def flush(self) -> None:
        """Write the pending steps.

        Every rank comes here after the same step, and all of them leave by the same error.

        Raises: FloatingPointError naming the first step whose loss or gradient norm is not finite, or with skipping allowed the
            last of `skip_limit` such steps in a row; that step is written too.
        """
        if not self._pending:
            return
        if self._ranks.device.type == "cuda":
            # The step's last values are known before its last update has been made.
            self._marks[-1].synchronize()
        lines = [_step_line(record) for record in self._pending]
        seconds = time.perf_counter() - self._interval_start
        speed, waits = self._speed(seconds), self._waits()
        if self._ranks.mesh is not None:
            speed["rank_wait_seconds"] = self._over_ranks(speed, waits / len(lines))
        self._write([{**line, **speed} for line in lines])
        self._print(lines[-1], speed)
        self._pending, self._saving = [], 0.0
        self.restart_clock()
        for line in lines:
            self._skipped_in_a_row = self._skipped_in_a_row + 1 if "skipped" in line else 0
            if "skipped" in line:
                self.message(
                    f"step {line['step']}: loss {line['loss']}, gradient norm {line['gradient_norm']}: not finite, no update"
                )
            remark = self._spikes.look(line) if self._spikes is not None and self._ranks.main else None
            if remark:
                self.message(remark)
            if self._skipped_in_a_row == self._skip_limit:
                raise FloatingPointError(
                    f"step {line['step']}: loss {line['loss']}, gradient norm {line['gradient_norm']}: training stopped, "
                    "the weights are those from before it, and no checkpoint holds this step. Resuming would repeat it: look "
                    "at the data, or start a run in another out with a lower learning rate (schedule.peak), from an earlier "
                    "checkpoint if there is one"
                )

    def evaluation(self, step: int, values: dict[str, float]) -> None:
        """Write held-out values; their time is not counted in the speed of training."""
        self.flush()
        self._write([{"step": step, **values}])
        text = "  ".join(f"{name.removeprefix('eval/')} {value:.4f}" for name, value in values.items())
        self.message(f"step {step:>6}  held-out  {text}")
        self.restart_clock()

    def message(self, text: str) -> None:
        """A line on the console, of rank 0, that does not tear the progress bar."""
        if self._ranks.main:
            self.bar.write(text, file=sys.stdout)

    @contextlib.contextmanager
    def saving(self) -> Iterator[None]:
        """The seconds within are those that a checkpoint holds training up, and none of its speed."""
        start = time.perf_counter()
        yield
        self._saving += time.perf_counter() - start
        self.restart_clock()

    def restart_clock(self) -> None:
        """Do not count the time since the last log line: evaluation and checkpoints are no training."""
        self._interval_start, self._marks = time.perf_counter(), [mark(self._ranks.device)]

    def close(self) -> None:
        self.bar.close()
        if self._writer is not None:
            self._writer.close()
        if self._wandb is not None:
            self._wandb.finish()

    def _speed(self, seconds: float) -> dict[str, Any]:
        ranks = self._ranks.ranks
        flops = sum(record.flops for record in self._pending) / seconds / ranks
        recomputed = sum(record.recomputed_flops for record in self._pending) / seconds / ranks
        self._latest.extend(itertools.starmap(seconds_between, itertools.pairwise(self._marks)))
        tokens = sum(record.tokens for record in self._pending) / seconds
        return {
            "tokens_per_second": tokens,
            "tokens_per_second_per_gpu": tokens / ranks,
            "trained_tokens_per_second": sum(record.trained_tokens for record in self._pending) / seconds,
            "mfu": None if self.peak_flops is None else flops / self.peak_flops,
            "hfu": None if self.peak_flops is None else (flops + recomputed) / self.peak_flops,
            "of_ceiling": None if self._ceiling is None else flops / self._ceiling,
            "step_seconds": seconds / len(self._pending),
            "step_seconds_p50": statistics.median(self._latest),
            "step_seconds_p95": sorted(self._latest)[math.ceil(0.95 * len(self._latest)) - 1],
            "data_wait_seconds": sum(record.data_wait for record in self._pending) / len(self._pending),
            "checkpoint_blocked_seconds": self._saving,
            **_memory(),
            "memory_planned_gib": self._planned_bytes / 2**30,
        }

    def _over_ranks(self, speed: dict[str, Any], waits: float) -> float:
        """Make the memory and the waits of a log line the largest of all ranks, and name a rank that holds the others up.

        Args: waits: seconds a step that this rank has waited for others. Returns: the most that one has.
        """
        names = [name for name in speed if name.startswith("memory_") or name in _LARGEST]
        table = torch.zeros(self._ranks.ranks, len(names) + 2, dtype=torch.float64)
        table[self._ranks.rank] = torch.tensor(
            [*(speed[name] for name in names), self._ceiling or 0.0, waits], dtype=torch.float64
        )
        *columns, ceilings, everyone = self._ranks.sum_(table).T.tolist()
        speed.update({name: max(column) for name, column in zip(names, columns, strict=True)})
        if speed["of_ceiling"] is not None:
            speed["of_ceiling"] *= (self._ceiling or 0.0) / statistics.mean(ceilings)
        rank, lead = slowest(everyone)
        if self._lag and lead > self._lag * speed["step_seconds"]:
            self.message(
                f"rank {rank} is the slowest: the others wait {lead:.2f} s for it in a step of {speed['step_seconds']:.2f} s"
            )
        return max(everyone)

    def _print(self, line: dict[str, Any], speed: dict[str, Any]) -> None:
        mfu, ceiling = ("n/a" if speed[name] is None else f"{speed[name]:.1%}" for name in ("mfu", "of_ceiling"))
        rewards = "".join(f"  {name} {line[name]:.3f}" for name in ("rewards/margins", "rewards/accuracies") if name in line)
        left = speed["step_seconds"] * (self.steps - line["step"])
        memory = ""
        if "memory_allocated_gib" in speed:
            memory = f"memory {speed['memory_allocated_gib']:.1f} of {speed['memory_planned_gib']:.1f} GiB planned  "
        self.message(
            f"step {line['step']:>6}/{self.steps}  loss {line['loss']:.4f}{rewards}  lr {line['learning_rate']:.2e}  "
            f"grad {line['gradient_norm']:.3f}  {speed['tokens_per_second']:,.0f} tok/s  MFU {mfu}  "
            f"of ceiling {ceiling}  {memory}left {tqdm.format_interval(left)}"
        )

    def _write(self, lines: list[dict[str, Any]]) -> None:
        if not self._ranks.main:
            return
        with self._file.open("a", encoding="utf-8") as file:
            # JSON has no NaN; a value that is not finite is null there.
            file.writelines(json.dumps({name: _finite(value) for name, value in line.items()}) + "\n" for line in lines)
        for line in lines:
            values = {name: value for name, value in line.items() if name != "step" and value is not None}
            if self._writer is not None:
                for name, value in values.items():
                    self._writer.add_scalar(name, value, line["step"])
            if self._wandb is not None:
                self._wandb.log(values, step=line["step"])


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _step_line(record: StepRecord) -> dict[str, Any]:
    values = {name: float(value) for name, value in record.values.items()}
    if not values.get("skipped"):
        values.pop("skipped", None)
    tokens = {"tokens": record.tokens}
    if record.tokens_saved is not None:
        tokens["tokens_saved"] = record.tokens_saved
    return {"step": record.step, "learning_rate": record.learning_rate, **tokens, **values}


def _memory() -> dict[str, float]:
    if torch.cuda.is_available():
        return {
            "memory_allocated_gib": torch.cuda.max_memory_allocated() / 2**30,
            "memory_reserved_gib": torch.cuda.max_memory_reserved() / 2**30,
        }
    # Linux counts in KiB.
    return {"memory_peak_rss_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20}


def logged_steps(file: Path) -> Iterator[dict[str, Any]]:
    """The lines of a file of metrics that are of steps; one that a kill has cut short is passed over."""
    for text in file.read_text(encoding="utf-8").splitlines() if file.is_file() else []:
        with contextlib.suppress(json.JSONDecodeError):
            line = json.loads(text)
            if "loss" in line:
                yield line


def _drop_lines_after(file: Path, step: int) -> None:
    """Forget what a run wrote after the checkpoint that it resumes from; a line cut short by a kill goes too."""
    if not file.is_file():
        return
    kept = []
    for line in file.read_text(encoding="utf-8").splitlines(keepends=True):
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line)
        except (json.JSONDecodeError, KeyError, TypeError):
            continue
    write_file(file, "".join(kept))


def _start_wandb(project: str, out: Path, config: dict[str, Any]) -> Any:
    try:
        import wandb
    except ImportError:
        raise ValueError("log.wandb is set but wandb is not installed: pip install wandb, or leave it empty") from None
    return wandb.init(project=project, name=out.name, dir=str(out), config=config, resume="allow")
