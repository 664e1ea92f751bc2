"""Whole runs on several ranks, for test_parallel.py: python -m tests.engine.several_ranks JOBS.json

A job is [ranks, [[stage, settings], ...]]: so many processes, forked from this one as imports are dear, do these runs one after
the other.
"""

import json
import sys
from pathlib import Path

import torch
import torch._dynamo  # what several ranks import on first use

from engine.distributed.ranks import leave
from engine.settings.toml import from_table
from recipes import dpo, pretrain, sft
from recipes.dpo import DpoSettings
from recipes.pretrain import PretrainSettings
from recipes.sft import SftSettings
from tests.engine.forked_ranks import end_of, fork_ranks

RECIPES = {"pretrain": (pretrain, PretrainSettings), "sft": (sft, SftSettings), "dpo": (dpo, DpoSettings)}


def runs(stages: list) -> None:
    for stage, table in stages:
        recipe, settings_class = RECIPES[stage]
        recipe.run(from_table(settings_class, table))
    leave()


def main() -> None:
    torch.set_num_threads(1)
    for ranks, stages in json.loads(Path(sys.argv[1]).read_text()):
        if any(end_of(fork_ranks(ranks, lambda _, stages=stages: runs(stages)))):
            raise SystemExit(f"a process of {ranks} failed")


if __name__ == "__main__":
    main()
