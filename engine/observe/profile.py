"""Where a step's time and memory go: torch's profiler, each operation told apart by what called it.

Our operators run inside named ranges; what autograd runs for them in the backward pass carries the number of the forward
operation, which says which range it belongs to. On a GPU it is the same, with the time of the kernels that it launched.
"""

import importlib
import json
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from engine.distributed.ranks import Ranks
from engine.settings.sections import ProfileSettings
from model.folder import write_file

# Public operators by what the benchmarks' ladder calls them; each has its eager reference beside it.
OPERATORS: dict[str, tuple[tuple[str, str], ...]] = {
    "fused operators": (
        ("kernels.rms_norm", "rms_norm"), ("kernels.rms_norm", "add_rms_norm"), ("kernels.rotary", "rotary_"),
        ("kernels.swiglu", "swiglu"), ("kernels.embedding", "embedding"), ("kernels.norm_qkv", "norm_qkv"),
        ("kernels.feed_forward", "feed_forward"),
    ),
    "attention": (("kernels.attention.sliding_window", "sliding_window_attention"),),
    "fused head": (("kernels.linear_log_prob", "linear_log_prob"), ("kernels.linear_log_prob", "linear_nll")),
    "fused optimizer": (("kernels.adamw", "adamw_"), ("kernels.gradient_norm", "gradient_norm")),
}  # fmt: skip
CATEGORIES = ("products", "attention", "our operators", "optimizer", "communication", "rest", "waiting")
_OURS = ("kernels", "model", "engine")
_PREFIX = "komainu "
OPTIMIZER = _PREFIX + "optimizer"
_PRODUCTS = frozenset(
    f"aten::{name}"
    for name in ("mm", "addmm", "addmm_", "bmm", "baddbmm", "baddbmm_", "mv", "dot", "_scaled_mm", "mkldnn_linear")
)
_COMMUNICATION = ("c10d::", "nccl", "gloo", "_c10d_functional", "record_param_comms")
# A node of autograd's graph; the operations it runs are its children.
_BACKWARD = "autograd::engine::evaluate_function"


class StepProfiler:
    """Profiles the chosen steps of a run."""

    def __init__(self, settings: ProfileSettings, out: Path, ranks: Ranks) -> None:
        self._settings, self._out, self._ranks = settings, out, ranks

    @contextmanager
    def around(self, step: int) -> Iterator[None]:
        """Run a step, profiled if it was chosen."""
        if step not in self._settings.steps:
            yield
        elif self._settings.tool == "nvtx":
            with torch.cuda.profiler.profile(), torch.autograd.profiler.emit_nvtx(), ranges(), record_function(f"step {step}"):
                yield
        else:
            folder = self._out / "profile" / f"step-{step:08d}" / f"rank-{self._ranks.rank}"
            folder.mkdir(parents=True, exist_ok=True)
            with profiled(self._ranks.device, folder) as shares:
                yield
            if self._ranks.main:
                print(f"step {step}: " + ", ".join(f"{name} {share:.1%}" for name, share in shares.items()) + f"; see {folder}")


@contextmanager
def profiled(device: torch.device, folder: Path) -> Iterator[dict[str, float]]:
    """Profile what runs within. Yields what will hold the shares of its time, as `breakdown` returns them.

    Writes trace.json (for chrome://tracing or Perfetto), time.json (these shares), memory.svg (allocated memory over time) and
    on CUDA memory.json (the allocator's history and segments as `torch.cuda.memory._snapshot` gives them).
    """
    cuda, shares = device.type == "cuda", dict[str, float]()
    if cuda:
        torch.cuda.memory._record_memory_history(stacks="python")
    with ranges(), profile(activities=_activities(device), acc_events=True, profile_memory=True) as profiler:
        start = _synchronized(device)
        yield shares
        seconds = _synchronized(device) - start
    if cuda:
        snapshot = torch.cuda.memory._snapshot(device)
        torch.cuda.memory._record_memory_history(enabled=None)
        write_file(folder / "memory.json", json.dumps(snapshot, default=str))
    shares.update(shares_of(profiler.events() or [], device, seconds))
    write_file(folder / "time.json", json.dumps({"seconds": seconds, "shares": shares}, indent=1) + "\n")
    profiler.export_chrome_trace(str(folder / "trace.json"))
    curve = memory_curve(json.loads((folder / "trace.json").read_text(encoding="utf-8")), cuda=cuda)
    write_file(folder / "memory.svg", _drawing(curve))


def breakdown(step: Callable[[], Any], device: torch.device, steps: int = 2) -> dict[str, float]:
    """Shares of the wall time of `steps` calls by category; they add up to 1. "rest" are other operations, "waiting" is when
    none ran: the host's own work on a CPU, an idle device on a GPU. Communication that computing hides counts as well.

    A step's optimizer is expected inside `record_function(OPTIMIZER)`.
    """
    with ranges(), profile(activities=_activities(device), acc_events=True) as profiler:
        start = _synchronized(device)
        for _ in range(steps):
            step()
        seconds = _synchronized(device) - start
    return shares_of(profiler.events() or [], device, seconds)


def shares_of(events: Any, device: torch.device, seconds: float) -> dict[str, float]:
    """Shares of `seconds` by category, which add up to 1, of a profiler's events."""
    spent = dict.fromkeys(CATEGORIES, 0.0)
    for event, category in classified(events):
        own = event.self_device_time_total if device.type == "cuda" else event.self_cpu_time_total
        spent[category] += own / 1e6
    spent["waiting"] = max(0.0, seconds - sum(spent.values()))
    total = sum(spent.values())
    return {name: value / total for name, value in spent.items()}


@contextmanager
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
    lists = importlib.import_module("kernels.attention.work").attention_work
    yield lists, _in_range(lists, _PREFIX + "attention")


def _in_range(operator: Callable, name: str) -> Callable:
    def run(*arguments: Any, **keywords: Any) -> Any:
        with record_function(name):
            return operator(*arguments, **keywords)

    return run


@contextmanager
def replaced(substitutes: Iterable[tuple[Callable, Callable]]) -> Iterator[None]:
    """Wherever our modules name one of these functions, let them name its substitute."""
    undo = []
    for original, substitute in substitutes:
        for module in [module for name, module in list(sys.modules.items()) if name.split(".")[0] in _OURS]:
            for name, value in list(vars(module).items()):
                if value is original:
                    undo.append((module, name, original))
                    setattr(module, name, substitute)
    try:
        yield
    finally:
        for module, name, original in undo:
            setattr(module, name, original)


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


def memory_curve(trace: dict[str, Any], *, cuda: bool) -> list[tuple[float, int]]:
    """(milliseconds since the first, bytes) after each allocation of a Chrome trace on a device or the host, in order of time.

    On CUDA these are all that the allocator holds; on the host what was allocated since the trace began.
    """
    wanted = 1 if cuda else 0
    events = [event for event in trace["traceEvents"] if event.get("name") == "[memory]"]
    found = sorted((event["ts"], event["args"]) for event in events if event["args"]["Device Type"] == wanted) if events else []
    curve, held = [], 0
    for at, arguments in found:
        held = arguments["Total Allocated"] if cuda else held + arguments["Bytes"]
        curve.append(((at - found[0][0]) / 1e3, held))
    return curve


def _drawing(curve: list[tuple[float, int]], width: int = 960, height: int = 320, margin: int = 24) -> str:
    """The curve as SVG, with its peak and its length written on it."""
    end, peak = (curve[-1][0] or 1.0, max(size for _, size in curve) or 1) if curve else (1.0, 1)
    points, before = [], 0
    for at, size in curve:
        x = margin + at / end * (width - 2 * margin)
        points += [f"{x:.1f},{height - margin - level / peak * (height - 2 * margin):.1f}" for level in (before, size)]
        before = size
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" font-family="sans-serif" font-size="12">\n'
        f'<rect width="100%" height="100%" fill="white"/>\n'
        f'<text x="{margin}" y="{margin - 8}">allocated memory, peak {peak / 2**30:.3f} GiB, over {end:.1f} ms</text>\n'
        f'<polyline fill="none" stroke="#1f5fa8" points="{" ".join(points)}"/>\n</svg>\n'
    )


def _activities(device: torch.device) -> list[ProfilerActivity]:
    return [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device.type == "cuda" else [])]


def _synchronized(device: torch.device) -> float:
    """The time, once the device is idle."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
