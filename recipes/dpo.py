"""Preference tuning on pairs of answers (DPO and its relatives).

    python -m recipes.dpo recipes/shisa/dpo.toml --out runs/dpo

The reference is the model that the run starts from. Its log-probabilities of all pairs are computed once, before the first
step, and kept in a file named by what they depend on; while training there is one model in memory.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from engine.data.batch import Batch, evaluation_batches
from engine.data.dataset import TokenDataset
from engine.loop import train
from engine.objectives.heldout import Evaluation, whole_step
from engine.objectives.preference import Preference
from engine.objectives.reference import reference_tables
from engine.observe.replay import replay
from engine.run import Run, open_run
from engine.settings.sections import PreferenceSettings
from engine.settings.training import TrainSettings, check_neftune
from recipes.command import command
from recipes.training import announce, heldout_batches


@dataclass(frozen=True, kw_only=True)
class DpoSettings(TrainSettings):
    """Preference tuning. step_size counts pairs."""

    preference: PreferenceSettings = field(default_factory=PreferenceSettings)
    neftune_alpha: float = 0.0
    """Scale of the NEFTune noise on the policy's embeddings while training; the reference never has any."""
    share_prompts: bool = True
    """Compute the prompt that both answers of a pair have in common once, for the same loss and gradients. A run may not change
    it midway: NEFTune's noise on a shared prompt is one, not two."""
    reference_cache: str = ""
    """Folder of the reference's log-probabilities; default: `reference` in the run folder."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_neftune(self.neftune_alpha)


def run(settings: DpoSettings) -> Path | None:
    """Train; returns the last checkpoint's folder (None for a dry run)."""
    opened = open_run(settings, ("preferences",), share_prompts=settings.share_prompts)
    heldout = {name: heldout_batches(opened, dataset) for name, dataset in opened.heldout.items()}
    if not announce(opened):
        return None
    sets = {f"source {i}": (dataset, training_pairs(opened, dataset)) for i, dataset in enumerate(opened.datasets)}
    sets.update({f"heldout {name}": (opened.heldout[name], batches) for name, batches in heldout.items()})
    cache = Path(settings.reference_cache) if settings.reference_cache else opened.out / "reference"
    tables, model = reference_tables(opened, sets, cache)

    def objective(*names: str) -> Preference:
        reference = [tables[name] for name in names]
        return Preference(settings.preference, reference, neftune_alpha=settings.neftune_alpha, seed=settings.seed)

    trained = objective(*(f"source {i}" for i in range(len(opened.datasets))))
    if settings.replay:
        return replay(opened, model, trained)
    evaluations = [Evaluation(name, objective(f"heldout {name}"), whole_step(batches)) for name, batches in heldout.items()]
    return train(opened, model, trained, evaluations)


def training_pairs(run: Run, dataset: TokenDataset) -> list[Batch]:
    """Every pair of a source that fits the context."""
    return evaluation_batches(dataset, run.packing, run.settings.context_length, share_prompts=run.plan.share_prompts)


def main(argv: Sequence[str] | None = None) -> None:
    command(DpoSettings, run, argv, "python -m recipes.dpo")


if __name__ == "__main__":
    main()
