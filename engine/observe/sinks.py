"""Where the metrics of a run go besides the console: metrics.jsonl, TensorBoard, Weights & Biases."""

import importlib.util
import json
import math
import secrets
import time
from pathlib import Path
from typing import Any, Protocol

from engine.observe.line_file import LineFile
from engine.observe.logged import SAMPLES, Line, drop_lines_after, logged_steps
from engine.observe.spikes import SpikeLog
from engine.settings.sections import LogSettings
from model.folder import write_file


class Sink(Protocol):
    """A destination of lines.

    after_refusal: what becomes of lines that could not be written, in words.
    """

    after_refusal: str

    def write(self, lines: list[Line]) -> None: ...

    def close(self, status: int) -> None: ...


def open_sinks(
    out: Path,  # run folder
    settings: LogSettings,
    *,
    start: int,  # steps done before this process began
    config: dict[str, Any],  # resolved settings, for Weights & Biases
    spikes: SpikeLog | None,
) -> list[Sink]:
    """Open the files of a run, cut back to the step where it starts. Raises: ValueError as `check_wandb` does."""
    kept, file = start, out / "metrics.jsonl"
    sinks: list[Sink] = [_JsonLines(file, kept)]
    if spikes is not None:
        sinks.append(_Spikes(spikes))
        drop_lines_after(spikes.file, kept)
        spikes.resume(line["loss"] for line in logged_steps(file) if "skipped" not in line)
    if settings.tensorboard:
        try:
            sinks.append(_TensorBoard(out / "tensorboard", kept))
        except ImportError:
            print("tensorboard is not installed: no event files (pip install tensorboard, or log.tensorboard = false)")
    check_wandb(settings)
    if settings.wandb:
        sinks.append(_WeightsAndBiases(settings.wandb, out, fresh=start == 0, config=config))
    return sinks


class _JsonLines:
    after_refusal = "they come with the next ones, once there is room"

    def __init__(self, file: Path, kept: int) -> None:
        drop_lines_after(file, kept)
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


class _TensorBoard:
    """Raises: ImportError when tensorboard is not installed."""

    # Its writing thread ends with the first error.
    after_refusal = "no further TensorBoard events from this process"

    def __init__(self, folder: Path, kept: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        _wait_for_a_later_name(folder)
        self._writer = SummaryWriter(str(folder), purge_step=kept + 1)

    def write(self, lines: list[Line]) -> None:
        for line in lines:
            for name, value in _numbers(line).items():
                self._writer.add_scalar(name, value, line["step"])
            if SAMPLES in line:
                self._writer.add_text(SAMPLES, _markdown(line[SAMPLES]), line["step"])

    def close(self, status: int) -> None:
        self._writer.close()


def _wait_for_a_later_name(folder: Path) -> None:
    """Wait until the clock shows a later second than the newest event file's name.

    TensorBoard reads event files in the order of their names, events.out.tfevents.SECOND.HOST.PROCESS.COUNT.
    Of two files of one second, the earlier attempt's may come last, and would hide the steps of the later one.
    """
    taken = {file.name.split(".")[3] for file in folder.glob("events.out.tfevents.*")}
    while f"{int(time.time()):010d}" in taken:
        time.sleep(0.05)


def check_wandb(settings: LogSettings) -> None:
    """Raises: ValueError when `log.wandb` is set and wandb is not installed."""
    if settings.wandb and importlib.util.find_spec("wandb") is None:
        raise ValueError("log.wandb is set but wandb is not installed: pip install wandb, or leave it empty")


class _WeightsAndBiases:
    """The run folder keeps the run's id, so that a resumed run continues the same run of Weights & Biases."""

    after_refusal = "Weights & Biases lacks them"

    def __init__(self, project: str, out: Path, *, fresh: bool, config: dict[str, Any]) -> None:
        import wandb

        file = out / "wandb-id"
        if fresh or not file.is_file():
            write_file(file, secrets.token_hex(8) + "\n")
        self._run = wandb.init(
            project=project,
            id=file.read_text(encoding="utf-8").strip(),
            name=out.name,
            dir=str(out),
            config=config,
            resume="allow",
        )

    def write(self, lines: list[Line]) -> None:
        import wandb

        for line in lines:
            values = _numbers(line)
            if SAMPLES in line:
                rows = [[line["step"], sample["prompt"], sample["answer"]] for sample in line[SAMPLES]]
                values[SAMPLES] = wandb.Table(columns=["step", "prompt", "answer"], data=rows)
            self._run.log(values, step=line["step"])

    def close(self, status: int) -> None:
        self._run.finish(exit_code=status)


def _numbers(line: Line) -> Line:
    return {name: value for name, value in line.items() if name not in ("step", SAMPLES) and value is not None}


def _markdown(samples: list[dict[str, str]]) -> str:
    """Prompts and answers as Markdown, in which the texts stand literally."""
    parts = [(title, sample[title]) for sample in samples for title in ("prompt", "answer")]
    return "\n\n".join(f"{title}\n\n" + "\n".join(f"    {line}" for line in text.split("\n")) for title, text in parts)
