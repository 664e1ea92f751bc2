"""Training steps: how fast, how close to what the device can do, with how much memory, beside whom.

    python -m benchmarks.train --preset shisa-7b --layers 8
    python -m benchmarks.train --preset small --objective sft --peers all --out FILE
    python -m benchmarks.train --sweep sequence=512,1024 micro_batch=1,4
    python -m benchmarks.train --ladder

Each candidate trains in a process of its own, on the same tokens, from the same weights. With --out FILE.json, FILE.svg draws
the parts of a step beside their floors. `benchmarks/README.md` defines the figures.
"""

import dataclasses
import itertools
import os
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch

from benchmarks.candidates import Candidate, Outcome, Schedule, take_turns
from benchmarks.command import benchmark, check_least, check_names
from benchmarks.measure import spread
from benchmarks.own import KINDS, give_weights, new_job, open_job, steps_of
from benchmarks.parts import draw, least, parts_of
from benchmarks.peers import catalogue
from benchmarks.results import TRAIN_AXES, Result, flat, table
from benchmarks.shapes import name_of, shape
from benchmarks.synthetic import Documents, export_steps, write_synthetic
from benchmarks.work import Work, speed, with_reference, work_of
from engine.data.dataset import TokenDataset
from engine.environment import choose_device, choose_dtype
from engine.estimate.flops import peak_flops
from engine.settings.sections import OptimizerSettings
from engine.settings.toml import PathName, to_table
from kernels.attention.choice import Backend
from model.config import MistralConfig
from model.mistral import Recompute

NAME = "komainu"
_BREAKDOWN_STEPS = 2
# The rungs of the ladder: its name, the parts of the engine that still run as eager references, the recompute mode.
LADDER: tuple[tuple[str, tuple[str, ...], str], ...] = (
    ("eager", ("fused operators", "attention", "fused head", "fused optimizer"), "none"),
    ("fused operators", ("attention", "fused head", "fused optimizer"), "none"),
    ("attention", ("fused head", "fused optimizer"), "none"),
    ("fused head", ("fused optimizer",), "none"),
    ("light recompute", ("fused optimizer",), "light"),
    ("fused optimizer", (), "light"),
)


@dataclass(frozen=True, kw_only=True)
class TrainBenchSettings:
    """A point, or with `sweep` a grid of points, each measured beside the same peers."""

    preset: str = "tiny"
    """Shape of the model: a preset of the engine."""
    layers: int = 0
    """Layers; 0: the preset's."""
    objective: Literal["next-token", "sft", "dpo"] = "next-token"
    """Pre-training, supervised fine-tuning or preference tuning."""
    sequence: int = 1024
    """Places of the longest document (of each side of a pair)."""
    micro_batch: int = 1
    """Sequences (pairs) that a micro-batch has room for."""
    accumulate: int = 1
    """Micro-batches of a step, on each rank (gradient accumulation)."""
    documents: Documents = "full"
    """Synthetic documents; full: all as long as the sequence; mixed: log-normal lengths, packed."""
    data: PathName = ""
    """Prepared folder (`python -m recipes.prepare`) to train on instead of synthetic documents."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Dtype of the parameters; auto: bfloat16 on CUDA, float32 on a CPU."""
    precision: Literal["dtype", "fp8"] = "dtype"
    """Products of the layers' linear maps; the first and the last layer never use FP8."""
    recompute: str = ""
    """Activation checkpointing: none, light, ffn or block; default: the engine's."""
    backend: str = ""
    """Attention backend; default: the engine's."""
    moments: Literal["float32", "bfloat16"] = "float32"
    """Dtype of the optimizer's moments."""
    offload: Literal["none", "moments"] = "none"
    """Optimizer state that stays in the host's memory."""
    ranks: int = 1
    """Processes that train together under torchrun; peers train in one."""
    peers: tuple[str, ...] = ()
    """Peers to measure beside ours; all: every peer that trains the objective."""
    peers_python: PathName = ""
    """Interpreter of the peers; default: this one."""
    sweep: tuple[str, ...] = ()
    """Grid: name=value,value for each setting that varies."""
    ladder: bool = False
    """Add the engine's parts one by one, instead of peers."""
    side_by_side: Literal["auto", "yes", "no"] = "auto"
    """Whether all candidates stay in memory and alternate; auto: on a CPU."""
    breakdown: bool = True
    """Profile two extra steps to say where the time goes, and how far each part is from the device's limit."""
    warmup: int = 2
    """Steps before the first measured one."""
    rounds: int = 5
    """Measured rounds of each candidate."""
    steps: int = 2
    """Steps of a round."""
    limit: float = 300.0
    """Seconds that a candidate may take to load, or for a round."""
    threads: int = 0
    """Threads of each process; 0: torch's default."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    seed: int = 0
    scratch: PathName = ""
    """Existing folder for weights and data while measuring; default: the system's temporary one."""
    out: PathName = ""
    """Result file; default: print only."""

    def __post_init__(self) -> None:
        check_least(self, layers=0, sequence=2, micro_batch=1, accumulate=1, ranks=1)
        check_least(self, warmup=1, rounds=1, steps=1, threads=0)
        check_names("recompute", [self.recompute], ["", *get_args(Recompute)])
        check_names("backend", [self.backend], ["", *get_args(Backend)])
        if self.peers_python and shutil.which(os.path.expanduser(self.peers_python)) is None:
            raise ValueError(
                f"peers_python = '{self.peers_python}': no such program; name the interpreter of the peers' environment, "
                "such as peers/bin/python"
            )
        if self.ladder and self.peers:
            raise ValueError("peers have no effect with ladder; leave one of them out")
        if self.data and self.documents != "full":
            raise ValueError("documents has no effect with data; leave one of them out")
        if not any(axis.startswith("objective=") for axis in self.sweep):
            catalogue.chosen(self.peers, self.objective)

    @property
    def config(self) -> MistralConfig:
        return shape(self.preset, self.layers)

    @property
    def needed_steps(self) -> int:
        return self.warmup + self.rounds * self.steps + _BREAKDOWN_STEPS


def points(settings: TrainBenchSettings) -> list[TrainBenchSettings]:
    """The grid of `sweep`. Raises: ValueError for a setting that is unknown, cannot vary, or a value of the wrong kind."""
    axes = []
    for axis in settings.sweep:
        name, equals, values = axis.partition("=")
        name = name.replace("-", "_")
        if not equals or name not in TRAIN_AXES:
            raise ValueError(f"sweep = {axis!r}: must be name=value,value with a name of {', '.join(TRAIN_AXES)}")
        kind = type(getattr(settings, name))
        try:
            axes.append([(name, kind(value)) for value in values.split(",")])
        except ValueError:
            raise ValueError(f"sweep = {axis!r}: values of {name} must be {kind.__name__}") from None
    found = []
    for combination in itertools.product(*axes):
        changes: dict[str, Any] = dict(combination)
        if "objective" in changes:
            # Each objective has its own peers.
            able = catalogue.chosen(("all",), changes["objective"])
            changes["peers"] = tuple(name for name in settings.peers if name == "all" or name in able)
        found.append(dataclasses.replace(settings, sweep=(), **changes))
    return found


def run(settings: TrainBenchSettings, command: str = "benchmarks.train.run") -> dict[str, Any]:
    """Measure all points; returns the result, whose file is written after each candidate."""
    device = choose_device(settings.device)
    settings = dataclasses.replace(settings, dtype=name_of(choose_dtype(settings.dtype, device)))  # type: ignore[arg-type]
    result = Result("train", command, device, settings)
    with tempfile.TemporaryDirectory(dir=settings.scratch or None, prefix="komainu-") as folder:
        for number, point in enumerate(points(settings)):
            if device.type == "cuda" and point.ranks > torch.cuda.device_count():
                missing = f"this machine has {torch.cuda.device_count()} GPUs"
                result.add({"name": NAME, **identity(point), "missing": missing})
            else:
                measure_point(point, device, Path(folder) / str(number), result)
    content = result.finish()
    drawn = [row for row in content["rows"] if "products" in row.get("parts", {})]
    if settings.out and drawn:
        draw(drawn, varying(drawn), content["machine"]["device"], Path(settings.out).with_suffix(".svg"))
    return content


def varying(rows: Sequence[dict[str, Any]]) -> list[str]:
    """The settings in which rows differ."""
    return [name for name in TRAIN_AXES if len({str(row.get(name)) for row in rows}) > 1]


def identity(point: TrainBenchSettings) -> dict[str, Any]:
    """The fields of a row that say what was measured."""
    return {name: getattr(point, name) for name in TRAIN_AXES}


def measure_point(point: TrainBenchSettings, device: torch.device, folder: Path, result: Result) -> None:
    """Add the rows of a point: ours and the peers', or the rungs of the ladder."""
    folder.mkdir()
    job = make_job(point, device, folder)
    steps, dtype = steps_of(open_job(job), point.needed_steps), getattr(torch, point.dtype)
    fp8 = len(open_job(job).fp8_layers)
    works = [work_of(point.config, step, fp8) for step in steps]
    moments = 0 if point.offload == "moments" else 2 * getattr(torch, point.moments).itemsize
    costs = [least(point.config, step, dtype, moments, fp8) for step in steps[-_BREAKDOWN_STEPS:]]
    if point.peers:
        job["steps_file"] = str(folder / "steps.safetensors")
        export_steps(steps_of(open_job(job, share_prompts=False), point.needed_steps), Path(job["steps_file"]))
    candidates, absent = (ladder(job, point), {}) if point.ladder else beside_peers(job, point)
    outcomes: dict[str, Outcome] = {}

    def report(candidate: Candidate, outcome: Outcome) -> None:
        outcomes[candidate.name] = outcome
        row = {"name": candidate.name, **identity(point), "differs": list(candidate.differs)}
        if outcome.missing is not None:
            row["missing"] = outcome.missing
        else:
            base = outcomes[candidates[0].name]
            row |= row_of(outcome, point, works, base, device)
            row["parts"] = parts_of(outcome.answers, costs, point.ranks)
        result.add(row)

    for name, why in absent.items():
        result.add({"name": name, **identity(point), "missing": why})
    side_by_side = point.side_by_side == "yes" or (point.side_by_side == "auto" and device.type == "cpu")
    schedule = Schedule(point.warmup, point.rounds, point.steps, point.limit, side_by_side)
    take_turns(candidates, schedule, folder, report)


def row_of(
    outcome: Outcome,
    point: TrainBenchSettings,
    works: list[Work],  # of all steps
    base: Outcome,  # ours: the losses to compare with, and the measured ceilings
    device: torch.device,
) -> dict[str, Any]:
    """The measurements of one candidate."""
    ceiling, peak = base.answers.get("ceilings", {}).get("product_flops"), peak_flops(device)
    limits = {"peak": peak and peak * point.ranks, "ceiling": ceiling and ceiling * point.ranks}
    figures = speed(works, outcome.rounds, first=point.warmup, steps=point.steps, **limits)
    reference = outcome.facts.get("reference")
    if point.objective == "dpo":
        figures |= with_reference(figures, reference or {"seconds": 0.0, "cpu_seconds": 0.0}, works)
    losses = outcome.losses
    differences = [abs(ours - theirs) for ours, theirs in zip(base.losses, losses, strict=False)]
    return {
        "parameters": point.config.parameters,
        **figures,
        "ceiling_tflops": None if ceiling is None else ceiling / 1e12,
        "memory": outcome.rounds[-1]["memory"],
        "plan_gib": outcome.facts.get("plan_gib", {"missing": "only ours has a plan"}),
        "loss_first": losses[0],
        "loss_last": losses[-1],
        "loss_first_difference": losses[0] - base.losses[0] if base.missing is None else None,
        "loss_largest_difference": max(differences, default=None) if trains_our_steps(outcome, works) else None,
        **{name: power_of(outcome, name) for name in ("watts", "clock_mhz")},
        "warmup_seconds": sum(outcome.warmup["seconds"]),
        "reference": reference,
        "versions": outcome.facts.get("versions"),
    }


def power_of(outcome: Outcome, name: str) -> dict[str, Any]:
    """A sample at the end of each round, while the GPU is still busy."""
    samples = [answer[name] for answer in outcome.rounds if name in answer]
    return spread(samples) if samples else {"missing": "no GPU, or nvidia-ml-py is not installed"}


def trains_our_steps(outcome: Outcome, works: Sequence[Work]) -> bool:
    """Whether a trainer that composes its own steps put as many tokens into each as ours does; True for other trainers."""
    counted = [counts["tokens"] for answer in (outcome.warmup, *outcome.rounds) for counts in answer["counts"] if counts]
    return counted in ([], [work.places + work.documents for work in works[: len(counted)]])


def make_job(point: TrainBenchSettings, device: torch.device, folder: Path) -> dict[str, Any]:
    """The job that every candidate reads. Writes synthetic data, and the weights if several candidates start from them."""
    config, pairs = point.config, point.objective == "dpo"
    room = point.micro_batch * point.sequence * (2 if pairs else 1)
    data = point.data or str(folder / "data")
    if point.data:
        dataset = TokenDataset.open(data)
        if dataset.kind != KINDS[point.objective]:
            raise ValueError(f"data = {data}: holds {dataset.kind}; {point.objective} trains on {KINDS[point.objective]}")
        if dataset.vocab_size > config.unpadded_vocab_size:
            raise ValueError(f"data = {data}: has {dataset.vocab_size} pieces, {point.preset} {config.unpadded_vocab_size}")
    else:
        write_synthetic(
            Path(data),
            KINDS[point.objective],
            config,
            places=room * point.accumulate * point.ranks * point.needed_steps,
            sequence=point.sequence,
            documents=point.documents,
            seed=point.seed,
        )
    chosen = {name: getattr(point, name) for name in ("precision", "recompute", "backend") if getattr(point, name)}
    job = new_job(
        point.objective,
        config,
        data,
        folder,
        device=device,
        dtype=point.dtype,
        threads=point.threads,
        context_length=point.sequence,
        step_size=point.micro_batch * point.accumulate * point.ranks * (1 if pairs else point.sequence),
        pack_tokens=room,
        steps=point.needed_steps,
        seed=point.seed,
        optimizer=to_table(OptimizerSettings(moments=point.moments, offload=point.offload)),
        **chosen,
    )
    if point.peers or point.ladder or point.ranks > 1:
        give_weights(job, folder)
    return job


def own(job: dict[str, Any], point: TrainBenchSettings, name: str = NAME, **changes: Any) -> Candidate:
    """Ours as a candidate."""
    orders = ("ceilings", "breakdown") if point.breakdown else ("ceilings",)
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(point.ranks)) if point.ranks > 1 else ()
    return Candidate(name, (*torchrun, "-m", "benchmarks.own"), {**job, **changes}, of_ours=True, orders=orders)


def beside_peers(job: dict[str, Any], point: TrainBenchSettings) -> tuple[list[Candidate], dict[str, str]]:
    """(ours and the peers, why some are missing)"""
    names = catalogue.chosen(point.peers, point.objective)
    if point.ranks > 1:
        return [own(job, point)], dict.fromkeys(names, "trains in one process here")
    return [own(job, point), *catalogue.candidates(names, job, point.peers_python)], {}


def ladder(job: dict[str, Any], point: TrainBenchSettings) -> list[Candidate]:
    """The rungs."""
    return [
        own(job, point, name, references=references, settings={**job["settings"], "recompute": recompute})
        for name, references, recompute in LADDER
    ]


COLUMNS = ["name", "tokens_per_second", "tokens_per_cpu_second", "mfu", "of_ceiling", "memory allocated_gib"]
COLUMNS += ["memory reserved_gib", "memory resident_gib", "plan_gib", "loss_largest_difference", "missing"]
PART_COLUMNS = ["part", "share", "ms", "floor_ms", "percent_of_limit"]


def show(result: dict[str, Any]) -> str:
    """The rows as text."""
    rows = [flat(row) for row in result["rows"]]
    lines = [table(rows, [*COLUMNS[:1], *varying(rows), *COLUMNS[1:]])]
    for row in result["rows"]:
        if "products" in (parts := row.get("parts", {})):
            lines.append(table([{"part": name, **part} for name, part in parts.items()], PART_COLUMNS))
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> None:
    benchmark(TrainBenchSettings, lambda settings, command: print(show(run(settings, command))), "train", argv)


if __name__ == "__main__":
    main()
