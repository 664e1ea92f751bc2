"""Command lines of Python, each in a fork of this process, which has imported what all of them need: that takes longer than
many of them do. python tests/kernels/forks.py '{"name": ["-m", "pytest", "file"]}'

As many run at once as there are cores. Of each that has ended a line says [name, status, output] in JSON.
"""

import gc
import json
import os
import runpy
import signal
import sys
import tempfile
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch._dynamo

import tests.conftest  # noqa: F401
from kernels.launch import INTERPRETED

if INTERPRETED:
    # What torch's checks of operators import on first use.
    import torch._inductor.compile_fx
    import torch.testing._internal.optests  # noqa: F401

_SECONDS = 1200


def main(jobs: Mapping[str, Sequence[str]]) -> None:
    gc.collect()
    gc.freeze()
    waiting, running = list(jobs.items()), {}
    with tempfile.TemporaryDirectory() as folder:
        while waiting or running:
            while waiting and len(running) < (os.cpu_count() or 1):
                name, arguments = waiting.pop(0)
                log = Path(folder, f"{len(waiting)}.log")
                running[_fork(arguments, log)] = name, log
            child, status = os.wait()
            name, log = running.pop(child)
            output = log.read_text(encoding="utf-8", errors="replace")
            print(json.dumps([name, os.waitstatus_to_exitcode(status), output]), flush=True)


def _fork(arguments: Sequence[str], log: Path) -> int:
    """The process that runs a command line and writes what it says to a file."""
    child = os.fork()
    if child:
        return child
    signal.alarm(_SECONDS)
    with log.open("wb") as output:
        for stream in (1, 2):
            os.dup2(output.fileno(), stream)
    status = 1
    try:
        _run(*arguments)
    except SystemExit as end:
        status = int(end.code or 0)
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    # Nothing of what the forking process would do at its end.
    os._exit(status)


def _run(first: str, *others: str) -> None:
    if first == "-m":
        sys.argv = list(others)
        runpy.run_module(others[0], run_name="__main__", alter_sys=True)
    else:
        sys.argv = [first, *others]
        runpy.run_path(first, run_name="__main__")


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
