"""Our side of a measurement: `python -m benchmarks.own job.json` trains as the recipes do, step by step when told to.

Under torchrun, rank 0 takes the orders and answers. The job's "settings" are its recipe's settings; "references" names the
parts of the engine that run as eager references.
"""

import importlib
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.measure import ceilings
from benchmarks.peers.worker import Worker, cpu_seconds
from engine.data.batch import Packing, Step, make_step
from engine.data.dataset import TokenDataset
from engine.distributed.joining import join
from engine.distributed.ranks import Ranks, leave
from engine.distributed.sharding import reshard
from engine.environment import use_deterministic_algorithms
from engine.loop import train_step
from engine.objectives import Objective
from engine.objectives.next_token import NextToken
from engine.objectives.preference import Preference, reference_log_probs
from engine.observe.profile import OPERATORS, breakdown, replaced
from engine.optim.adamw import AdamW
from engine.optim.schedule import learning_rate
from engine.run import Run, plan_of, with_chosen_gradients
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
LEARNING_RATE = 1e-5


class RankWorker(Worker):
    """A worker on each of several ranks: all follow rank 0's orders, and rank 0 answers for all."""

    def __init__(self) -> None:
        super().__init__()
        self.ranks = join(self.device, ParallelSettings(), {})

    def line(self) -> str:
        return self.ranks.from_main(super().line() if self.ranks.main else None)

    def say(self, answer: dict[str, Any]) -> None:
        answers = self.ranks.gather([answer])
        if not self.ranks.main:
            return
        if "memory" in answer:
            answer = answer | {
                "cpu_seconds": sum(other["cpu_seconds"] for other in answers),
                "memory": {name: max(other["memory"][name] for other in answers) for name in answer["memory"]},
            }
        super().say(answer)


def main() -> None:
    worker = RankWorker()
    with replaced(list(references(worker.job.get("references", ())))):
        serve(worker)
    leave()


def serve(worker: RankWorker) -> None:
    """Open the run, and train as told. Answers the orders "ceilings" and "breakdown" as well."""
    run = replace(open_job(worker.job), ranks=worker.ranks)
    if run.device.type == "cuda":
        use_deterministic_algorithms()
    model = run.load_model() if run.settings.model else fresh_model(run)
    optimizer = AdamW(model.named_parameters(), run.settings.optimizer, seed=run.settings.seed)
    objective, facts = objective_of(run, model)
    stream = run.stream()

    def step(_: int = 0) -> Tensor:
        following = next(stream)
        rate = learning_rate(run.settings.schedule, following.index, run.plan.steps)
        return train_step(model, objective, optimizer, following, rate, run.ranks)["loss"]

    worker.answers["ceilings"] = lambda: ceilings(run.device, run.dtype)
    worker.answers["breakdown"] = lambda: breakdown(step, run.device)
    worker.ready(plan_gib=run.planned.peak / 2**30, **facts)
    worker.serve(step)


def references(parts: Iterable[str]) -> Iterator[tuple[Callable, Callable]]:
    """(operator, its eager reference) of parts of the engine, for `replaced`."""
    for part in parts:
        for module, name in OPERATORS.get(part, ()):
            found = importlib.import_module(module)
            yield getattr(found, name), getattr(found, reference_name(name))


def reference_name(name: str) -> str:
    """The eager reference of an operator: rms_norm -> rms_norm_reference, adamw_ -> adamw_reference_."""
    return f"{name.removesuffix('_')}_reference{'_' if name.endswith('_') else ''}"


def new_job(
    objective: str,
    config: MistralConfig,
    data: str,  # prepared folder
    folder: Path,  # of the run
    *,
    device: torch.device,
    dtype: str,
    threads: int,
    **recipe: Any,  # further settings of the recipe
) -> dict[str, Any]:
    """The job that a candidate reads: ours reads "settings", a peer everything else."""
    settings = {
        "model": "",
        "out": str(folder / "run"),
        "sources": [{"path": data}],
        "optimizer": to_table(OptimizerSettings()),
        "schedule": {"kind": "constant", "peak": LEARNING_RATE},
        **({"neftune_alpha": 0.0} if objective != "next-token" else {}),
        **recipe,
    }
    return {
        "objective": objective,
        "device": device.type,
        "dtype": dtype,
        "threads": threads,
        "config": asdict(config),
        "settings": settings,
        "optimizer": to_table(OptimizerSettings()),
        "learning_rate": LEARNING_RATE,
        "beta": PreferenceSettings().beta,
    }


def give_weights(job: dict[str, Any], folder: Path) -> None:
    """Write random weights into `folder` and make every candidate of the job start from them."""
    weights = folder / "weights"
    weights.mkdir()
    save_model(fresh_model(open_job(job)), weights)
    if job["device"] == "cuda":
        torch.cuda.empty_cache()
    job["weights"] = job["settings"]["model"] = str(weights)


def open_job(job: dict[str, Any], *, share_prompts: bool = True) -> Run:
    """The run of a job, without a tokenizer, which synthetic tokens do not have.

    share_prompts: compute the common prompt of a pair once; peers cannot.
    """
    settings = from_table(SETTINGS[job["objective"]], job["settings"])
    datasets = [TokenDataset.open(source.path) for source in settings.sources]
    share_prompts = share_prompts and getattr(settings, "share_prompts", False)
    run = Run(
        settings=settings,
        ranks=Ranks(torch.device(job["device"])),
        dtype=getattr(torch, job["dtype"]),
        config=MistralConfig(**job["config"]),
        tokenizer=None,  # type: ignore[arg-type]
        datasets=datasets,
        heldout={},
        plan=plan_of(settings, datasets, share_prompts=share_prompts),
        checkpoint=None,
        start=0,
        starting_model=Path(settings.model) if settings.model else None,
    )
    return with_chosen_gradients(run)


def steps_of(run: Run, count: int) -> list[Step]:
    """The first steps of a run, unpadded."""
    packing = Packing(run.config.sliding_window, run.pack_tokens)
    return [make_step(run.plan, index, packing) for index in range(count)]


def fresh_model(run: Run) -> Mistral:
    """A model with random weights made on the device, where billions of them take no time.

    Their scale keeps activations at about 1, so that a place that attends to a hidden place would show in the loss.
    """
    model = run.empty_model()
    torch.manual_seed(run.settings.seed)
    for parameter in model.parameters():
        nn.init.ones_(parameter) if parameter.ndim == 1 else nn.init.normal_(parameter, std=run.config.hidden_size**-0.5)
    return model


def objective_of(run: Run, model: Mistral) -> tuple[Objective, dict[str, Any]]:
    """The recipe's objective and, for preferences, what the reference's log-probabilities cost."""
    settings = run.settings
    if not isinstance(settings, DpoSettings):
        return NextToken(neftune_alpha=getattr(settings, "neftune_alpha", 0.0), seed=settings.seed), {}
    start, cpu_start = time.perf_counter(), cpu_seconds()
    tables = [reference_log_probs(model, fitting_batches(run, dataset), len(dataset) // 2) for dataset in run.datasets]
    reshard(model)
    spent = {"seconds": time.perf_counter() - start, "cpu_seconds": cpu_seconds() - cpu_start}
    objective = Preference(settings.preference, tables, neftune_alpha=settings.neftune_alpha, seed=settings.seed)
    return objective, {"reference": spent}


if __name__ == "__main__":
    main()
