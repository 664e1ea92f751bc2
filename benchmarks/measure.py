"""Measures time and memory: order statistics, alternating rounds, cold caches, a queue on the GPU."""

import contextlib
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch

from benchmarks.peers.worker import peak_resident_bytes

Sample = TypeVar("Sample")
# Enough to push the last-level cache out (an H200 has 50 MiB).
_FLUSH_BYTES = {"cuda": 256 * 2**20, "cpu": 64 * 2**20}
# Keeps the device busy for about 1 ms, while the host launches the timed call.
_BUSY_CYCLES = 2_000_000


def spread(samples: Sequence[float]) -> dict[str, float | int]:
    """Median, 20th and 80th percentile (nearest rank) and number of samples."""
    ordered, last = sorted(samples), len(samples) - 1
    low, high = ordered[round(0.2 * last)], ordered[round(0.8 * last)]
    return {"median": statistics.median(ordered), "low": low, "high": high, "samples": len(ordered)}


def rotated(names: Sequence[str], turn: int) -> list[str]:
    """The names in the order of a round. Each round starts with another name: the first after a pause is often slower."""
    shift = turn % len(names) if names else 0
    return [*names[shift:], *names[:shift]]


def alternate(candidates: Mapping[str, Callable[[], Sample]], rounds: int) -> dict[str, list[Sample]]:
    """Call each candidate once a round, in turns, so that whatever slows the machine slows all of them."""
    samples: dict[str, list[Sample]] = {name: [] for name in candidates}
    for turn in range(rounds):
        for name in rotated(list(candidates), turn):
            samples[name].append(candidates[name]())
    return samples


def kernel_seconds(
    work: Callable[..., Any],
    device: torch.device,
    *,
    repeats: int = 30,
    warmup: int = 5,
    prepare: Callable[[], Any] | None = None,
) -> list[float]:
    """Seconds of each of `repeats` calls of a short operation, caches flushed before each.

    prepare makes the argument of each call outside the timed region: inputs that the call may overwrite, or a forward pass
    before a backward one. Without it, `work` takes no argument. On CUDA, events are recorded around each call, and each call
    is queued behind a busy device, so that the host's launch times do not count. On a CPU, the host's clock is read.
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
            start = time.perf_counter()
            work(*given)
            seconds.append(time.perf_counter() - start)
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


def allocated_peak(work: Callable[[], Any], device: torch.device) -> int:
    """Peak bytes of CUDA's allocator during one call, above the bytes held before it; the result counts."""
    synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    work()
    synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


def reset_peak_resident() -> None:
    """Reset this process's peak resident set to its present size, where Linux allows it."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def peak_resident_gib() -> float:
    """Peak resident set of this process in GiB."""
    return peak_resident_bytes() / 2**30


def ceilings(device: torch.device, dtype: torch.dtype = torch.bfloat16, *, repeats: int = 10) -> dict[str, float]:
    """The device's present speed: "product_flops" of a large matrix product, "copy_bytes" per second, read and written."""
    size = 8192 if device.type == "cuda" else 1024
    left, right = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    product = statistics.median(kernel_seconds(lambda: left @ right, device, repeats=repeats, warmup=repeats // 2))
    source = torch.randn(2**28 if device.type == "cuda" else 2**24, device=device)
    target = torch.empty_like(source)
    copy = statistics.median(kernel_seconds(lambda: target.copy_(source), device, repeats=repeats, warmup=repeats // 2))
    return {"product_flops": 2 * size**3 / product, "copy_bytes": 2 * source.nbytes / copy}
