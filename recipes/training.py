"""The steps that the training recipes share: show the run, then stop (dry run), replay one step, or train."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from engine.checkpoint.room import check_room
from engine.continuing import set_aside
from engine.data.batch import EvaluationBatches, evaluation_batches
from engine.data.dataset import TokenDataset
from engine.loop import train
from engine.objectives.heldout import Evaluation
from engine.objectives.next_token import NextToken
from engine.observe.preview import describe, sample
from engine.observe.replay import replay
from engine.run import Run
from recipes.report.page import REPORT, write_report
from recipes.report.reading import METRICS


def announce(run: Run) -> bool:
    """Print what the run will do. Returns whether to go on; a dry run also prints a sample, and ends here."""
    room = [] if run.settings.replay else check_room(run)
    if run.ranks.main:
        print("\n".join([*describe(run), *room]))
        if run.settings.dry_run:
            print("\n".join(sample(run)))
            print("dry run: nothing was trained or written")
    if run.settings.dry_run:
        return False
    if run.trial is not None:
        moved = run.ranks.decided(lambda: str(set_aside(run.out)))
        if run.ranks.main:
            print(f"note       the trial of {run.trial.state.settings['steps']} steps in {run.out} is now {moved}")
    return True


def train_next_token(run: Run, objective: NextToken) -> Path | None:
    """Pre-training or supervised fine-tuning, evaluated on the held-out datasets.

    Returns: the last checkpoint's folder; None for a dry run or a replay.
    """
    evaluations = [
        Evaluation(name, objective, heldout_batches(run, dataset).as_step()) for name, dataset in run.heldout.items()
    ]
    if not announce(run):
        return None
    if run.settings.replay:
        return replay(run, run.load_model(), objective)
    with reporting(run):
        return train(run, run.load_model(), objective, evaluations)


@contextmanager
def reporting(run: Run) -> Iterator[None]:
    """Write the run's report at the end, also where the run stops or fails. Without a report the run goes well all the same."""
    try:
        yield
    finally:
        if run.ranks.main and (run.out / METRICS).is_file():
            report = run.out / REPORT
            try:
                write_report([run.out], report)
                print(f"report     {report}")
            except Exception as error:  # whatever it is, the checkpoints are there
                print(f"report     {report} was not written: {type(error).__name__}: {error}")


def heldout_batches(run: Run, dataset: TokenDataset) -> EvaluationBatches:
    """A held-out dataset in micro-batches. Raises: ValueError where no document of it fits the context."""
    return fitting_batches(run, dataset, run.settings.heldout_limit)


def fitting_batches(run: Run, dataset: TokenDataset, limit: int | None = None) -> EvaluationBatches:
    """Every document (or pair) that fits the context, or the first `limit`, in micro-batches of the run's size."""
    return evaluation_batches(
        dataset,
        run.packing,
        run.settings.context_length,
        limit=limit,
        share_prompts=run.plan.share_prompts,
    )
