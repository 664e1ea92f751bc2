"""Training steps: how fast, how close to what the device can do, with how much memory, and beside whom.

    python -m benchmarks.train --preset tiny --sequence 1024 --peers all --out FILE
    python -m benchmarks.train --preset tiny --sweep sequence=512,1024 micro_batch=1,4
    python -m benchmarks.train --preset tiny --ladder

Each candidate trains in a process of its own on the same tokens, from the same weights; what the figures mean is said in
`benchmarks.definitions`. Without peers a row is ours alone.
"""

import dataclasses
import itertools
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from benchmarks import measure, rivals
from benchmarks.command import benchmark
from benchmarks.contest import Candidate, Outcome, contest
from benchmarks.definitions import Work, speed, work_of
from benchmarks.own import KINDS, give_weights, new_job, open_job, steps_of
from benchmarks.packs import Documents, export_steps, write_synthetic
from benchmarks.parts import COMPILED, LADDER, missing_part, missing_ranks, missing_setting
from benchmarks.power import Sampler
from engine.data.dataset import TokenDataset
from engine.environment import choose_device
from engine.estimate.flops import peak_flops
from engine.observe.profile import OPERATORS
from engine.settings.sections import OptimizerSettings
from engine.settings.toml import to_table
from model.config import MistralConfig, preset

_BREAKDOWN_STEPS = 2


@dataclass(frozen=True, kw_only=True)
class TrainBenchSettings:
    """A point, or with `sweep` a grid of points, each measured beside the same peers."""

    preset: str = "tiny"
    """Shape of the model."""
    layers: int = 0
    """Layers, where not the preset's."""
    objective: Literal["next-token", "sft", "dpo"] = "next-token"
    """What is trained."""
    sequence: int = 1024
    """Places of the longest document (of each side of a pair)."""
    micro_batch: int = 1
    """Sequences (pairs) that a micro-batch has room for."""
    accumulate: int = 1
    """Micro-batches of a step, on each rank."""
    documents: Documents = "full"
    """full: synthetic documents are all as long as the sequence; mixed: log-normal lengths, packed."""
    data: str = ""
    """Prepared folder to train on instead of synthetic tokens."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Of the parameters; auto: bfloat16 on CUDA, float32 on the CPU."""
    recompute: str = ""
    """Recompute mode; default: the engine's."""
    backend: str = ""
    """Attention backend; default: the engine's."""
    moments: Literal["float32", "bfloat16"] = "float32"
    """What the optimizer keeps its moments in."""
    offload: Literal["none", "moments"] = "none"
    """What the optimizer keeps in the host's memory."""
    ranks: int = 1
    """Processes that train together, under torchrun; peers train in one."""
    peers: tuple[str, ...] = ()
    """Names of peers to measure beside ours; all: every one that trains the objective."""
    peers_python: str = ""
    """Interpreter of the peers; default: this one."""
    sweep: tuple[str, ...] = ()
    """Grid: name=value,value for each setting that varies."""
    ladder: bool = False
    """Measure the engine's parts added one by one instead of peers."""
    side_by_side: Literal["auto", "yes", "no"] = "auto"
    """Whether all candidates stay in memory and alternate; auto: on the CPU."""
    breakdown: bool = True
    """Also say where the time goes, by a profiled extra step."""
    warmup: int = 2
    """Steps before the first measured one."""
    rounds: int = 5
    """Measured rounds of each candidate."""
    steps: int = 2
    """Steps of a round."""
    limit: float = 300.0
    """Seconds that a candidate may take to load, or for a round."""
    threads: int = 0
    """Threads of each process; default: torch's."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    seed: int = 0
    scratch: str = ""
    """Existing folder for weights and data while measuring; default: the system's for temporary files."""
    out: str = ""
    """Result file; default: print only."""

    def __post_init__(self) -> None:
        for name, least in (("layers", 0), ("sequence", 2), ("micro_batch", 1), ("accumulate", 1), ("ranks", 1), ("warmup", 1),
                            ("rounds", 1), ("steps", 1), ("threads", 0)):  # fmt: skip
            if getattr(self, name) < least:
                raise ValueError(f"{name} = {getattr(self, name)}: must be at least {least}")
        if self.ladder and self.peers:
            raise ValueError("peers have no effect with ladder; leave one of them out")
        if self.data and self.documents != "full":
            raise ValueError("documents has no effect with data; leave one of them out")
        rivals.chosen(self.peers, self.objective)

    @property
    def config(self) -> MistralConfig:
        config = preset(self.preset)
        return dataclasses.replace(config, num_hidden_layers=self.layers) if self.layers else config

    @property
    def needed_steps(self) -> int:
        return self.warmup + self.rounds * self.steps + _BREAKDOWN_STEPS


def points(settings: TrainBenchSettings) -> list[TrainBenchSettings]:
    """The grid of `sweep`. Raises: ValueError for a setting that is unknown, cannot vary, or a value of the wrong kind."""
    axes = []
    for axis in settings.sweep:
        name, equals, values = axis.partition("=")
        name = name.replace("-", "_")
        if not equals or name not in _AXES:
            raise ValueError(f"sweep = {axis!r}: must be name=value,value with a name of {', '.join(_AXES)}")
        kind = type(getattr(settings, name))
        try:
            axes.append([(name, kind(value)) for value in values.split(",")])
        except ValueError:
            raise ValueError(f"sweep = {axis!r}: values of {name} must be {kind.__name__}") from None
    return [dataclasses.replace(settings, sweep=(), **dict(chosen)) for chosen in itertools.product(*axes)]


_AXES = (
    "preset",
    "layers",
    "objective",
    "sequence",
    "micro_batch",
    "accumulate",
    "documents",
    "dtype",
    "recompute",
    "backend",
    "moments",
    "offload",
    "ranks",
)


def identity(point: TrainBenchSettings) -> dict[str, Any]:
    """The fields of a row that say what was measured."""
    return {name: getattr(point, name) for name in _AXES}


def default_dtype(device: torch.device) -> Literal["float32", "bfloat16"]:
    """What the recipes train in."""
    return "bfloat16" if device.type == "cuda" else "float32"


def missing(point: TrainBenchSettings, device: torch.device) -> str | None:
    """Why a point cannot be measured here."""
    return (
        missing_setting("recompute", point.recompute)
        or missing_setting("backend", point.backend)
        or missing_ranks(point.ranks, device)
    )


def run(settings: TrainBenchSettings, command: str = "benchmarks.train.run") -> dict[str, Any]:
    """Measure all points; returns the result, which is also written after each candidate where `out` is given."""
    device, sampler = choose_device(settings.device), Sampler()
    rows: list[dict[str, Any]] = []

    def written(complete: bool) -> dict[str, Any]:
        result = measure.result("train", command, device, to_table(settings), rows, complete=complete)
        if settings.out:
            measure.write_result(settings.out, result)
        return result

    def add(row: dict[str, Any]) -> None:
        rows.append(row)
        written(complete=False)

    if settings.dtype == "auto":
        settings = dataclasses.replace(settings, dtype=default_dtype(device))
    with tempfile.TemporaryDirectory(dir=settings.scratch or None, prefix="komainu-") as folder:
        for number, point in enumerate(points(settings)):
            why = missing(point, device)
            if why:
                add({"name": "komainu", **identity(point), "missing": why})
            else:
                first = len(rows)
                measure_point(point, device, Path(folder) / str(number), sampler, add)
                if point.ladder:
                    rows[first:] = sorted(rows[first:], key=lambda row: LADDER.index(row["name"]))
    return written(complete=True)


def measure_point(
    point: TrainBenchSettings, device: torch.device, folder: Path, sampler: Sampler, add: Callable[[dict[str, Any]], None]
) -> None:
    """Add the rows of one point: ours and the peers', or the rungs of the ladder."""
    folder.mkdir()
    job = make_job(point, device, folder)
    steps = steps_of(open_job(job), point.needed_steps)
    dtype = getattr(torch, point.dtype)
    works = [work_of(point.config, step, point.recompute, device=device, dtype=dtype) for step in steps]
    if point.peers:
        job["steps_file"] = str(folder / "steps.safetensors")
        export_steps(steps_of(open_job(job, whole_documents=True), point.needed_steps), Path(job["steps_file"]))
    entrants, absent = ladder(job, point) if point.ladder else beside_peers(job, point)
    outcomes: dict[str, Outcome] = {}

    def report(candidate: Candidate, outcome: Outcome) -> None:
        outcomes[candidate.name] = outcome
        row = {"name": candidate.name, **identity(point), "differs": list(candidate.differs)}
        if outcome.missing is not None:
            add({**row, "missing": outcome.missing})
            return
        base = outcomes[entrants[0].name]
        row.update(row_of(outcome, point, works, base, device))
        add({**row, **sampler.summary(outcome.rounds)})

    for name, why in absent.items():
        add({"name": name, **identity(point), "missing": why})
    contest(
        entrants, folder, warmup=point.warmup, rounds=point.rounds, steps=point.steps, limit=point.limit, watch=sampler.watch,
        side_by_side=point.side_by_side == "yes" or (point.side_by_side == "auto" and device.type == "cpu"), report=report,
    )  # fmt: skip


def row_of(
    outcome: Outcome, point: TrainBenchSettings, works: list[Work], base: Outcome, device: torch.device
) -> dict[str, Any]:
    """The measurements of one candidate; losses are compared with those of `base`, which measured the ceiling as well."""
    ceiling = base.answers.get("ceilings", {}).get("product_flops")
    peak = peak_flops(device)
    losses = [loss for answer in (outcome.warmup, *outcome.rounds) for loss in answer["loss"]]
    parts = outcome.answers.get("breakdown")
    return {
        "parameters": point.config.parameters,
        **speed(
            works,
            outcome.rounds,
            first=point.warmup,
            steps=point.steps,
            peak=peak and peak * point.ranks,
            ceiling=ceiling and ceiling * point.ranks,
        ),
        "ceiling_tflops": None if ceiling is None else ceiling / 1e12,
        "memory": outcome.rounds[-1]["memory"],
        "plan_gib": outcome.facts.get("plan_gib", {"missing": "a plan is made for ours alone"}),
        "breakdown": parts or {"missing": "only ours is profiled" if point.breakdown else "not asked for"},
        "loss_first": losses[0],
        "loss_last": losses[-1],
        "loss_first_difference": losses[0] - base.warmup["loss"][0] if base.missing is None else None,
        "warmup_seconds": sum(outcome.warmup["seconds"]),
        "reference": outcome.facts.get("reference"),
        "versions": outcome.facts.get("versions"),
    }


def make_job(point: TrainBenchSettings, device: torch.device, folder: Path) -> dict[str, Any]:
    """What every candidate of a point is started with; writes the data, and the weights where several must have the same."""
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
        places = room * point.accumulate * point.ranks * point.needed_steps
        write_synthetic(
            Path(data), KINDS[point.objective], config, places=places, sequence=point.sequence, documents=point.documents,
            seed=point.seed,
        )  # fmt: skip
    engine: dict[str, Any] = {name: getattr(point, name) for name in ("recompute", "backend") if getattr(point, name)}
    engine["optimizer"] = to_table(OptimizerSettings(moments=point.moments, offload=point.offload))
    job = new_job(
        point.objective, config, data, folder, device=device, dtype=point.dtype, threads=point.threads, context=point.sequence,
        step_size=point.micro_batch * point.accumulate * point.ranks * (1 if pairs else point.sequence), pack_tokens=room,
        steps=point.needed_steps, seed=point.seed, **engine,
    )  # fmt: skip
    if point.peers or point.ladder or point.ranks > 1:
        give_weights(job, folder)
    return job


def own(job: dict[str, Any], point: TrainBenchSettings, name: str = "komainu", **changes: Any) -> Candidate:
    """Ours as a candidate."""
    orders = ("ceilings", *(["breakdown"] if point.breakdown else []))
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(point.ranks)) if point.ranks > 1 else ()
    return Candidate(name, (*launcher, "-m", "benchmarks.own"), {**job, **changes}, of_ours=True, orders=orders)


def beside_peers(job: dict[str, Any], point: TrainBenchSettings) -> tuple[list[Candidate], dict[str, str]]:
    """Ours and the peers; and why some are missing."""
    names = rivals.chosen(point.peers, point.objective)
    if point.ranks > 1:
        return [own(job, point)], dict.fromkeys(names, "trains in one process here")
    return [own(job, point), *rivals.candidates(names, job, python=point.peers_python or sys.executable)], {}


def ladder(job: dict[str, Any], point: TrainBenchSettings) -> tuple[list[Candidate], dict[str, str]]:
    """The rungs that exist, from all eager references to everything; and why the others are missing."""
    present, absent = [], {}
    references = list(OPERATORS)
    settings = job["settings"] | {"recompute": "none"}
    for part in LADDER:
        why = missing_part(part, job["device"])
        if why:
            absent[part] = why
            continue
        references = [other for other in references if other != part]
        if part == "light recompute":
            settings["recompute"] = "light"
        changes = {"compiled": True} if part == COMPILED else {}
        present.append(own(job, point, part, references=references, settings=dict(settings), **changes))
    return present, absent


COLUMNS = (
    "name",
    "tokens_per_second",
    "tokens_per_cpu_second",
    "mfu",
    "of_ceiling",
    "memory",
    "loss_first_difference",
    "missing",
)


def show(result: dict[str, Any], columns: Sequence[str] = COLUMNS) -> str:
    """The rows as text."""
    varying = [name for name in _AXES if len({str(row.get(name)) for row in result["rows"]}) > 1]
    lines = [{**row, "memory": memory_text(row.get("memory"))} for row in result["rows"]]
    text = measure.table(lines, [columns[0], *varying, *columns[1:]])
    for row in result["rows"]:
        shares = row.get("breakdown", {})
        if shares and "missing" not in shares:
            text += f"\n{row['name']}: " + ", ".join(f"{name} {share:.0%}" for name, share in shares.items())
    return text


def memory_text(memory: dict[str, float] | None) -> str | None:
    return ", ".join(f"{name.removesuffix('_gib')} {value:.2f} GiB" for name, value in memory.items()) if memory else None


def main(argv: Sequence[str] | None = None) -> None:
    benchmark(TrainBenchSettings, lambda settings, text: print(show(run(settings, text))), argv, "train")


if __name__ == "__main__":
    main()
