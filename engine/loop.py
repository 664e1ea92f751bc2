"""The training loop: one for pre-training, supervised fine-tuning and preference tuning.

A step is: its micro-batches forward and backward, clip, AdamW. Which tokens, with which weights, over which denominator is
decided by the plan and the objective beforehand, so nothing here knows which of the three it trains. Every rank runs this loop
over its own part of each step.
"""

import signal
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.profiler import record_function

from engine.checkpoint.state import load_optimizer, point_latest_at
from engine.checkpoint.writing import Checkpointer
from engine.data.batches import Batch, Step, share_of, step_stream
from engine.distributed.garbage import GarbageAtLogLines
from engine.distributed.ranks import Ranks, lost_ranks_named
from engine.distributed.sharding import reduce_after, reshard
from engine.distributed.stop import Interruption
from engine.distributed.stragglers import RankWaits
from engine.distributed.watchdog import Watchdog
from engine.estimate.flops import peak_flops, product_ceiling, recomputed_flops, training_flops
from engine.observe.metrics import Metrics, RunFacts, StepRecord
from engine.observe.profile import OPTIMIZER, StepProfiler
from engine.observe.spikes import SpikeLog
from engine.optim.adamw import AdamW
from engine.optim.schedule import learning_rate
from engine.run import Run
from engine.settings.toml import to_table, to_toml
from kernels.attention.work import pairs_of
from model.config import MistralConfig
from model.folder import sole_writer, write_file
from model.mistral import Mistral

# What a shell calls the end by SIGTERM.
STOPPED = 128 + signal.SIGTERM
# (model, micro-batch, its step) -> this micro-batch's part of the step's values, "loss" among them; parts add up.
Objective = Callable[[Mistral, Batch, Step], dict[str, Tensor]]


@dataclass(frozen=True)
class Evaluation:
    """A held-out set: its name in the metrics, its objective, and all of it as one step."""

    name: str
    objective: Objective
    step: Step


@lost_ranks_named()
def train(run: Run, model: Mistral, objective: Objective, evaluations: Sequence[Evaluation] = ()) -> Path:
    """Train from the run's first step (or where its checkpoint ended) to its last. Returns the last checkpoint's folder."""
    settings, steps, ranks = run.settings, run.plan.steps, run.ranks
    if run.checkpoint is not None:
        # A kill may have come between the checkpoint's appearance and this.
        if ranks.main:
            point_latest_at(run.checkpoint)
        if run.start >= steps:
            if ranks.main:
                print(f"{run.checkpoint}: all {steps} steps are done already")
            return run.checkpoint
    optimizer = AdamW(model.named_parameters(), settings.optimizer, seed=settings.seed)
    if run.checkpoint is not None:
        load_optimizer(run.checkpoint, optimizer, ranks)
    last = run.checkpoint
    with ExitStack() as stack:
        if ranks.main:
            run.out.mkdir(parents=True, exist_ok=True)
            stack.enter_context(sole_writer(run.out, run.out))
            write_file(run.out / "config.toml", to_toml(settings))
        watchdog = stack.enter_context(Watchdog(ranks, settings.parallel.timeout))
        waits = RankWaits(model, ranks)
        metrics = stack.enter_context(closing(open_metrics(run, waits)))
        interruption = stack.enter_context(Interruption(ranks))
        checkpointer = stack.enter_context(Checkpointer(
            run.out, model, optimizer, run.tokenizer, ranks, keep=settings.keep_checkpoints, keep_every=settings.keep_every
        ))  # fmt: skip
        profiler, garbage = StepProfiler(settings.profile, run.out, ranks), stack.enter_context(GarbageAtLogLines())
        if run.start == 0 and evaluations:
            metrics.evaluation(0, evaluate(model, evaluations, ranks, watchdog.alive))
        stream = stack.enter_context(closing(step_stream(
            run.plan, run.start, window=run.config.sliding_window, pack_tokens=run.pack_tokens, rank=ranks.rank,
            ranks=ranks.ranks, device=run.device,
        )))  # fmt: skip
        waited = time.perf_counter()
        for step in stream:
            done, wait = step.index + 1, time.perf_counter() - waited
            rate = learning_rate(settings.schedule, step.index, steps)
            with profiler.around(done):
                parts = accumulate(model, objective, step)
                with waits.timed():
                    values = ranks.sum(parts)
                checkpointer.before_update()
                with record_function(OPTIMIZER):
                    values["gradient_norm"], values["skipped"] = optimizer.step(rate, values["loss"])
            watchdog.alive()
            if metrics.step(record_of(run, step, rate, values, wait)):
                garbage.collect()
            if evaluations and (done == steps or _due(done, settings.evaluate_every)):
                metrics.evaluation(done, evaluate(model, evaluations, ranks, watchdog.alive))
            stop = interruption.after_step(checkpointer.failed)
            if stop or done == steps or _due(done, settings.checkpoint_every):
                metrics.flush()
                # A disk may take longer than a collective.
                watchdog.pause()
                with metrics.saving():
                    last = checkpointer.save(run.state(done))
                watchdog.alive()
            if stop and done < steps:
                watchdog.pause()
                checkpointer.wait()
                metrics.message(f"stopped by SIGTERM after step {done}; start again to continue from {last}")
                raise SystemExit(STOPPED)
            waited = time.perf_counter()
        watchdog.pause()
    assert last is not None
    return last


def open_metrics(run: Run, waits: RankWaits) -> Metrics:
    """The sinks of a run, cut back to where it starts."""
    settings = run.settings
    spikes = SpikeLog(run.out / "spikes.jsonl", settings.guard, run.plan)
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
    return Metrics(run.out, settings.log, run.ranks, facts, spikes, waits.take)


def record_of(run: Run, step: Step, rate: float, values: dict[str, Tensor], wait: float) -> StepRecord:
    """What is logged of a step. wait: seconds that it was waited for."""
    again = recomputed_flops(run.config, tokens=step.tokens, pairs=step.attended, recompute=run.settings.recompute)
    saved = step.tokens_saved if run.plan.share_prompts else None
    flops = step_flops(run.config, step)
    return StepRecord(step.index + 1, rate, values, step.tokens, step.trained, flops, wait, saved, again)


def accumulate(model: Mistral, objective: Objective, step: Step) -> dict[str, Tensor]:
    """Forward and backward of every micro-batch of a rank's step; the gradients add up in the parameters, over all ranks.

    Returns: the step's values, summed over this rank's micro-batches and detached, still on the device.
    """
    model.train()
    device = model.lm_head.weight.device
    totals: dict[str, Tensor] = {}
    for number, batch in enumerate(step.batches, start=1):
        reduce_after(model, last=number == len(step.batches))
        values = objective(model, batch.to(device), step)
        values["loss"].backward()
        for name, value in values.items():
            totals[name] = totals.get(name, 0) + value.detach()
    return totals


@torch.no_grad()
def evaluate(
    model: Mistral, evaluations: Sequence[Evaluation], ranks: Ranks | None = None, alive: Callable[[], None] = lambda: None
) -> dict[str, float]:
    """Values of the held-out sets without noise, over all ranks: {"eval/<name>/<value>": ...}. alive: called at each batch."""
    model.eval()
    device = model.lm_head.weight.device
    results: dict[str, float] = {}
    for evaluation in evaluations:
        totals: dict[str, Tensor] = {}
        batches = evaluation.step.batches
        for batch in share_of(batches, ranks.rank, ranks.ranks) if ranks else batches:
            alive()
            for name, value in evaluation.objective(model, batch.to(device), evaluation.step).items():
                totals[name] = totals.get(name, 0) + value.double()
        summed = ranks.sum(totals) if ranks else totals
        results.update({f"eval/{evaluation.name}/{name}": float(value) for name, value in summed.items()})
    reshard(model)
    model.train()
    return results


def step_flops(config: MistralConfig, step: Step) -> int:
    """Operations of a step, of all ranks."""
    return training_flops(config, tokens=step.tokens, rows=step.trained, pairs=step.attended)


def whole_step(batches: Sequence[Batch]) -> Step:
    """A held-out set as one step, so that an objective's values are means over all of it."""
    weight = sum(float(batch.weight_T.sum()) for batch in batches)
    pairs = sum(0 if batch.pair_D is None else len(batch.pair_D) // 2 for batch in batches)
    tokens, saved = (sum(getattr(batch, name) for batch in batches) for name in ("tokens", "tokens_saved"))
    attended = sum(pairs_of(batch.attention) for batch in batches)
    return Step(0, list(batches), weight, pairs, tokens, saved, int(weight), attended)


def _due(done: int, every: int) -> bool:
    return every > 0 and done % every == 0
