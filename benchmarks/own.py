"""Our side of a measurement: `python -m benchmarks.own job.json` trains as the recipes do, step by step when told to; under
torchrun on several ranks, of which the first takes the orders and answers.

The job's "settings" are those of the recipe of its "objective"; of the parts in "references" the eager references run.
"""

import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.profiler import record_function

from benchmarks.measure import ceilings
from benchmarks.parts import references
from benchmarks.peers.worker import Worker, cpu_seconds
from engine.data.batch import Packing, Step, make_step
from engine.data.dataset import TokenDataset
from engine.data.plan import Plan
from engine.data.stream import step_stream
from engine.distributed.ranks import Ranks, gather, host_group, join, leave
from engine.distributed.sharding import reshard
from engine.environment import use_deterministic_algorithms
from engine.loop import accumulate
from engine.objectives import Objective
from engine.objectives.next_token import NextToken
from engine.objectives.preference import Preference, reference_log_probs
from engine.observe.profile import OPTIMIZER, breakdown, replaced
from engine.optim.adamw import AdamW
from engine.optim.schedule import learning_rate
from engine.run import Run
from engine.settings.sections import OptimizerSettings, ParallelSettings, PreferenceSettings
from engine.settings.toml import from_table, to_table
from engine.settings.training import TrainSettings
from model.config import MistralConfig
from model.mistral import Mistral
from model.weights import save_model
from recipes.dpo import DpoSettings
from recipes.pretrain import PretrainSettings
from recipes.sft import SftSettings
from recipes.training import fitting_batches

SETTINGS: dict[str, type[TrainSettings]] = {"next-token": PretrainSettings, "sft": SftSettings, "dpo": DpoSettings}
KINDS = {"next-token": "text", "sft": "conversations", "dpo": "preferences"}


class RankWorker(Worker):
    """A worker on one of several ranks: all do what the first is told, and what they say is put together."""

    def __init__(self) -> None:
        super().__init__()
        self.ranks = join(self.device, ParallelSettings())
        self._group = host_group(self.ranks)

    def line(self) -> str:
        return self.ranks.from_main(super().line() if self.ranks.main else None)

    def say(self, answer: dict[str, Any]) -> None:
        answers = gather([answer], self.ranks, self._group)
        if self.ranks.main:
            if "memory" in answer:
                answer = {
                    **answer, "cpu_seconds": sum(other["cpu_seconds"] for other in answers),
                    "memory": {name: max(other["memory"][name] for other in answers) for name in answer["memory"]},
                }  # fmt: skip
            super().say(answer)


def main() -> None:
    worker = RankWorker()
    with replaced(list(references(worker.job.get("references", ())))):
        measure_steps(worker)
    leave()


def measure_steps(worker: RankWorker) -> None:
    """Open the run, and train as told. Answers the orders "ceilings" and "breakdown" as well."""
    run = replace(open_job(worker.job), ranks=worker.ranks)
    if run.device.type == "cuda":
        use_deterministic_algorithms()
    model = run.load_model() if run.settings.model else fresh_model(run)
    if worker.job.get("compiled"):
        for block in model.layers:
            block.compile(dynamic=False)
    optimizer = AdamW(model.named_parameters(), run.settings.optimizer, seed=run.settings.seed)
    objective, facts = objective_of(run, model)
    stream = step_stream(run.plan, 0, run.packing, device=run.device)

    def step(_: int = 0) -> Tensor:
        return train_step(run, model, optimizer, objective, next(stream))

    worker.answers["ceilings"] = lambda: ceilings(run.device, run.dtype)
    worker.answers["breakdown"] = lambda: breakdown(step, run.device)
    worker.ready(plan_gib=run.planned.peak / 2**30, **facts)
    worker.serve(step)


def new_job(
    objective: str, config: MistralConfig, data: str, folder: Path, *, device: torch.device, dtype: str, threads: int,
    context: int, step_size: int, pack_tokens: int, steps: int, seed: int, learning_rate: float = 1e-5, **engine: Any,
) -> dict[str, Any]:  # fmt: skip
    """What a candidate is started with: ours reads "settings", a peer the rest. engine: further settings of the recipe."""
    optimizer = to_table(OptimizerSettings())
    settings = {
        "model": "", "out": str(folder / "run"), "sources": [{"path": data}], "context_length": context, "step_size": step_size,
        "pack_tokens": pack_tokens, "steps": steps, "seed": seed, "optimizer": optimizer,
        "schedule": {"kind": "constant", "peak": learning_rate}, **engine,
    }  # fmt: skip
    if objective != "next-token":
        settings["neftune_alpha"] = 0.0
    return {
        "objective": objective, "device": device.type, "dtype": dtype, "threads": threads, "config": asdict(config),
        "settings": settings, "optimizer": optimizer, "learning_rate": learning_rate, "beta": PreferenceSettings().beta,
    }  # fmt: skip


def give_weights(job: dict[str, Any], folder: Path) -> None:
    """Write random weights into `folder` and let every candidate of the job start from them."""
    weights = folder / "weights"
    weights.mkdir()
    save_model(fresh_model(open_job(job)), weights)
    if job["device"] == "cuda":
        torch.cuda.empty_cache()
    job["weights"] = job["settings"]["model"] = str(weights)


def open_job(job: dict[str, Any], *, whole_documents: bool = False) -> Run:
    """The run of a job, without the tokenizer that synthetic tokens do not have.

    whole_documents: share no prompts, for peers that cannot.
    """
    settings = from_table(SETTINGS[job["objective"]], job["settings"])
    config = MistralConfig(**job["config"])
    datasets = [TokenDataset.open(source.path) for source in settings.sources]
    plan = Plan(
        datasets, list(settings.sources), seed=settings.seed, context_length=settings.context_length,
        step_size=settings.step_size, steps=settings.steps, epochs=settings.epochs,
        share_prompts=getattr(settings, "share_prompts", False) and not whole_documents,
    )  # fmt: skip
    device, dtype = torch.device(job["device"]), getattr(torch, job["dtype"])
    return Run(settings, Ranks(device), dtype, config, None, datasets, {}, plan, None, 0)  # type: ignore[arg-type]


def steps_of(run: Run, count: int) -> list[Step]:
    """The first steps of a run."""
    packing = Packing(run.config.sliding_window, run.pack_tokens)
    return [make_step(run.plan, index, packing) for index in range(count)]


def fresh_model(run: Run) -> Mistral:
    """Random weights made on the device, where billions of them take no time.

    Their size keeps activations at about 1, so that a place that saw what it must not see would show in the loss.
    """
    model = run.empty_model()
    torch.manual_seed(run.settings.seed)
    for parameter in model.parameters():
        nn.init.ones_(parameter) if parameter.ndim == 1 else nn.init.normal_(parameter, std=run.config.hidden_size**-0.5)
    return model


def objective_of(run: Run, model: Mistral) -> tuple[Objective, dict[str, Any]]:
    """The recipe's objective and, for preferences, what the reference's log-probabilities took."""
    settings = run.settings
    if not isinstance(settings, DpoSettings):
        return NextToken(neftune_alpha=getattr(settings, "neftune_alpha", 0.0), seed=settings.seed), {}
    start = (time.perf_counter(), cpu_seconds())
    tables = []
    for dataset in run.datasets:
        batches = fitting_batches(run, dataset)
        tables.append(reference_log_probs(model, batches, len(dataset) // 2))
    reshard(model)
    spent = {"seconds": time.perf_counter() - start[0], "cpu_seconds": cpu_seconds() - start[1]}
    spent["tokens"] = float(sum(int(dataset.lengths.sum()) for dataset in run.datasets))
    objective = Preference(settings.preference, tables, neftune_alpha=settings.neftune_alpha, seed=settings.seed)
    return objective, {"reference": spent}


def train_step(run: Run, model: Mistral, optimizer: AdamW, objective: Objective, step: Step) -> Tensor:
    """What the training loop does in a step; returns the loss."""
    values = run.ranks.sum(accumulate(model, objective, step))
    with record_function(OPTIMIZER):
        optimizer.step(learning_rate(run.settings.schedule, step.index, run.plan.steps))
    return values["loss"]


if __name__ == "__main__":
    main()
