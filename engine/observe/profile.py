"""Profiles a step: where its time and memory go, with torch's profiler.

Our operators run inside named ranges. Their backward operations carry the sequence number of the forward operation, which
leads back to its range. On a GPU an operation's time is the time of the kernels that it launched.
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

# Public operators, (module, function), by the part of the benchmarks' ladder that they belong to.
OPERATORS: dict[str, tuple[tuple[str, str], ...]] = {
    "fused operators": (
        ("kernels.rms_norm", "rms_norm"),
        ("kernels.rms_norm", "add_rms_norm"),
        ("kernels.rotary", "rotary_"),
        ("kernels.swiglu", "swiglu"),
        ("kernels.embedding", "embedding"),
        ("kernels.norm_qkv", "norm_qkv"),
        ("kernels.feed_forward", "feed_forward"),
    ),
    "fp8 products": (
        ("kernels.fp8_norm_qkv", "fp8_norm_qkv"),
        ("kernels.fp8_feed_forward", "fp8_feed_forward"),
        ("kernels.fp8_linear", "fp8_linear"),
    ),
    "attention": (("kernels.attention.sliding_window", "sliding_window_attention"),),
    "fused head": (("kernels.linear_log_prob", "linear_log_prob"), ("kernels.linear_log_prob", "linear_nll")),
    "fused optimizer": (("kernels.adamw", "adamw_"), ("kernels.gradient_norm", "gradient_norm")),
}
CATEGORIES = ("products", "attention", "our operators", "optimizer", "communication", "rest", "waiting")
_OURS = ("kernels", "model", "engine")
_PREFIX = "komainu "
# Range around the optimizer's part of a step.
OPTIMIZER = _PREFIX + "optimizer"
_PRODUCTS = frozenset(
    f"aten::{name}"
    for name in ("mm", "addmm", "addmm_", "bmm", "baddbmm", "baddbmm_", "mv", "dot", "_scaled_mm", "mkldnn_linear")
)
_COMMUNICATION = ("c10d::", "nccl", "gloo", "_c10d_functional", "record_param_comms")
# Prefix of the events of autograd nodes; the operations that a node runs are its children.
_BACKWARD = "autograd::engine::evaluate_function"


class StepProfiler:
    """Profiles the steps that `profile.steps` names."""

    def __init__(self, settings: ProfileSettings, out: Path, ranks: Ranks) -> None:
        self._settings, self._out, self._ranks = settings, out, ranks

    @contextmanager
    def around(self, step: int) -> Iterator[None]:
        """Wraps a step (numbered from 1); profiles it if it was chosen."""
        if step not in self._settings.steps:
            yield
        elif self._settings.tool == "nvtx":
            with torch.cuda.profiler.profile(), torch.autograd.profiler.emit_nvtx(), ranges(), record_function(f"step {step}"):
                yield
        else:
            folder = self._out / "profile" / f"step-{step:08d}" / f"rank-{self._ranks.rank}"
            with profiled(self._ranks.device, folder) as shares:
                yield
            if self._ranks.main and shares:
                print(f"step {step}: " + ", ".join(f"{name} {share:.1%}" for name, share in shares.items()) + f"; see {folder}")
                if not (folder / "memory.svg").exists():
                    print("matplotlib is not installed: no memory.svg (pip install matplotlib)")


@contextmanager
def profiled(device: torch.device, folder: Path) -> Iterator[dict[str, float]]:
    """Profile the code inside. Yields a dictionary that holds the shares of its time afterwards, as `shares_of` returns them.

    Writes into `folder`: trace.json (for chrome://tracing or Perfetto), time.json (the shares), memory.svg (allocated memory
    over time, where matplotlib is installed), and on CUDA memory.json (the allocator's history and segments, as
    `torch.cuda.memory._snapshot` returns them). A disk that refuses them is reported and costs nothing else.
    """
    cuda, shares, snapshot = device.type == "cuda", dict[str, float](), None
    if cuda:
        torch.cuda.memory._record_memory_history(stacks="python")
    with ranges(), profile(activities=_activities(device), acc_events=True, profile_memory=True) as profiler:
        start = _synchronized(device)
        yield shares
        seconds = _synchronized(device) - start
    if cuda:
        snapshot = torch.cuda.memory._snapshot(device)
        torch.cuda.memory._record_memory_history(enabled=None)
    found = shares_of(profiler.events() or [], device, seconds)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if cuda:
            write_file(folder / "memory.json", json.dumps(snapshot, default=str))
        write_file(folder / "time.json", json.dumps({"seconds": seconds, "shares": found}, indent=1) + "\n")
        profiler.export_chrome_trace(str(folder / "trace.json"))
        curve = memory_curve(json.loads((folder / "trace.json").read_text(encoding="utf-8")), cuda=cuda)
        _draw(curve, folder / "memory.svg")
    except (OSError, json.JSONDecodeError) as error:  # torch says nothing of a trace that it could write in part only
        print(f"{folder}: the profile could not be written: {error}; free the disk and profile another step")
    else:
        shares.update(found)


def breakdown(step: Callable[[], Any], device: torch.device, steps: int = 2) -> dict[str, float]:
    """Seconds of a step by category, as `seconds_of` returns them: means over `steps` calls.

    The step runs its optimizer inside `record_function(OPTIMIZER)`.
    """
    with ranges(), profile(activities=_activities(device), acc_events=True) as profiler:
        start = _synchronized(device)
        for _ in range(steps):
            step()
        seconds = _synchronized(device) - start
    return {name: spent / steps for name, spent in seconds_of(profiler.events() or [], device, seconds).items()}


def shares_of(events: Any, device: torch.device, seconds: float) -> dict[str, float]:
    """Shares of `seconds_of` by category. They add up to 1."""
    spent = seconds_of(events, device, seconds)
    total = sum(spent.values())
    return {name: value / total for name, value in spent.items()}


def seconds_of(events: Any, device: torch.device, seconds: float) -> dict[str, float]:
    """Seconds by category out of `seconds` of wall time, from a profiler's events.

    "rest" is time in other operations. "waiting" is time in none: the host's own work on a CPU, an idle device on a GPU; the
    profiler itself adds to it. "communication" counts even where computation hides it.
    """
    spent = dict.fromkeys(CATEGORIES, 0.0)
    for event, category in classified(events):
        own = event.self_device_time_total if device.type == "cuda" else event.self_cpu_time_total
        spent[category] += own / 1e6
    spent["waiting"] = max(0.0, seconds - sum(spent.values()))
    return spent


@contextmanager
def ranges() -> Iterator[None]:
    """Inside, our operators run in ranges that the profiler records."""
    with replaced(list(_in_ranges())):
        yield


def _in_ranges() -> Iterator[tuple[Callable, Callable]]:
    for part, operators in OPERATORS.items():
        category = {"attention": "attention", "fused optimizer": "optimizer"}.get(part, "our operators")
        for module, name in operators:
            operator = getattr(importlib.import_module(module), name)
            yield operator, _in_range(operator, _PREFIX + category)
    # The work lists of attention are built on the host once a batch.
    lists = importlib.import_module("kernels.attention.work").attention_work
    yield lists, _in_range(lists, _PREFIX + "attention")


def _in_range(operator: Callable, name: str) -> Callable:
    def run(*arguments: Any, **keywords: Any) -> Any:
        with record_function(name):
            return operator(*arguments, **keywords)

    return run


@contextmanager
def replaced(substitutes: Iterable[tuple[Callable, Callable]]) -> Iterator[None]:
    """Inside, every reference of our modules to a function is replaced by its substitute: (function, substitute) pairs."""
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
    """(event, category) of every operation that the host ran."""
    ranged = _forward_categories(events)
    for event in events:
        if event.device_type == torch.autograd.DeviceType.CPU:
            yield event, _category(event, ranged)


def _forward_categories(events: Any) -> dict[int, str]:
    """The category of each forward operation that ran inside a range, by its sequence number."""
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
    """Allocated memory over time, from a Chrome trace: (milliseconds since the first event, bytes), in order of time.

    On CUDA the bytes are everything that the allocator holds; on the host they count from the beginning of the trace.
    """
    wanted = 1 if cuda else 0
    events = [event for event in trace["traceEvents"] if event.get("name") == "[memory]"]
    found = sorted((event["ts"], event["args"]) for event in events if event["args"]["Device Type"] == wanted) if events else []
    curve, held = [], 0
    for at, arguments in found:
        held = arguments["Total Allocated"] if cuda else held + arguments["Bytes"]
        curve.append(((at - found[0][0]) / 1e3, held))
    return curve


def _draw(curve: list[tuple[float, int]], file: Path) -> None:
    """Draw a memory curve as SVG; without matplotlib, draw nothing."""
    try:
        from matplotlib import rc_context
        from matplotlib.figure import Figure
    except ImportError:
        return
    peak = max((size for _, size in curve), default=0)
    # Keep text as text, not as outlines.
    with rc_context({"svg.fonttype": "none"}):
        figure = Figure(figsize=(9.6, 3.2), layout="constrained")
        axes = figure.add_subplot(title=f"allocated memory, peak {peak / 2**30:.3f} GiB", xlabel="ms", ylabel="GiB")
        axes.step([at for at, _ in curve], [size / 2**30 for _, size in curve], where="post")
        figure.savefig(file)


def _activities(device: torch.device) -> list[ProfilerActivity]:
    return [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device.type == "cuda" else [])]


def _synchronized(device: torch.device) -> float:
    """The host's time once the device is idle, in seconds."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
