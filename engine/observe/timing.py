"""Time marks that nothing waits for: events on the current stream of a CUDA device, the host's clock elsewhere."""

import time
from typing import Any

import torch


def mark(device: torch.device) -> Any:
    """A mark of the present moment, for `seconds_between`."""
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def seconds_between(before: Any, after: Any) -> float:
    """Seconds between two marks of one device. A CUDA device must have reached both."""
    return after - before if isinstance(before, float) else before.elapsed_time(after) / 1e3
