"""A measured process: it trains when told to, and says how long each step took.

It is started as `python <script>.py job.json`. Orders are lines of JSON on standard input: {"steps": n} trains n steps; the end
of the input ends the process. Answers are lines of JSON on the original standard output: first {"ready": {...}} or
{"missing": why}, then one for each order. Everything that libraries print goes to standard error.

Only Python and torch are imported, so that a peer's process holds nothing of ours.
"""

import importlib
import json
import os
import resource
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import torch


class Worker:
    """Takes orders and answers them. `job` is the content of the job's file."""

    def __init__(self, argv: list[str] | None = None) -> None:
        self.job: dict[str, Any] = json.loads(Path((sys.argv if argv is None else argv)[1]).read_text(encoding="utf-8"))
        self.device = torch.device(self.job["device"])
        self.dtype: torch.dtype = getattr(torch, self.job["dtype"])
        self.answers: dict[str, Callable[[], Any]] = {}  # functions for further orders, by their name
        self.versions: dict[str, str | None] = {"torch": torch.__version__}
        self._out = os.fdopen(os.dup(1), "w", encoding="utf-8")
        os.dup2(2, 1)
        sys.stdout = sys.stderr
        self._left = 0
        self._marks: list[Any] = []
        self._losses: list[Any] = []
        self._counts: list[dict[str, int]] = []
        threading.Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()
        if self.job.get("threads"):
            torch.set_num_threads(self.job["threads"])

    def need(self, *modules: str) -> list[ModuleType]:
        """Import a peer's packages; without them, say which is missing and end."""
        found = []
        for name in modules:
            try:
                found.append(importlib.import_module(name))
                self.versions[name] = getattr(found[-1], "__version__", None)
            except ImportError as error:
                absent = getattr(error, "name", None) or name
                self.missing(f"{absent} is not installed" if isinstance(error, ModuleNotFoundError) else f"{name}: {error}")
        return found

    def missing(self, why: str) -> None:
        """Say why nothing can be measured, and end."""
        self.say({"missing": why})
        raise SystemExit(0)

    def ready(self, **facts: Any) -> None:
        """Everything is loaded; `facts` go into the result."""
        self.say({"ready": {"versions": self.versions, **facts}})

    def serve(self, step: Callable[[int], torch.Tensor]) -> None:
        """Call step(index) -> loss as often as ordered."""
        index, going = 0, self.start()
        while going:
            going = self.done(step(index))
            index += 1

    def start(self) -> bool:
        """Wait for the first order; False at the end of orders. The peak of a GPU's memory is taken from here on."""
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        return self._next_order()

    def done(self, loss: Any, **counts: int) -> bool:
        """Note the end of a step. After the last step of an order, answer and wait for the next; False at the end of orders.

        counts: tokens and documents of the step, from a trainer that composes its steps itself.
        """
        self._losses.append(loss)
        self._counts.append(counts)
        self._mark()
        self._left -= 1
        if self._left:
            return True
        self._report()
        return self._next_order()

    def _next_order(self) -> bool:
        while line := self.line():
            order = json.loads(line)
            if "steps" in order:
                self._left = order["steps"]
                self._marks, self._losses, self._counts = [], [], []
                if self.device.type == "cuda":
                    torch.cuda.synchronize(self.device)
                self._cpu = cpu_seconds()
                self._mark()
                return True
            (name,) = order
            self.say({name: self.answers[name]()})
        return False

    def line(self) -> str:
        """The next order as text; empty at the end of orders."""
        return sys.stdin.readline()

    def _mark(self) -> None:
        # Events: the host does not wait for the device between steps.
        if self.device.type == "cuda":
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self._marks.append(event)
        else:
            self._marks.append(time.perf_counter())

    def _report(self) -> None:
        pairs, power = zip(self._marks, self._marks[1:], strict=False), power_of(self.device)
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            seconds = [before.elapsed_time(after) / 1e3 for before, after in pairs]
        else:
            seconds = [after - before for before, after in pairs]
        self.say(
            {
                "seconds": seconds,
                "cpu_seconds": cpu_seconds() - self._cpu,
                "loss": [float(loss) for loss in self._losses],
                "counts": self._counts,
                "memory": peak_memory(self.device),
                **power,
            }
        )

    def say(self, answer: dict[str, Any]) -> None:
        """Give an answer."""
        self._out.write(json.dumps(answer) + "\n")
        self._out.flush()


def _end_with(parent: int) -> None:
    """End this process when its parent has been killed, even in the middle of a step."""
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)


def cpu_seconds() -> float:
    """Processor time of this process, all threads."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def power_of(device: torch.device) -> dict[str, float]:
    """Power (W) and clock (MHz) of a GPU that is still busy, from NVML (nvidia-ml-py); empty where there is none."""
    try:
        return {"watts": torch.cuda.power_draw(device) / 1e3, "clock_mhz": float(torch.cuda.clock_rate(device))}
    except (ImportError, RuntimeError, AssertionError):
        return {}


def peak_memory(device: torch.device) -> dict[str, float]:
    """Peak GiB since `reset_peak_memory_stats` on CUDA (allocated, reserved); the process's peak resident set on the CPU."""
    if device.type == "cuda":
        return {
            "allocated_gib": torch.cuda.max_memory_allocated(device) / 2**30,
            "reserved_gib": torch.cuda.max_memory_reserved(device) / 2**30,
        }
    return {"resident_gib": peak_resident_bytes() / 2**30}


def peak_resident_bytes() -> int:
    """Peak resident set of this process. (getrusage's starts with the peak of the parent process.)"""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:")) * 1024
