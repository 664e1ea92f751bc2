"""Runs work in processes of its own, so that it shares no memory, threads or crashes with other work."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.results import ROOT

try:
    import psutil
except ImportError:  # `end` then reaches the process group only
    psutil = None


def end(process: subprocess.Popen) -> None:
    """End a process and everything that it started; it must lead a session of its own."""
    family = []
    if psutil is not None:
        with contextlib.suppress(psutil.NoSuchProcess):
            family = psutil.Process(process.pid).children(recursive=True)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    for member in family:
        with contextlib.suppress(psutil.NoSuchProcess):
            member.kill()
    process.wait()


def run_apart(
    arguments: Sequence[str],  # of Python
    *,
    limit: float,  # seconds
    output: Any = None,  # a file for its output; None: this process's own
) -> str:
    """Run `python <arguments>` from the checkout's root. Returns "done", "failed (exit N)" or "cut off after N s"."""
    process = subprocess.Popen(
        [sys.executable, *arguments],
        cwd=ROOT,
        stdin=subprocess.DEVNULL,
        stdout=output,
        stderr=subprocess.STDOUT if output is not None else None,
        start_new_session=True,
    )
    try:
        code = process.wait(timeout=limit)
        return "done" if code == 0 else f"failed (exit {code})"
    except subprocess.TimeoutExpired:
        return f"cut off after {limit:.0f} s"
    finally:
        # Also when this process is interrupted: nothing else ends a session of its own.
        end(process)


class ApartError(RuntimeError):
    """A process failed; the message says how it ended, and its last line."""


def call_apart(module: str, function: str, arguments: Mapping[str, Any], *, limit: float) -> Any:
    """Call a module's function in a process of its own; arguments and answer pass as JSON. Raises: ApartError."""
    program = (
        "import importlib, json, pathlib, sys; module, function, arguments, out = sys.argv[1:]; "
        "answer = getattr(importlib.import_module(module), function)(**json.loads(arguments)); "
        "pathlib.Path(out).write_text(json.dumps(answer))"
    )
    with tempfile.TemporaryDirectory(prefix="komainu-") as folder, tempfile.TemporaryFile("w+", errors="replace") as output:
        out = Path(folder) / "answer.json"
        status = run_apart(["-c", program, module, function, json.dumps(arguments), str(out)], limit=limit, output=output)
        if status != "done":
            output.seek(0)
            raise ApartError(f"{status}: {(output.read().strip().splitlines() or ['no output'])[-1]}"[:300])
        return json.loads(out.read_text())
