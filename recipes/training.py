"""The steps that the training recipes share: show the run, then stop (dry run), replay one step, or train."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from engine.checkpoint.room import check_room
from engine.continuing import set_aside
from engine.data.batch import EvaluationBatches, evaluation_batches
from engine.data.dataset import TokenDataset
from engine.inference.prompts import FilePrompt, read_prompts
from engine.inference.samples import Samples
from engine.loop import train
from engine.objectives.heldout import Evaluation
from engine.objectives.next_token import NextToken
from engine.objectives.preference import Preference
from engine.observe.closing import closing_lines
from engine.observe.evaluating import Extras
from engine.observe.memory_limits import check_memory, out_of_memory_explained
from engine.observe.preview import describe, sample
from engine.observe.replay import replay
from engine.run import Run
from model.mistral import Mistral
from recipes.report.page import REPORT, write_report
from recipes.report.reading import METRICS


def announce(run: Run) -> bool:
    """Print what the run will do. Returns whether to go on; a dry run also prints a sample, and ends here."""
    room = [] if run.settings.replay else check_room(run)
    if run.ranks.main:
        print("\n".join([*describe(run), *room]))
    warnings = [] if run.settings.replay else check_memory(run)
    if run.ranks.main:
        print("".join(f"{line}\n" for line in warnings), end="")
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


def train_next_token(run: Run, objective: NextToken, *, chat: bool) -> Path | None:
    """Pre-training or supervised fine-tuning, evaluated on the held-out datasets.

    Args: chat: answer `evaluate.prompts` in the chat template.
    Returns: the last checkpoint's folder; None for a dry run or a replay.
    """
    evaluations = [
        Evaluation(name, objective, heldout_batches(run, dataset).as_step()) for name, dataset in run.heldout.items()
    ]
    extras = extras_of(run, chat=chat)
    if not announce(run):
        return None
    with out_of_memory_explained(run):
        return train_to_end(run, run.load_model(), objective, evaluations, extras)


def train_to_end(
    run: Run,
    model: Mistral,
    objective: NextToken | Preference,
    evaluations: Sequence[Evaluation],
    extras: Extras,
) -> Path | None:
    """Train and say how it ended; or replay the step that the settings name.

    Returns: the last checkpoint's folder; None for a replay.
    """
    if run.settings.replay:
        return replay(run, model, objective)
    with reporting(run):
        last = train(run, model, objective, evaluations, extras)
        if run.ranks.main:
            print("\n".join(closing_lines(run, last)))
    return last


def extras_of(run: Run, *, chat: bool) -> Extras:
    """What the settings' section `evaluate` asks of each evaluation.

    Args: chat: prompts are a user's messages in the chat template; otherwise beginnings of texts.
    Raises: ValueError or FileNotFoundError for prompts that cannot be answered and tasks that cannot be asked.
    """
    settings = run.settings.evaluate
    if run.settings.replay:
        return Extras()
    samples = scores = None
    if settings.prompts:
        # Rank 0 reads the file: other machines may not have it.
        read = run.ranks.decided(
            lambda: [
                [prompt.text, prompt.ids]
                for prompt in read_prompts(
                    settings.prompts, run.tokenizer, run.config, chat=chat, new_tokens=settings.new_tokens
                )
            ]
        )
        prompts = [FilePrompt(text, ids) for text, ids in read]
        samples = Samples(prompts, settings.sampling, run.tokenizer, run.ranks, run.pack_tokens)
    if settings.tasks:
        try:
            import lm_eval  # noqa: F401
        except ImportError:
            raise ValueError(
                "evaluate.tasks: lm_eval is not installed; install the extra eval, pip install -e '.[eval]', or leave tasks out"
            ) from None
        from recipes.evaluation.while_training import TaskScores

        scores = TaskScores(run)
    return Extras(samples, scores)


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
