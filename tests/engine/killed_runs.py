"""Not a test: training runs in processes of their own, with a fault at a named point.

    python -m tests.engine.killed_runs JOBS.json

A job is {"stage", "config", "ranks", "point", "rank", "then"}: `ranks` processes train as the configuration says, and the fault
at `point` happens in process `rank`. Then `then` processes without a fault resume the run: 0 for none, "restart" to let torch's
elastic agent, which torchrun is, start the same number again.

Prints a list of {"codes", "newest", "resumed", "output"}, one a job: the exit code of every process, negative for a signal; the
newest complete checkpoint after the fault; the exit codes of the resumed run; everything that the processes printed. All
processes are forked, because importing torch is slow.
"""

import json
import os
import resource
import signal
import sys
import tempfile
import threading
import time
import tomllib
import traceback
from pathlib import Path

import safetensors.torch
import torch
import torch._dynamo  # several ranks import it at first use
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

import engine.checkpoint.writing
import engine.loop
import engine.optim.adamw
import model.folder
import model.weights
from engine.checkpoint.state import newest_checkpoint
from engine.checkpoint.writing import Checkpointer
from recipes import dpo, pretrain, sft
from tests.engine.forked_ranks import end_of, fork_ranks, spare_forks_the_garbage

# Printed by a process that is about to get a signal in an evaluation.
IN_EVALUATION = "a signal in an evaluation"
RECIPES = {"pretrain": pretrain, "sft": sft, "dpo": dpo}


def cut(path):
    """Cut a file in half."""
    os.truncate(path, Path(path).stat().st_size // 2)


def kill(*_):
    os.kill(os.getpid(), signal.SIGKILL)


def at_call(owner, name, count, do, only=lambda *arguments: True, first=False):
    """Call `do` at the `count`th call of owner.name, counting calls for which `only` is true: after the call, or before it."""
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
    """Wait until the background thread has written a complete checkpoint."""
    while newest_checkpoint(tomllib.loads(Path(sys.argv[1]).read_text())["out"]) is None:
        time.sleep(0.01)


def fill_disk(*_):
    """Allow the faulty rank only files smaller than the optimizer's shards, like a full disk."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, resource.RLIM_INFINITY))


def full_for_a_while(moment, seconds):
    """A fault: the disk becomes full this many seconds after the first step has begun, and is freed some seconds later."""

    def arrange():
        def wait(*_):
            threading.Thread(target=fill_and_free, daemon=True).start()

        def fill_and_free():
            time.sleep(moment)
            fill_disk()
            time.sleep(seconds)
            free_disk()

        at_call(engine.loop, "accumulate", 1, wait, first=True)

    return arrange


def free_disk():
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))


def in_evaluation(evaluation, batch, number):
    """A fault: this signal comes before a micro-batch of an evaluation, each counted from 1 in this process."""

    def arrange():
        original, begun = engine.loop.evaluate, []

        def evaluate(model, evaluations, ranks, alive, stopping):
            begun.append([])

            def told():
                begun[-1].append(1)
                if len(begun) == evaluation and len(begun[-1]) == batch:
                    print(IN_EVALUATION, flush=True)
                    os.kill(os.getpid(), number)
                alive()

            return original(model, evaluations, ranks, told, stopping)

        engine.loop.evaluate = evaluate

    return arrange


def is_checkpoint(path, **_):
    return Path(path).name.endswith(".old") and "step-" in Path(path).name and Path(path).is_dir()


# Each point lies at the second checkpoint, or in the step after the first.
POINTS = {
    "never": lambda: None,
    # Between two parameters of the third step's update, once the first checkpoint is complete.
    "update": lambda: at_call(engine.optim.adamw, "adamw_", 40, then_killed(wait_for_checkpoint), first=True),
    # With half a file on the disk: one of the optimizer, and the one of the weights.
    "optimizer": lambda: at_call(safetensors.torch, "save", 2, kill, only=lambda tensors: any("exp_avg" in n for n in tensors)),
    "weights": lambda: at_call(model.weights, "write_tensor_file", 2, then_killed(lambda path, *_: cut(path))),
    # The state is the last file to be written; half of it is on the disk.
    "rename": lambda: at_call(
        model.folder, "replace_folder", 2, then_killed(lambda partial, _: cut(partial / "training/state.json")), first=True
    ),
    "latest": lambda: at_call(engine.checkpoint.writing, "point_latest_at", 2, kill, first=True),
    "removal": lambda: at_call(
        engine.checkpoint.writing.shutil,
        "rmtree",
        1,
        then_killed(lambda path: (path / "config.json").unlink()),
        only=is_checkpoint,
        first=True,
    ),
    "disk": lambda: at_call(Checkpointer, "save", 2, fill_disk, first=True),
    "term": lambda: at_call(engine.loop, "accumulate", 3, lambda *_: os.kill(os.getpid(), signal.SIGTERM), first=True),
}


def rank_of(job, fault, output):
    """Be one rank of a run; the environment gives its place, as torchrun sets it. Returns its exit code.

    fault: called before the run, to arrange what shall go wrong.
    """
    os.dup2(output, 1)
    os.dup2(output, 2)
    sys.stdout = sys.stderr = os.fdopen(1, "w", buffering=1)
    sys.argv[1] = job["config"]
    code = 1
    try:
        fault()
        RECIPES[job["stage"]].main([job["config"]])
        code = 0
    except SystemExit as end:
        free_disk()
        code = end.code if isinstance(end.code, int) else 1
        print(end.code)
    except BaseException:
        free_disk()
        traceback.print_exc()
    return code


def start_all(job, ranks, output, fault=POINTS["never"], faulty=0):
    """Process ids of the ranks of a run."""
    return fork_ranks(ranks, lambda rank: rank_of(job, fault if rank == faulty else POINTS["never"], output.fileno()))


def restarted_rank(job, output):
    """A rank that torch's elastic agent starts; the fault happens in the first attempt."""
    first = os.environ["TORCHELASTIC_RESTART_COUNT"] == "0" and os.environ["RANK"] == str(job["rank"])
    code = rank_of(job, POINTS[job["point"] if first else "never"], output)
    if code:
        os._exit(code)


def start_restarting(job, output):
    """Process id of an elastic agent: `torchrun --max-restarts 1` without its command line. Its ranks are forks too."""
    child = os.fork()
    if not child:
        config = LaunchConfig(
            min_nodes=1,
            max_nodes=1,
            nproc_per_node=job["ranks"],
            max_restarts=1,
            start_method="fork",
            monitor_interval=0.1,
            rdzv_backend="c10d",
            rdzv_endpoint="127.0.0.1:0",
            run_id="restarted",
        )
        try:
            elastic_launch(config, restarted_rank)(job, output.fileno())
        except BaseException:
            os._exit(1)
        os._exit(0)
    return child


def train(job):
    """Do a job. Returns its results."""
    out = tomllib.loads(Path(job["config"]).read_text())["out"]
    with tempfile.TemporaryFile() as output:
        if job["then"] == "restart":
            codes, resumed = end_of([start_restarting(job, output)]), []
        else:
            codes, resumed = end_of(start_all(job, job["ranks"], output, POINTS[job["point"]], job["rank"])), None
        newest = newest_checkpoint(out)
        if resumed is None:
            resumed = end_of(start_all(job, job["then"], output))
        output.seek(0)
        said = output.read().decode()
    return {"codes": codes, "newest": newest and newest.name, "resumed": resumed, "output": said}


def ready():
    """Prepare for the first fork."""
    torch.set_num_threads(1)
    engine.loop.PATIENCE = (0.0,)
    spare_forks_the_garbage()
    # fsync guards against a machine that stops; a killed process loses nothing that it has written.
    os.fsync = lambda handle: None


def main():
    ready()
    print(json.dumps([train(job) for job in json.loads(Path(sys.argv[1]).read_text())]))


if __name__ == "__main__":
    main()
