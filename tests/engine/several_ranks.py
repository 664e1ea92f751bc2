"""Whole runs on several ranks, for test_parallel.py: python -m tests.engine.several_ranks JOBS.json

A job is [ranks, [[stage, settings], ...]]: so many processes, forked from this one as imports are dear, do these runs one after
the other.
"""

import json
import os
import socket
import sys
import traceback
from pathlib import Path

import torch

from engine.config import from_table
from engine.parallel import leave
from recipes import dpo, pretrain, sft
from recipes.dpo import DpoSettings
from recipes.pretrain import PretrainSettings
from recipes.sft import SftSettings

RECIPES = {"pretrain": (pretrain, PretrainSettings), "sft": (sft, SftSettings), "dpo": (dpo, DpoSettings)}


def runs(stages: list) -> None:
    for stage, table in stages:
        recipe, settings_class = RECIPES[stage]
        recipe.run(from_table(settings_class, table))
    leave()


def start(rank: int, ranks: int, port: int, stages: list) -> int:
    """Process id of a rank, which has its environment as torchrun would have set it."""
    child = os.fork()
    if child:
        return child
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(ranks), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    try:
        runs(stages)
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    sys.stdout.flush()
    os._exit(0)


def main() -> None:
    torch.set_num_threads(1)
    for ranks, stages in json.loads(Path(sys.argv[1]).read_text()):
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        children = [start(rank, ranks, port, stages) for rank in range(ranks)]
        for child in children:
            if os.waitpid(child, 0)[1]:
                raise SystemExit(f"a process of {ranks} failed")


if __name__ == "__main__":
    main()
