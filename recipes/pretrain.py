"""Pre-training, continued or from fresh weights: predict every token of text documents.

python -m recipes.pretrain recipes/shisa/pretrain.toml --out runs/cpt
torchrun --standalone --nproc-per-node 8 --shutdown-timeout 600 -m recipes.pretrain recipes/shisa/pretrain.toml
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from engine.settings.training import TrainSettings
from recipes.command import command


@dataclass(frozen=True, kw_only=True)
class PretrainSettings(TrainSettings):
    """Pre-training. step_size counts tokens."""


def run(settings: PretrainSettings) -> Path | None:
    """Train; returns the last checkpoint's folder (None for a dry run or a replay)."""
    from engine.objectives.next_token import NextToken
    from engine.run import open_run
    from recipes.training import train_next_token

    return train_next_token(open_run(settings, ("text",)), NextToken(), chat=False)


def main(argv: Sequence[str] | None = None) -> None:
    command(PretrainSettings, run, argv, "python -m recipes.pretrain")


if __name__ == "__main__":
    main()
