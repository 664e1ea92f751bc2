"""What every benchmark shares: how time is taken, what a result says of where it was taken, how a part runs on its own.

A result is one JSON file: {"benchmark", "command", "when", "commit", "machine", "settings", "complete", "rows"}. A row is one
measured (or missing) thing: its own fields, times as {"median", "low", "high", "samples"} with the 20th and 80th percentile. A
thing that could not be measured is a row with "missing": why. No figure is ever guessed. A long benchmark writes its file after
each row, with "complete" false until the last, so that one that is cut off leaves the rows it has.
"""

import contextlib
import functools
import itertools
import json
import os
import platform
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, TypeVar

import torch

from benchmarks.peers.worker import cpu_seconds as cpu_seconds
from benchmarks.peers.worker import peak_memory as peak_memory
from engine.environment import nvidia_driver
from model.folder import write_file

Sample = TypeVar("Sample")
# The folders of an absolute path.
_FOLDERS = re.compile(r"(?<![\w./~])/(?:[^\s/'\"]+/)+")
ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
# Enough to push the last-level cache out (an H200 has 50 MiB).
_FLUSH_BYTES = {"cuda": 256 * 2**20, "cpu": 64 * 2**20}
# About 1 ms, in which the host launches what is timed.
_BUSY_CYCLES = 2_000_000
_PACKAGES = (
    "torch", "triton", "transformers", "trl", "liger-kernel", "cut-cross-entropy", "flash-attn", "fla-core", "torchtitan",
)  # fmt: skip


def spread(samples: Sequence[float]) -> dict[str, float | int]:
    """Median, 20th and 80th percentile (nearest rank) and number of samples."""
    ordered = sorted(samples)
    last = len(ordered) - 1
    return {
        "median": statistics.median(ordered),
        "low": ordered[round(0.2 * last)],
        "high": ordered[round(0.8 * last)],
        "samples": len(ordered),
    }


def alternate(candidates: Mapping[str, Callable[[], Sample]], rounds: int) -> dict[str, list[Sample]]:
    """Measure candidates in turn, each once a round, so that what slows the machine slows all of them.

    A candidate does one measured piece of work and returns what it took, as seconds.
    """
    samples: dict[str, list[Sample]] = {name: [] for name in candidates}
    names = list(candidates)
    for turn in range(rounds):
        # Another one first each round: the first after a pause is not always the same.
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            samples[name].append(candidates[name]())
    return samples


def seconds_of(work: Callable[[], Any], device: torch.device) -> float:
    """Seconds of one call, from an idle device to an idle device."""
    synchronize(device)
    start = time.perf_counter()
    work()
    synchronize(device)
    return time.perf_counter() - start


def kernel_seconds(
    work: Callable[..., Any],
    device: torch.device,
    *,
    repeats: int = 30,
    warmup: int = 5,
    prepare: Callable[[], Any] | None = None,
) -> list[float]:
    """Seconds of each of `repeats` calls of a short operation.

    Args: prepare: makes what each call of `work` is given, outside the time taken: inputs that the call may overwrite, or a
        forward pass before a backward one. Without it `work` is called with nothing.

    The caches are flushed before each call. On CUDA: events around each call; every call is queued behind a device that is
    kept busy, so that the host's launch times do not count. On the CPU: the host's clock.
    """

    def arguments() -> tuple[Any, ...]:
        return () if prepare is None else (prepare(),)

    for _ in range(warmup):
        work(*arguments())
    flush = torch.empty(_FLUSH_BYTES[device.type] // 4, dtype=torch.int32, device=device)
    if device.type != "cuda":
        seconds = []
        for _ in range(repeats):
            given = arguments()
            flush.zero_()
            seconds.append(seconds_of(functools.partial(work, *given), device))
        return seconds
    events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(repeats)]
    synchronize(device)
    for before, after in events:
        given = arguments()
        torch.cuda._sleep(_BUSY_CYCLES)
        flush.zero_()
        before.record()
        work(*given)
        after.record()
    synchronize(device)
    return [before.elapsed_time(after) / 1e3 for before, after in events]


def synchronize(device: torch.device) -> None:
    """Wait until the device is idle."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def reset_peak_memory(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def reset_peak_resident() -> None:
    """Forget the largest resident set so far, where the system allows it."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def allocated_peak(work: Callable[[], Any], device: torch.device) -> int:
    """Most bytes that torch's allocator held during one call beyond those it held before, what the call returns included."""
    if device.type == "cuda":
        synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        work()
        synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    # Its profiler announces itself on the terminal otherwise.
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        work()
    assert profiler.profiler is not None
    recorded = profiler.profiler.kineto_results.events()
    changes = sorted((event.start_ns(), event.nbytes()) for event in recorded if event.name() == "[memory]")
    return max(itertools.accumulate((change for _, change in changes), initial=0))


def ceilings(device: torch.device, dtype: torch.dtype = torch.bfloat16, *, repeats: int = 10) -> dict[str, float]:
    """What this device reaches now: operations a second of a large matrix product on random data, bytes a second of a copy."""
    size = 8192 if device.type == "cuda" else 1024
    left, right = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    product = statistics.median(kernel_seconds(lambda: left @ right, device, repeats=repeats, warmup=repeats // 2))
    source = torch.randn(2**28 if device.type == "cuda" else 2**24, device=device)
    target = torch.empty_like(source)
    copy = statistics.median(kernel_seconds(lambda: target.copy_(source), device, repeats=repeats, warmup=repeats // 2))
    return {"product_flops": 2 * size**3 / product, "copy_bytes": 2 * source.nbytes / copy}


def machine(device: torch.device) -> dict[str, Any]:
    """Where and with what: device, processor, versions."""
    described: dict[str, Any] = {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else processor(),
        "kind": device.type,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "python": platform.python_version(),
        "driver": nvidia_driver(),
    }
    for package in _PACKAGES:
        try:
            described[package] = version(package)
        except PackageNotFoundError:
            described[package] = None
    return described


def processor() -> str:
    """The processor's model name."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def commit() -> str:
    """KOMAINU_COMMIT where it is set, as for files that were copied without their history; else the checkout's commit, with "+"
    behind it where files differ from it; else "unknown"."""
    if named := os.environ.get("KOMAINU_COMMIT"):
        return named

    def git(*arguments: str) -> str:
        return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()

    try:
        # A result that is being written says nothing about what it was measured with.
        changed = git("status", "--porcelain", "--untracked-files=no", "--", ".", ":!benchmarks/results")
        return git("rev-parse", "HEAD") + ("+" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def result(
    benchmark: str, command: str, device: torch.device, settings: Any, rows: list[dict[str, Any]], *, complete: bool = True
) -> dict[str, Any]:
    """A result as it is written; `complete`: no rows are still to come. Of absolute paths the last part is kept: the rest says
    nothing outside the machine."""
    return {
        "benchmark": benchmark,
        "command": _without_folders(command),
        "when": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": commit(),
        "machine": machine(device),
        "settings": _without_folders(settings),
        "complete": complete,
        "rows": _without_folders(rows),
    }


def _without_folders(value: Any) -> Any:
    if isinstance(value, str):
        return _FOLDERS.sub("", value)
    if isinstance(value, Mapping):
        return {name: _without_folders(inner) for name, inner in value.items()}
    return [_without_folders(inner) for inner in value] if isinstance(value, (list, tuple)) else value


def write_result(path: str | Path, content: dict[str, Any]) -> None:
    """Write a result file, as a whole."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_file(path, json.dumps(content, indent=1, ensure_ascii=False) + "\n")


def run_part(
    arguments: Sequence[str],
    *,
    limit: float,
    environment: Mapping[str, str] | None = None,
    cwd: Path = ROOT,
    log: Path | None = None,
) -> tuple[str, str]:
    """Run `python <arguments>` as a process of its own. Returns (status, end of its output).

    status: "done", "failed (exit N)", or "cut off after N s"; a part that hangs takes none of the others with it, and what it
    started itself ends with it. Its output is appended to `log` as it comes.
    """
    with log.open("ab+") if log else tempfile.TemporaryFile() as output:
        start = output.seek(0, os.SEEK_END)
        process = subprocess.Popen(
            [sys.executable, *arguments], cwd=cwd, env={**os.environ, **(environment or {})}, stdin=subprocess.DEVNULL,
            stdout=output, stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
        try:
            code = process.wait(timeout=limit)
            status = "done" if code == 0 else f"failed (exit {code})"
        except subprocess.TimeoutExpired:
            status = f"cut off after {limit:.0f} s"
        finally:
            # Also when this process is interrupted: a part is not in its session, so that nothing else would end it.
            _end(process)
        end = output.seek(0, os.SEEK_END)
        output.seek(max(start, end - 4000))
        return status, output.read().decode(errors="replace")


class PartError(RuntimeError):
    """A part did not come to its end; the message says how it ended and the last of what it said."""


def call_apart(module: str, function: str, arguments: Mapping[str, Any], *, limit: float) -> Any:
    """What a module's function returns for the arguments, from a process of its own; both pass as JSON. Raises: PartError."""
    program = (
        "import importlib, json, pathlib, sys; module, function, arguments, out = sys.argv[1:]; "
        "answer = getattr(importlib.import_module(module), function)(**json.loads(arguments)); "
        "pathlib.Path(out).write_text(json.dumps(answer))"
    )
    with tempfile.TemporaryDirectory(prefix="komainu-") as folder:
        out = Path(folder) / "answer.json"
        status, said = run_part(["-c", program, module, function, json.dumps(arguments), str(out)], limit=limit)
        if status != "done":
            raise PartError(f"{status}: {next(iter(said.strip().splitlines()[-1:]), 'it said nothing')}"[:300])
        return json.loads(out.read_text())


def _end(process: subprocess.Popen) -> None:
    """End a process and everything it started that still descends from it or shares its session."""
    parents, sessions = {}, {}
    for entry in Path("/proc").glob("[0-9]*/stat"):
        try:
            # The name, in parentheses, may hold anything.
            fields = entry.read_text().rpartition(")")[2].split()
        except OSError:
            continue  # it has ended since
        parents[int(entry.parent.name)], sessions[int(entry.parent.name)] = int(fields[1]), int(fields[3])
    doomed = {pid for pid, session in sessions.items() if session == process.pid} | {process.pid}
    while more := {pid for pid, parent in parents.items() if parent in doomed} - doomed:
        doomed |= more
    for pid in doomed:
        if pid == process.pid:
            process.kill()  # nothing where it has ended already and the number may be another's
            continue
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    process.wait()


def table(rows: Sequence[Mapping[str, Any]], columns: Sequence[str]) -> str:
    """Rows as text in columns; a missing value is a dash."""
    cells = [[_cell(row.get(column)) for column in columns] for row in rows]
    widths = [max(len(column), *(len(row[i]) for row in cells), 0) for i, column in enumerate(columns)]
    lines = [list(columns), *cells]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines)


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, dict) and "median" in value:
        return f"{value['median']:.4g} ({value['low']:.4g} to {value['high']:.4g})"
    return f"{value:.4g}" if isinstance(value, float) else str(value)
