"""Preference tuning on pairs of answers: DPO and its conservative, robust and length-normalised forms, IPO, the hinge loss, APO
and SimPO, each with or without an SFT term.

    python -m recipes.dpo recipes/shisa/dpo.toml --out runs/dpo

The reference model is the model that the run starts from. Its log-probabilities of all pairs are computed once, before the
first step, and cached in a file named by a hash of configuration, weights and data. While training, one model is in memory.
SimPO has no reference model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from engine.settings.sections import PreferenceSettings
from engine.settings.toml import PathName
from engine.settings.training import TrainSettings, check_neftune
from recipes.command import command

if TYPE_CHECKING:
    from engine.data.batch import EvaluationBatches
    from engine.observe.evaluating import Extras
    from engine.run import Run


@dataclass(frozen=True, kw_only=True)
class DpoSettings(TrainSettings):
    """Preference tuning. step_size counts pairs."""

    preference: PreferenceSettings = field(default_factory=PreferenceSettings)
    neftune_alpha: float = 0.0
    """NEFTune: scale of the noise on the policy's embeddings while training; 0 for none. The reference never has noise."""
    share_prompts: bool = True
    """Compute the common prompt of a pair once for both answers: loss and gradients are the same. A run may not change this
    midway, because NEFTune draws one noise for a shared prompt and two for separate prompts."""
    reference_cache: PathName = ""
    """Folder for the reference's log-probabilities; default: `reference` in the run folder."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_neftune(self.neftune_alpha)


def run(settings: DpoSettings) -> Path | None:
    """Train; returns the last checkpoint's folder (None for a dry run or a replay)."""
    from engine.continuing import REFERENCE
    from engine.inputs import check_writable
    from engine.observe.memory_limits import out_of_memory_explained
    from engine.run import open_run
    from recipes.training import announce, extras_of, heldout_batches

    cache = Path(settings.reference_cache) if settings.reference_cache else Path(settings.out) / REFERENCE
    if not settings.replay and settings.preference.has_reference:
        check_writable(cache, "reference_cache")
    opened = open_run(settings, ("preferences",), share_prompts=settings.share_prompts)
    heldout = {name: heldout_batches(opened, dataset) for name, dataset in opened.heldout.items()}
    extras = extras_of(opened, chat=True)
    if not announce(opened):
        return None
    with out_of_memory_explained(opened):
        return _train(settings, opened, heldout, extras, cache)


def _train(
    settings: DpoSettings,
    opened: Run,
    heldout: dict[str, EvaluationBatches],
    extras: Extras,
    cache: Path,  # of the reference's log-probabilities
) -> Path | None:
    from engine.objectives.heldout import Evaluation
    from engine.objectives.preference import Preference
    from engine.objectives.reference import reference_tables
    from recipes.training import fitting_batches, train_to_end

    if settings.preference.has_reference:
        sets = {f"source {index}": (dataset, fitting_batches(opened, dataset)) for index, dataset in enumerate(opened.datasets)}
        sources = list(sets)
        sets |= {f"heldout {name}": (opened.heldout[name], batches) for name, batches in heldout.items()}
        tables, model = reference_tables(opened, sets, cache)
    else:
        sources, tables, model = [], {}, opened.load_model()

    def objective(*names: str) -> Preference:
        reference = [tables[name] for name in names if name in tables]
        return Preference(settings.preference, reference, neftune_alpha=settings.neftune_alpha, seed=settings.seed)

    evaluations = [Evaluation(name, objective(f"heldout {name}"), batches.as_step()) for name, batches in heldout.items()]
    return train_to_end(opened, model, objective(*sources), evaluations, extras)


def main(argv: Sequence[str] | None = None) -> None:
    command(DpoSettings, run, argv, "python -m recipes.dpo")


if __name__ == "__main__":
    main()
