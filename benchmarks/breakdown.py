"""Where a step's time goes: torch's profiler, each operation told apart by what called it.

Our operators run inside named ranges; what autograd runs for them in the backward pass carries the number of the forward
operation, which says which range it belongs to. On a GPU it is the same, with the time of the kernels that it launched.
"""

import contextlib
import importlib
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from benchmarks.measure import synchronize
from benchmarks.parts import OPERATORS, replaced

CATEGORIES = ("products", "attention", "our operators", "optimizer", "communication", "rest")
_PREFIX = "komainu "
_PRODUCTS = frozenset(
    f"aten::{name}"
    for name in ("mm", "addmm", "addmm_", "bmm", "baddbmm", "baddbmm_", "mv", "dot", "_scaled_mm", "mkldnn_linear")
)
_COMMUNICATION = ("c10d::", "nccl", "gloo", "_c10d_functional", "record_param_comms")
# A node of autograd's graph; the operations it runs are its children.
_BACKWARD = "autograd::engine::evaluate_function"


@contextlib.contextmanager
def ranges() -> Iterator[None]:
    """Run our operators inside ranges that the profiler sees."""
    with replaced(list(_in_ranges())):
        yield


def _in_ranges() -> Iterator[tuple[Callable, Callable]]:
    for part, operators in OPERATORS.items():
        category = {"attention": "attention", "fused optimizer": "optimizer"}.get(part, "our operators")
        for module, name in operators:
            operator = getattr(importlib.import_module(module), name)
            yield operator, _in_range(operator, _PREFIX + category)
    # Lists of who sees whom, made on the host once a batch.
    lists = importlib.import_module("kernels.attention_work").attention_work
    yield lists, _in_range(lists, _PREFIX + "attention")


def _in_range(operator: Callable, name: str) -> Callable:
    def run(*arguments: Any, **keywords: Any) -> Any:
        with record_function(name):
            return operator(*arguments, **keywords)

    return run


def breakdown(step: Callable[[], Any], device: torch.device, steps: int = 2) -> dict[str, float]:
    """Shares of the wall time of `steps` calls by category; they add up to 1. "rest" also holds what is no operation:
    the host's own work on a CPU, an idle device on a GPU.

    A step's optimizer is expected inside `record_function(OPTIMIZER)`.
    """
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device.type == "cuda" else [])]
    with ranges(), profile(activities=activities, acc_events=True) as profiler:
        synchronize(device)
        start = time.perf_counter()
        for _ in range(steps):
            step()
        synchronize(device)
        seconds = time.perf_counter() - start
    spent = dict.fromkeys(CATEGORIES, 0.0)
    for event, category in classified(profiler.events() or []):
        own = event.self_device_time_total if device.type == "cuda" else event.self_cpu_time_total
        spent[category] += own / 1e6
    shares = {name: value / seconds for name, value in spent.items()}
    shares["rest"] = max(0.0, 1.0 - sum(value for name, value in shares.items() if name != "rest"))
    total = sum(shares.values())
    return {name: value / total for name, value in shares.items()}


OPTIMIZER = _PREFIX + "optimizer"


def classified(events: Any) -> Iterator[tuple[Any, str]]:
    """Every operation that the host ran, with its category."""
    ranged = _forward_categories(events)
    for event in events:
        if event.device_type == torch.autograd.DeviceType.CPU:
            yield event, _category(event, ranged)


def _forward_categories(events: Any) -> dict[int, str]:
    """Category of each numbered operation that ran inside a range."""
    found = {}
    for event in events:
        if event.sequence_nr >= 0 and not event.name.startswith(_BACKWARD):
            category = _range_of(event)
            if category is not None:
                found[event.sequence_nr] = category
    return found


def _range_of(event: Any) -> str | None:
    while event is not None:
        if event.name.startswith(_PREFIX):
            return event.name.removeprefix(_PREFIX)
        event = event.cpu_parent
    return None


def _category(event: Any, ranged: dict[int, str]) -> str:
    if any(word in event.name for word in _COMMUNICATION):
        return "communication"
    category = _range_of(event)
    node = event
    while category is None and node is not None:
        if node.name.startswith(_BACKWARD):
            category = ranged.get(node.sequence_nr)
        node = node.cpu_parent
    if category in ("attention", "optimizer"):
        return category
    return "products" if event.name in _PRODUCTS else category or "rest"
