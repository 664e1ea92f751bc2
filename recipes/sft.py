"""Supervised fine-tuning (SFT) on conversations: predict each assistant turn and its end token, with NEFTune noise.

    python -m recipes.sft recipes/shisa/sft.toml --out runs/sft

User and system messages are read and not trained on (SFT masking): their tokens have no weight in the loss.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from engine.settings.training import TrainSettings, check_neftune
from recipes.command import command


@dataclass(frozen=True, kw_only=True)
class SftSettings(TrainSettings):
    """Supervised fine-tuning. step_size counts all tokens of the conversations, trained or not."""

    neftune_alpha: float = 0.0
    """NEFTune: scale of the noise on embeddings while training, 5 in the Shisa recipe; 0 for none."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_neftune(self.neftune_alpha)


def run(settings: SftSettings) -> Path | None:
    """Train; returns the last checkpoint's folder (None for a dry run or a replay)."""
    from engine.objectives.next_token import NextToken
    from engine.run import open_run
    from recipes.training import train_next_token

    objective = NextToken(neftune_alpha=settings.neftune_alpha, seed=settings.seed)
    return train_next_token(open_run(settings, ("conversations", "text")), objective, chat=True)


def main(argv: Sequence[str] | None = None) -> None:
    command(SftSettings, run, argv, "python -m recipes.sft")


if __name__ == "__main__":
    main()
