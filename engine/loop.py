"""The training loop, one for pre-training, supervised fine-tuning and preference tuning.

`train_step` holds the numerics: forward, backward, clip, update. `train` holds the housekeeping: logging, evaluation,
checkpoints, stopping. The plan decides which tokens a step trains on and the objective what their loss is, so nothing here
knows which of the three it trains. Every rank runs this loop over its own part of each step.
"""

import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, closing
from pathlib import Path

from torch import Tensor
from torch.profiler import record_function

from engine.checkpoint.saving import PATIENCE, Saving
from engine.checkpoint.state import load_optimizer, point_latest_at
from engine.checkpoint.writing import Checkpointer
from engine.data.batch import Step
from engine.distributed.ranks import Ranks, lost_ranks_named
from engine.distributed.run_lock import run_lock
from engine.distributed.sharding import reduce_after
from engine.distributed.stop import NAMES, Interruption
from engine.estimate.flops import peak_flops, product_ceiling, recomputed_flops, step_flops
from engine.objectives import Objective
from engine.objectives.heldout import Evaluation
from engine.observe.evaluating import Extras, Signs, examine
from engine.observe.lineage import begin_log
from engine.observe.logged import was_evaluated
from engine.observe.metrics import Metrics, RunFacts, StepRecord
from engine.observe.profile import OPTIMIZER
from engine.observe.spikes import SpikeLog
from engine.observe.watch import Watch
from engine.optim.adamw import AdamW
from engine.optim.schedule import learning_rate
from engine.run import Run
from engine.settings.toml import to_table, to_toml
from model.folder import write_file
from model.mistral import Mistral

NOTHING_MORE = Extras()
# Exit status after a signal, by the shell's convention: this plus the signal's number.
STOPPED = 128


def train_step(
    model: Mistral,
    objective: Objective,
    optimizer: AdamW,
    step: Step,
    learning_rate: float,
    ranks: Ranks,
) -> dict[str, Tensor]:
    """One update of the weights: forward and backward of the step's micro-batches, then clip and AdamW.

    The host never waits for the device here.

    Returns: the step's values over all ranks: "loss" and whatever else the objective reports, "gradient_norm" before clipping,
        and "skipped", 1 where a loss or gradient was not finite and the weights stayed as they were. Scalars on the device.
    """
    values = ranks.sum(accumulate(model, objective, step))
    with record_function(OPTIMIZER):
        values["gradient_norm"], values["skipped"] = optimizer.step(learning_rate, values["loss"])
    return values


def accumulate(model: Mistral, objective: Objective, step: Step) -> dict[str, Tensor]:
    """Forward and backward of each micro-batch of this rank. Gradients add up in the parameters.

    Sharded gradients are reduced over the ranks as `parallel.reduce_once` says.

    Returns: the objective's values, summed over this rank's micro-batches: detached scalars on the device.
    """
    model.train()
    device = model.lm_head.weight.device
    totals: dict[str, Tensor] = {}
    with model.weight_codes.unchanged():
        for number, batch in enumerate(step.batches, start=1):
            reduce_after(model, last=number == len(step.batches))
            values = objective(model, batch.to(device), step)
            values["loss"].backward()
            for name, value in values.items():
                totals[name] = totals.get(name, 0) + value.detach()
    return totals


@lost_ranks_named()
def train(
    run: Run,
    model: Mistral,
    objective: Objective,
    evaluations: Sequence[Evaluation] = (),  # held-out sets
    extras: Extras = NOTHING_MORE,  # what an evaluation does beside them
) -> Path:
    """Train from the run's first step, or from where its checkpoint ended, to the last.

    Returns: the folder of the last checkpoint.
    Raises: SystemExit with status 143 after SIGTERM and 130 after Ctrl-C, once a checkpoint is written; FloatingPointError
        for a loss or gradient that is not finite; OSError where the last checkpoint could not be written; ConnectionError
        where another rank was lost.
    """
    settings, steps, last = run.settings, run.plan.steps, run.checkpoint
    if last is not None and run.ranks.main:
        # A kill may have come after the checkpoint appeared and before `latest` named it.
        point_latest_at(last)
    if last is not None and run.start >= steps:
        if run.ranks.main:
            print(f"{last}: all {steps} steps are done already")
        return last
    optimizer = AdamW(model.named_parameters(), settings.optimizer, seed=settings.seed)
    if run.continued is not None:
        load_optimizer(run.continued, optimizer, run.ranks, moments=last is not None or settings.from_optimizer)
    with ExitStack() as stack:
        if run.ranks.main:
            run.out.mkdir(parents=True, exist_ok=True)
            stack.enter_context(run_lock(run.out))
            write_file(run.out / "config.toml", to_toml(settings))
            if last is None:
                begin_log(run)
        watch = Watch(run, model)
        metrics = stack.enter_context(open_metrics(run, watch))
        checkpointer = stack.enter_context(
            Checkpointer(
                run.out,
                model,
                optimizer,
                run.tokenizer,
                run.ranks,
                keep=settings.keep_checkpoints,
                keep_every=settings.keep_every,
            )
        )
        saving = Saving(checkpointer, metrics.message)
        interruption = stack.enter_context(
            Interruption(run.ranks, save_every=settings.checkpoint_seconds, failed=lambda: checkpointer.failed)
        )
        # Entered after the checkpointer: its last checkpoint may take longer than the watchdog waits.
        stack.enter_context(watch)

        def evaluated(done: int) -> bool:
            """Evaluate. Returns: False where a signal came meanwhile, so that nothing is logged."""
            metrics.flush()
            found = examine(model, run.ranks, evaluations, extras, signs)
            if found is not None:
                metrics.evaluation(done, *found)
            return found is not None

        signs = Signs(watch.alive, interruption.stopping, metrics.message)
        evaluates = bool(evaluations or extras)
        if evaluates and _evaluate_first(run) and not evaluated(run.start):
            number = interruption.answer().stop
            metrics.message(f"stopped by {NAMES[number]} after step {run.start}, before anything was trained")
            raise SystemExit(STOPPED + number)
        stream = stack.enter_context(closing(run.stream()))
        for step, waited in _timed(stream):
            done, rate = step.index + 1, learning_rate(settings.schedule, step.index, steps)
            with watch.step(done):
                values = train_step(model, objective, optimizer, step, rate, watch.ranks)
            metrics.step(record_of(run, step, rate, values, waited))
            whole = True
            if evaluates and (done == steps or _due(done, settings.evaluate_every)):
                whole = evaluated(done)
            wishes = interruption.answer()
            again = saving.due_again(wishes.failed)
            if wishes.stop or wishes.save or again or done == steps or _due(done, settings.checkpoint_every):
                metrics.flush()
                with watch.paused(), metrics.saving():
                    last = saving.save(run.state(done))
                interruption.saved()
            if wishes.stop or done == steps:
                with watch.paused():
                    # After a signal there is no time to wait for a disk to be freed.
                    saving.finish(run.state(done), PATIENCE[:1] if wishes.stop else PATIENCE)
            for remark in checkpointer.remarks():
                metrics.message(remark)
            if wishes.stop and not (done == steps and whole):
                name = NAMES[wishes.stop]
                metrics.message(f"stopped by {name} after step {done}; start again to continue from {last}")
                raise SystemExit(STOPPED + wishes.stop)
            interruption.ask()
    assert last is not None
    return last


def _evaluate_first(run: Run) -> bool:
    """Whether validation comes before this process's first step: in a fresh run, or where a signal cut it off."""
    if run.checkpoint is None:
        return True
    cut = _due(run.start, run.settings.evaluate_every) and not was_evaluated(run.out / "metrics.jsonl", run.start)
    return bool(run.ranks.from_main(cut))


def open_metrics(run: Run, watch: Watch) -> Metrics:
    """The metrics files of a run, cut back to the step where it starts."""
    settings = run.settings
    facts = RunFacts(
        steps=run.plan.steps,
        start=run.start,
        planned_bytes=run.planned.peak,
        config=to_table(settings),
        peak_flops=peak_flops(run.device),
        ceiling=product_ceiling(run.device, run.dtype),
        skip_limit=settings.optimizer.skip_limit if settings.optimizer.nonfinite == "skip" else 1,
        lag=settings.guard.lag,
    )
    spikes = SpikeLog(run.out / "spikes.jsonl", settings.guard, run.plan)
    return Metrics(run.out, settings.log, run.ranks, facts, spikes, watch.seconds_waited)


def record_of(run: Run, step: Step, rate: float, values: dict[str, Tensor], waited: float) -> StepRecord:
    """The metrics of a step. waited: seconds until its data was there."""
    return StepRecord(
        step=step.index + 1,
        learning_rate=rate,
        values=values,
        tokens=step.tokens,
        trained_tokens=step.trained,
        flops=step_flops(run.config, step, len(run.fp8_layers)),
        data_wait=waited,
        epoch=run.plan.epoch(step.index + 1),
        tokens_saved=step.tokens_saved if run.plan.share_prompts else None,
        recomputed_flops=recomputed_flops(
            run.config,
            tokens=step.tokens,
            pairs=step.attended,
            recompute=run.settings.recompute,
            fp8_layers=len(run.fp8_layers),
        ),
    )


def _timed(steps: Iterable[Step]) -> Iterator[tuple[Step, float]]:
    """Each step with the seconds that the loop waited for it."""
    start = time.perf_counter()
    for step in steps:
        yield step, time.perf_counter() - start
        start = time.perf_counter()


def _due(done: int, every: int) -> bool:
    return every > 0 and done % every == 0
