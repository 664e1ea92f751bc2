"""Not a test: runs of training recipes, each in processes of its own, in which something goes wrong at a named point.

    python -m tests.engine.killed_runs JOBS.json

A job is {"stage", "config", "ranks", "point", "rank", "then"}: `ranks` processes train as the configuration says, in process
`rank` the fault at `point` happens, and then (unless `then` is 0) the run is resumed by `then` processes without one. Prints a
list of {"codes", "newest", "resumed", "output"}: of each job the exit code of every process, negative for the signal that ended
it, the newest complete checkpoint after it, the exit codes of the resumed run, and what all of them said. The processes are
forked, so that torch is imported only once.
"""

import json
import os
import resource
import signal
import socket
import sys
import tempfile
import time
import tomllib
import traceback
from pathlib import Path

import safetensors.torch
import torch
import torch._dynamo  # what several ranks import on first use

import engine.checkpoint_writer
import engine.loop
import engine.optimizer
import model.folder
import model.weights
from engine.checkpoint import newest_checkpoint
from engine.checkpoint_writer import Checkpointer
from recipes import dpo, pretrain, sft

RECIPES = {"pretrain": pretrain, "sft": sft, "dpo": dpo}


def cut(path):
    """Leave half of a file."""
    os.truncate(path, Path(path).stat().st_size // 2)


def kill(*_):
    os.kill(os.getpid(), signal.SIGKILL)


def at_call(owner, name, count, do, only=lambda *arguments: True, first=False):
    """Let `do` happen at the `count`th call of owner.name (of those that `only` counts): after the call, or before it."""
    original, calls = getattr(owner, name), []

    def patched(*arguments, **named):
        calls.extend([1] if only(*arguments) else [])
        due = only(*arguments) and len(calls) == count
        if due and first:
            do(*arguments)
        result = original(*arguments, **named)
        if due and not first:
            do(*arguments)
        return result

    setattr(owner, name, patched)


def then_killed(*actions):
    return lambda *arguments: [action(*arguments) for action in (*actions, kill)]


def wait_for_checkpoint(*_):
    """Until there is a complete one, which is written in the background."""
    while newest_checkpoint(out_of(sys.argv[1])) is None:
        time.sleep(0.01)


def out_of(config):
    return tomllib.loads(Path(config).read_text())["out"]


def fill_disk(*_):
    """No file may grow beyond what the optimizer's shards need."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, resource.RLIM_INFINITY))


def is_checkpoint(path, **_):
    return Path(path).name.endswith(".old") and "step-" in Path(path).name and Path(path).is_dir()


# Each at the second checkpoint, or in the step after the first one.
POINTS = {
    "never": lambda: None,
    # Between two parameters of the third step's update, when the first checkpoint is complete.
    "update": lambda: at_call(engine.optimizer, "adamw_", 40, then_killed(wait_for_checkpoint), first=True),
    # While a file is half on the disk: of the optimizer, of the weights (which are written to one).
    "optimizer": lambda: at_call(safetensors.torch, "save", 2, kill, only=lambda tensors: any("exp_avg" in n for n in tensors)),
    "weights": lambda: at_call(model.weights, "write_tensor_file", 2, then_killed(lambda path, *_: cut(path))),
    # The last file written is the state; here it is cut, too.
    "rename": lambda: at_call(
        model.folder, "replace_folder", 2, then_killed(lambda partial, _: cut(partial / "training/state.json")), first=True
    ),
    "latest": lambda: at_call(engine.checkpoint_writer, "point_latest_at", 2, kill, first=True),
    "removal": lambda: at_call(
        engine.checkpoint_writer.shutil, "rmtree", 1, then_killed(lambda path: (path / "config.json").unlink()),
        only=is_checkpoint, first=True,
    ),
    "disk": lambda: at_call(Checkpointer, "save", 2, fill_disk, first=True),
    "term": lambda: at_call(engine.loop, "accumulate", 3, lambda *_: os.kill(os.getpid(), signal.SIGTERM), first=True),
}  # fmt: skip


def start(job, rank, ranks, port, point, output):
    """Process id of one rank of a run."""
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        os.dup2(output, 1)
        os.dup2(output, 2)
        sys.stdout = sys.stderr = os.fdopen(1, "w", buffering=1)
        sys.argv[1] = job["config"]
        POINTS[point]()
        os.environ.update(RANK=str(rank), WORLD_SIZE=str(ranks), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
        RECIPES[job["stage"]].main([job["config"]])
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 1
        print(end.code)
    except BaseException:
        traceback.print_exc()
    os._exit(code)


def train(job, ranks, point="never", faulty=0):
    """Exit codes of one run, and what it said."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    with tempfile.TemporaryFile() as output:
        children = [
            start(job, rank, ranks, port, point if rank == faulty else "never", output.fileno()) for rank in range(ranks)
        ]
        codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
        output.seek(0)
        return codes, output.read().decode()


def main():
    torch.set_num_threads(1)
    # A killed process loses nothing that it has written; only a machine that stops does.
    os.fsync = lambda handle: None
    results = []
    for job in json.loads(Path(sys.argv[1]).read_text()):
        codes, output = train(job, job["ranks"], job["point"], job["rank"])
        newest = newest_checkpoint(out_of(job["config"]))
        resumed, more = train(job, job["then"]) if job["then"] else ([], "")
        results.append({"codes": codes, "newest": newest and newest.name, "resumed": resumed, "output": output + more})
    print(json.dumps(results))


if __name__ == "__main__":
    main()
