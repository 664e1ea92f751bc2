"""What the training recipes share: show the run, stop there for a dry run, else evaluate and train."""

from pathlib import Path

from engine.data.batch import evaluation_batches
from engine.data.dataset import TokenDataset
from engine.loop import train
from engine.objectives.heldout import Evaluation, whole_step
from engine.objectives.next_token import NextToken
from engine.observe.preview import describe, sample
from engine.observe.replay import replay
from engine.run import Run


def announce(run: Run) -> bool:
    """Print what the run will do. Returns whether to go on: not for a dry run, which prints a sample as well."""
    if run.ranks.main:
        print("\n".join(describe(run)))
        if run.settings.dry_run:
            print("\n".join(sample(run)))
            print("dry run: nothing was trained or written")
    return not run.settings.dry_run


def train_next_token(run: Run, objective: NextToken) -> Path | None:
    """Pre-training or supervised fine-tuning with its held-out sets, or one step of it once more."""
    evaluations = [
        Evaluation(name, objective, whole_step(heldout_batches(run, dataset))) for name, dataset in run.heldout.items()
    ]
    if not announce(run):
        return None
    if run.settings.replay:
        return replay(run, run.load_model(), objective)
    return train(run, run.load_model(), objective, evaluations)


def heldout_batches(run: Run, dataset: TokenDataset):
    """A held-out set in micro-batches of the run's size. Raises: ValueError where none of it fits the context."""
    settings = run.settings
    batches = evaluation_batches(
        dataset,
        run.packing,
        settings.context_length,
        limit=settings.heldout_limit,
        share_prompts=run.plan.share_prompts,
    )
    if not batches:
        raise ValueError(f"{dataset.folder}: nothing to evaluate within context_length = {settings.context_length}; raise it")
    return batches
