"""Not a test: runs a training recipe several times, each in a process of its own, some of which kill themselves.

    python killed_runs.py recipes.pretrain config.toml point=folder ...

`point` says where the process that trains into `folder` sends itself SIGKILL: never, in an update, or while it writes its
second checkpoint; the run is then resumed in a new process. Prints {point: [exit code, newest complete checkpoint after it,
exit code of the resumed run]}. The processes are forked, so that torch is imported only once.
"""

import json
import os
import runpy
import signal
import sys
import tomllib
from pathlib import Path

import torch

import engine.checkpoint
import engine.loop
import engine.optimizer
import model.folder
import model.weights
from engine.checkpoint import newest_checkpoint
from model.weights import load_model


def cut(path):
    """Leave half of a file."""
    os.truncate(path, Path(path).stat().st_size // 2)


def patch(module, name, count, before=lambda *arguments: None, after=lambda *arguments: None, only=lambda *arguments: True):
    """Kill the process at the `count`th call of module.name, after running `before`, the call itself (if after), `after`."""
    original, calls = getattr(module, name), []

    def patched(*arguments, **named):
        calls.extend([1] if only(*arguments) else [])
        due = only(*arguments) and len(calls) == count
        if due:
            before(*arguments)
        if not due or after is not None:
            original(*arguments, **named)
        if due:
            if after is not None:
                after(*arguments)
            os.kill(os.getpid(), signal.SIGKILL)

    setattr(module, name, patched)


def half_written(part):
    """While the safetensors file of the weights or of the optimizer is half on the disk."""
    patch(
        model.weights, "save_file", 2, after=lambda tensors, path: cut(path),
        only=lambda tensors, path: Path(path).name.startswith(part),
    )  # fmt: skip


POINTS = {
    "never": lambda: None,
    # Between two parameters of the third step's update.
    "update": lambda: patch(engine.optimizer, "adamw_", 40),
    "weights": lambda: half_written("model"),
    "optimizer": lambda: half_written("optimizer"),
    # The last file written is the state; here it is cut, too.
    "rename": lambda: patch(
        model.folder, "replace_folder", 2, after=None, before=lambda part, _: cut(part / "training/state.json")
    ),
    "latest": lambda: patch(engine.checkpoint, "point_latest_at", 2, after=None),
    "removal": lambda: patch(
        engine.checkpoint.shutil, "rmtree", 1, after=None, before=lambda path: (path / "config.json").unlink(),
        only=lambda path, **_: Path(path).name.endswith(".old") and "step-" in Path(path).name and Path(path).is_dir(),
    ),
}  # fmt: skip


def train(recipe, toml, out, point):
    """Exit code of one run, negative for the signal that ended it."""
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    POINTS[point]()
    sys.argv = [recipe, toml, "--out", out]
    try:
        runpy.run_module(recipe, run_name="__main__")
    except BaseException as error:
        print(repr(error), file=sys.stderr)
        os._exit(1)
    os._exit(0)


def main():
    recipe, toml, *cases = sys.argv[1:]
    torch.set_num_threads(1)
    # A killed process loses nothing that it has written; only a machine that stops does.
    os.fsync = lambda handle: None
    # Whatever torch imports on first use is imported before the forks.
    load_model(tomllib.loads(Path(toml).read_text())["model"])
    results = {}
    for case in cases:
        point, out = case.split("=", 1)
        code = train(recipe, toml, out, point)
        newest = newest_checkpoint(out)
        results[point] = [code, newest and newest.name, train(recipe, toml, out, "never")]
    print(json.dumps(results))


if __name__ == "__main__":
    main()
