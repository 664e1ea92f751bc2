"""What each part of `benchmarks.gpu` does in its own process: python -m benchmarks.gpu_parts PART TASK FILE [REHEARSAL].

REHEARSAL is the device of one that is tiny: cpu or cuda.

Settings are made here in code, as a borrowed machine need not have what reads command lines.
"""

import importlib
import importlib.util
import os
import re
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks import measure
from engine.environment import choose_device, report

# The settings' class of each benchmark.
SETTINGS = {
    "kernels": "KernelSettings", "train": "TrainBenchSettings", "finetune": "FinetuneBenchSettings",
    "checkpoint": "CheckpointSettings", "data": "DataSettings",
}  # fmt: skip
_TRAIN: dict[str, Any] = {
    "preset": "shisa-7b", "layers": 8, "sequence": 4096, "micro_batch": 2, "rounds": 3, "limit": 60.0,
}  # fmt: skip
_OBJECTIVES: dict[str, dict[str, Any]] = {
    "next-token": {"peers": ("transformers eager", "transformers + Liger", "torchtitan Llama")},
    "ladder": {"ladder": True, "layers": 4},
    # All of Shisa 7B, its plan beside what it takes.
    "whole": {
        "layers": 0, "micro_batch": 4, "recompute": "light", "moments": "bfloat16", "warmup": 1, "steps": 1,
        "sweep": ("offload=none,moments",),
    },
    "sft": {"objective": "sft", "layers": 4, "documents": "mixed", "peers": ("TRL SFT padding-free", "TRL SFT packed")},
    "dpo": {"objective": "dpo", "layers": 4, "documents": "mixed", "peers": ("TRL DPO", "TRL DPO precomputed")},
    # Apart, as it takes a minute to compile.
    "compiled": {"peers": ("transformers compile",), "layers": 4, "limit": 90.0},
}  # fmt: skip
_CHECKPOINTS = ("komainu", "torch.distributed.checkpoint")
# Each holds a CUDA context and the tensors of one test.
_MOST_TEST_PROCESSES = 10
# What a GPU is to measure. Shisa 7B's shapes; as many layers as leave room for the state of an optimizer that keeps everything.
TASKS: dict[tuple[str, str], dict[str, Any]] = {
    ("kernels", ""): {"rounds": 2},
    **{("train", name): {**_TRAIN, **more} for name, more in _OBJECTIVES.items()},
    ("finetune", ""): {"rounds": 3, "steps": 2, "limit": 60.0},
    ("checkpoint", ""): {"preset": "mistral-7b", "layers": 1, "rounds": 2, "limit": 60.0, "providers": _CHECKPOINTS},
    # What a GPU changes: where micro-batches go. The rest is any machine's.
    ("data", ""): {"parts": ("load",), "step_seconds": (0.1,)},
}  # fmt: skip
_TINY: dict[str, Any] = {"rounds": 1, "steps": 1, "warmup": 1, "threads": 1}
REHEARSALS: dict[tuple[str, str], dict[str, Any]] = {
    # Without torch.compile, which takes a CPU minutes.
    ("kernels", ""): {"tokens": (64,), "rounds": 1, "repeats": 1, "providers": ("komainu", "eager")},
    **{("train", name): {**_TINY, "preset": "tiny", "sequence": 32, **more} for name, more in _OBJECTIVES.items()},
    ("finetune", ""): {
        **_TINY, "preset": "tiny", "step_tokens": 128, "step_pairs": 2, "conversation_length": 128, "pair_length": 256,
    },
    ("checkpoint", ""): {"preset": "tiny", "rounds": 1, "providers": _CHECKPOINTS},
    ("data", ""): {
        "documents": 20, "context_length": 128, "step_size": 512, "steps": 2, "rounds": 1, "step_seconds": (0.01,),
        "plan_documents": (1000,),
    },
}  # fmt: skip


def environment(out: Path, rehearsal: str) -> None:
    """What the machine reaches, of which all fractions are; what is installed goes to the log."""
    device = choose_device(rehearsal or "cuda")
    for what, value in report():
        print(f"{what:<16} {value}")
    rows: list[dict[str, Any]] = []
    for dtype in (torch.bfloat16, torch.float32):
        # A processor without bfloat16 products takes seconds for one.
        reached = measure.ceilings(device, dtype, repeats=1 if rehearsal else 10)
        name = str(dtype).removeprefix("torch.")
        rows.append({"what": f"matrix product, {name}", "unit": "TFLOP/s", "reached": reached["product_flops"] / 1e12})
    rows.append({"what": "copy", "unit": "GB/s, read and written", "reached": reached["copy_bytes"] / 1e9})
    _write(out, "environment", device, rows)


def gpu_tests(out: Path, rehearsal: str, folder: Path = measure.ROOT / "tests", processes: int = 0) -> None:
    """The tests in `folder` that need a GPU. Those of the rehearsal are collected and skip, as there is none.

    Only files that name the mark are collected, so that what others need and a machine lacks is no failure. Where pytest-xdist
    is installed, processes share the tests: most of their time is the host's, which compiles kernels.
    """
    import pytest

    device = choose_device(rehearsal or "cuda")
    if rehearsal:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    # `triton_device` is the fixture that runs a test of the kernels on a GPU.
    named = re.compile(r"mark\.gpu|triton_device")
    found = [path for path in sorted(folder.rglob("test_*.py")) if named.search(path.read_text(encoding="utf-8"))]
    # Those of the kernels come first, all else runs on them; the benchmarks' own last: what they test is measured right behind.
    order = {"kernels": 0, "benchmarks": 2}
    files = [str(path) for path in sorted(found, key=lambda path: order.get(path.parent.name, 1))]
    record = _Record(out, device)
    arguments = ["-m", "gpu", "-q", "-p", "no:cacheprovider", "--continue-on-collection-errors"]
    processes = processes or min(_MOST_TEST_PROCESSES, (os.cpu_count() or 1) - 1)
    if processes > 1 and importlib.util.find_spec("xdist"):
        arguments += ["-n", str(processes), "--dist", "loadgroup"]
    status = pytest.main([*arguments, *files], [record])
    record.write(complete=True)
    raise SystemExit(0 if status in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED) else int(status))


class _Record:
    """Writes each test's outcome as soon as it is known, so that a run that is cut off leaves them."""

    def __init__(self, out: Path, device: torch.device):
        self.out, self.device = out, device
        self.rows: list[dict[str, Any]] = []
        self.written = time.monotonic()

    def pytest_collectreport(self, report: Any) -> None:
        if report.failed:
            self._add(report, "failed")

    def pytest_runtest_logreport(self, report: Any) -> None:
        # A test has one outcome of three reports: its call's, or that of a set-up or tear-down that was not passed.
        if report.when == "call" or report.outcome != "passed":
            self._add(report, report.outcome)

    def _add(self, report: Any, outcome: str) -> None:
        row = {"test": report.nodeid, "outcome": outcome, "seconds": round(getattr(report, "duration", 0.0), 3)}
        if outcome == "failed":
            row["why"] = report.longreprtext.splitlines()[-20:]
        elif outcome == "skipped":
            row["why"] = str(report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longrepr)
        self.rows.append(row)
        if time.monotonic() - self.written > 1:
            self.write(complete=False)

    def write(self, *, complete: bool) -> None:
        _write(self.out, "tests", self.device, self.rows, complete=complete)
        self.written = time.monotonic()


def _write(out: Path, name: str, device: torch.device, rows: list[dict[str, Any]], *, complete: bool = True) -> None:
    measure.write_result(out, measure.result(name, " ".join(sys.argv), device, {}, rows, complete=complete))


CHECKS: dict[str, Callable[[Path, str], None]] = {"environment": environment, "tests": gpu_tests}


def benchmark(part: str, name: str, out: str, *, rehearsal: str) -> tuple[Any, Callable[[Any], Any]]:
    """(settings, what to call with them) of a benchmark's task."""
    module = importlib.import_module(f"benchmarks.{part}")
    table = {**(REHEARSALS if rehearsal else TASKS)[part, name], "device": rehearsal or "cuda", "out": out}
    return getattr(module, SETTINGS[part])(**table), module.run


def main(argv: Sequence[str] | None = None) -> None:
    part, name, out, *rest = list(sys.argv[1:] if argv is None else argv)
    rehearsal = rest[0] if rest else ""
    if part in CHECKS:
        CHECKS[part](Path(out), rehearsal)
        return
    settings, run = benchmark(part, name, out, rehearsal=rehearsal)
    run(settings)


if __name__ == "__main__":
    main()
