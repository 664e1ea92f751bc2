"""Everything that needs a GPU, most valuable first, for a visit of minutes: python -m benchmarks.gpu --out FOLDER

Each task is a process with a time limit and a file of its own, FOLDER/<task>.json; a task that fails or is cut off leaves its
rows and stops no other. Starting the command again skips the tasks whose file is whole, so that several short visits add up.
The folder is flat and has one file a task, and a drawing of a training task. Exit status 0: every file is whole.

The machine needs torch, triton, numpy, safetensors, sentencepiece and huggingface_hub; peers need transformers and the packages
in `benchmarks/requirements.txt`. Where files were copied without their history, set KOMAINU_COMMIT=$(git rev-parse HEAD).
"""

import argparse
import importlib
import json
import re
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.processes import ROOT, run_apart

_LEAST_SECONDS = 5.0
_SHISA: dict[str, Any] = {"preset": "shisa-7b", "sequence": 4096, "micro_batch": 2, "rounds": 3, "limit": 90.0}
_LEAN: dict[str, Any] = {"moments": "bfloat16", "recompute": "light", "micro_batch": 4, "warmup": 1, "steps": 1}
_PEERS = ("transformers eager", "transformers + Liger", "torchtitan Llama")
_TRL = ("TRL SFT padding-free", "TRL SFT packed", "TRL DPO", "TRL DPO precomputed")
_BOTH: dict[str, Any] = {"documents": "mixed", "sweep": ("objective=sft,dpo",)}


@dataclass(frozen=True)
class Task:
    seconds: float  # limit
    module: str  # of `benchmarks`; "tests": the tests marked gpu
    settings: str = ""  # class in the module
    values: dict[str, Any] = field(default_factory=dict)
    suffix: str = ".json"


TASKS: dict[str, Task] = {
    "whole": Task(
        240, "train", "TrainBenchSettings", _SHISA | _LEAN | {"sweep": ("precision=dtype,fp8", "offload=none,moments")}
    ),
    "fp8": Task(120, "fp8_products", "Fp8ProductSettings"),
    "peers": Task(150, "train", "TrainBenchSettings", _SHISA | {"layers": 8, "peers": _PEERS}),
    "trl": Task(200, "train", "TrainBenchSettings", _SHISA | {"layers": 4, "peers": _TRL} | _BOTH),
    "kernels": Task(240, "kernels", "KernelSettings", {"rounds": 2}),
    "ladder": Task(150, "train", "TrainBenchSettings", _SHISA | {"layers": 4, "ladder": True}),
    "tune": Task(240, "tune", "TuneSettings"),
    "tests": Task(300, "tests", suffix=".xml"),
}


def settings_of(name: str, device: str, out: str) -> tuple[Any, Any]:
    """(a task's settings, the function that runs them). Parses no command line: the machine may lack the parser."""
    task = TASKS[name]
    module = importlib.import_module(f"benchmarks.{task.module}")
    return getattr(module, task.settings)(**task.values, device=device, out=out), module.run


def is_whole(path: Path) -> bool:
    """Whether a task's file is there with all of its rows; pytest writes its file at the end."""
    try:
        return (path.suffix == ".xml" and path.is_file()) or json.loads(path.read_text(encoding="utf-8"))["complete"]
    except (OSError, ValueError, KeyError):
        return False


def run_tests(out: Path, folder: Path = ROOT / "tests") -> int:
    """Run the tests marked gpu. Only their files are collected: other files may import what the machine lacks."""
    import pytest

    named = re.compile(r"mark\.gpu|triton_device")
    files = [str(path) for path in sorted(folder.rglob("test_*.py")) if named.search(path.read_text(encoding="utf-8"))]
    return int(pytest.main(["-m", "gpu", "-q", "-p", "no:cacheprovider", f"--junitxml={out}", *files]))


def run_task(name: str, device: str, out: Path) -> None:
    """Run a task in this process."""
    if name == "tests":
        raise SystemExit(run_tests(out))
    settings, run = settings_of(name, device, str(out))
    run(settings, f"python -m benchmarks.gpu --task {name}")


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description="Everything that needs a GPU, at once.")
    parser.add_argument("--out", type=Path, default=Path("runs/gpu"), help="folder of the results (default runs/gpu)")
    parser.add_argument("--minutes", type=float, default=9.0, help="for all tasks together (default 9)")
    parser.add_argument("--tasks", nargs="+", default=list(TASKS), choices=list(TASKS), help="default: all, in this order")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--task", choices=list(TASKS), help="run one task here, without a limit")
    given = parser.parse_args(argv)
    out = given.out.expanduser().resolve()
    out.mkdir(parents=True, exist_ok=True)
    files = {name: out / f"{name}{TASKS[name].suffix}" for name in TASKS}
    if given.task:
        run_task(given.task, given.device, files[given.task])
        return
    # SIGTERM unwinds the stack, so that the running task ends too.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    start, ends = time.monotonic(), {}
    for name in given.tasks:
        limit = min(TASKS[name].seconds, 60 * given.minutes - (time.monotonic() - start))
        if is_whole(files[name]):
            ends[name] = "whole before"
        elif limit < _LEAST_SECONDS:
            ends[name] = "not started: no time left"
        else:
            print(f"== {name}: at most {limit:.0f} s", flush=True)
            arguments = ["-m", "benchmarks.gpu", "--task", name, "--device", given.device, "--out", str(out)]
            ends[name] = f"{run_apart(arguments, limit=limit)} after {time.monotonic() - start:.0f} s in all"
    for name, end in ends.items():
        print(f"{name:<8} {end}; {files[name].name} is {'whole' if is_whole(files[name]) else 'not whole'}")
    raise SystemExit(0 if all(is_whole(files[name]) for name in given.tasks) else 1)


if __name__ == "__main__":
    main()
