"""Runs on two ranks of which the second misbehaves, for test_guard.py: python -m tests.engine.faulty_ranks JOBS.json

A job is [fault, output file, [[stage, settings], ...]]. All jobs run at once, in processes forked from this one. Prints the
exit codes of each job's ranks, negative for the signal that ended one.
"""

import json
import os
import signal
import sys
import time
from pathlib import Path

import torch
import torch._dynamo  # what several ranks import on first use

import engine.loop
from tests.engine.forked_ranks import end_of, fork_ranks
from tests.engine.several_ranks import runs

RANKS, STEP = 2, 2


def hang_here():
    time.sleep(600)


# What the second rank does before a step (from 0), or to its part of the step's values.
FAULTS = {
    "killed": lambda step: os.kill(os.getpid(), signal.SIGKILL) if step == STEP else None,
    "hangs": lambda step: hang_here() if step == STEP else None,
    "lags": lambda step: time.sleep(0.5),
    "poisoned": lambda step: None,
}


def misbehaving(fault):
    accumulate = engine.loop.accumulate

    def run(model, objective, step):
        if os.environ["RANK"] == "1":
            FAULTS[fault](step.index)
        values = accumulate(model, objective, step)
        if fault == "poisoned" and os.environ["RANK"] == "1" and step.index == STEP:
            values["loss"] = values["loss"] * float("nan")
        return values

    return accumulate, run


def start_job(fault, output, stages):
    """Process ids of a job's ranks, which say all they have to say in the file `output`."""
    kept = [os.dup(1), os.dup(2)]
    with open(output, "wb") as file:
        for number in (1, 2):
            os.dup2(file.fileno(), number)
    original, engine.loop.accumulate = misbehaving(fault)
    try:
        return fork_ranks(RANKS, lambda _: runs(stages))
    finally:
        engine.loop.accumulate = original
        for number, copy in zip((1, 2), kept, strict=True):
            os.dup2(copy, number)
            os.close(copy)


def main():
    torch.set_num_threads(1)
    started = [start_job(*job) for job in json.loads(Path(sys.argv[1]).read_text())]
    print(json.dumps([end_of(job) for job in started]))


if __name__ == "__main__":
    main()
