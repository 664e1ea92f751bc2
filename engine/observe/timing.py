"""Marks of time that nothing waits for: on a CUDA device events on its current stream, elsewhere the host's clock."""

import time
from typing import Any

import torch


def mark(device: torch.device) -> Any:
    """Now, for `seconds_between`."""
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def seconds_between(before: Any, after: Any) -> float:
    """Seconds between two marks of one device, which has to have reached both."""
    return after - before if isinstance(before, float) else before.elapsed_time(after) / 1e3
