"""Not a test: whole runs on several ranks, all forked from one process, because importing torch is slow.

    python -m tests.engine.distributed.rank_runs JOBS.json

A job is {"ranks", "output", "runs", "fault", "differs"}. Its ranks do the runs, [[stage, settings], ...], one after the other;
each rank prints to a file of its own, `output`.RANK. The second rank misbehaves as `fault` says, null for no fault, and its
settings change as `differs` says. Rank 0 prints the sizes and timeouts of its mesh's groups. All jobs run at once. Prints each
job's exit codes, negative for a signal.
"""

import json
import os
import signal
import sys
import time
from pathlib import Path

import torch
import torch._dynamo  # several ranks import it at first use

import engine.loop
import engine.run
from engine.distributed.ranks import leave
from engine.settings.toml import from_table
from recipes import dpo, pretrain, sft
from recipes.dpo import DpoSettings
from recipes.pretrain import PretrainSettings
from recipes.sft import SftSettings
from tests.engine.forked_ranks import end_of, fork_ranks, spare_forks_the_garbage

RECIPES = {"pretrain": (pretrain, PretrainSettings), "sft": (sft, SftSettings), "dpo": (dpo, DpoSettings)}
FAULTY_RANK, FAULTY_STEP = 1, 2


def hang_here():
    time.sleep(600)


# What the faulty rank does before each step (from 0).
FAULTS = {
    "killed": lambda step: os.kill(os.getpid(), signal.SIGKILL) if step == FAULTY_STEP else None,
    "hangs": lambda step: hang_here() if step == FAULTY_STEP else None,
    "lags": lambda step: time.sleep(0.5),
    "poisoned": lambda step: None,
}


def misbehave(fault):
    accumulate = engine.loop.accumulate

    def faulty(model, objective, step):
        FAULTS[fault](step.index)
        values = accumulate(model, objective, step)
        if fault == "poisoned" and step.index == FAULTY_STEP:
            values["loss"] = values["loss"] * float("nan")
        return values

    engine.loop.accumulate = faulty


def print_groups():
    """Print the size and timeout, in seconds, of each of rank 0's groups in the mesh that its runs make."""
    join = engine.run.join

    def printing(*arguments):
        ranks = join(*arguments)
        if ranks.main and ranks.mesh is not None:
            groups = [ranks.mesh.get_group(name)._get_backend(ranks.device) for name in ranks.mesh.mesh_dim_names]
            print("groups", [(group.size(), group.options._timeout.seconds) for group in groups])
        return ranks

    engine.run.join = printing


def rank_of(job, rank):
    # A file each: two ranks that print their stacks at once would mix them letter by letter.
    with open(f"{job['output']}.{rank}", "wb") as file:
        for number in (1, 2):
            os.dup2(file.fileno(), number)
    print_groups()
    if job["fault"] and rank == FAULTY_RANK:
        misbehave(job["fault"])
    for stage, table in job["runs"]:
        recipe, settings_class = RECIPES[stage]
        changes = job["differs"] if rank == FAULTY_RANK else {}
        recipe.run(from_table(settings_class, table | changes))
    leave()


def main():
    torch.set_num_threads(1)
    spare_forks_the_garbage()
    jobs = json.loads(Path(sys.argv[1]).read_text())
    started = [fork_ranks(job["ranks"], lambda rank, job=job: rank_of(job, rank)) for job in jobs]
    print(json.dumps([end_of(children) for children in started]))


if __name__ == "__main__":
    main()
