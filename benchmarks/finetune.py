"""Fine-tuning and preference tuning beside TRL: the same small Mistral, the same conversations and pairs, in turns.

    python -m benchmarks.finetune --threads 2 --out FILE

A token is a non-padding token of a conversation, or of a chosen or rejected answer with its prompt, which counts for both, so
that a trainer that shares prompts is not credited less. "with_reference" adds to each token the cost of the reference's
log-probabilities where they are computed beforehand, once for each pair; in each step TRL computes them besides.
"""

import functools
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from benchmarks import measure, rivals
from benchmarks.command import benchmark
from benchmarks.contest import Candidate, Outcome, contest
from benchmarks.definitions import Work, speed, work_of
from benchmarks.own import KINDS, give_weights, new_job, open_job, steps_of
from benchmarks.packs import export_steps, write_synthetic
from benchmarks.train import default_dtype, memory_text
from engine.data.dataset import DatasetWriter, TokenDataset
from engine.data.prepare import prepare
from engine.environment import choose_device
from engine.settings.toml import to_table
from model.config import MistralConfig, preset

Stage = Literal["sft", "dpo"]
# Two cores train it at a few hundred tokens a second, with the real vocabulary.
SMALL = MistralConfig(
    hidden_size=256, intermediate_size=704, num_hidden_layers=4, num_attention_heads=8, num_key_value_heads=2, head_dim=32,
    max_position_embeddings=4096,
)  # fmt: skip
FILES = {"sft": ("sft/en_sharegpt.jsonl.gz", "sft/ja_sharegpt.jsonl.gz"), "dpo": ("pref/ja_pairs.jsonl.gz",)}
PEERS = {
    "sft": ("TRL SFT padded", "TRL SFT padding-free", "TRL SFT packed", "TRL SFT accumulated"),
    "dpo": ("TRL DPO", "TRL DPO precomputed", "TRL DPO accumulated"),
}
TARGETS = {"sft": 1.5, "dpo": 1.8}
NAME = "komainu"


@dataclass(frozen=True, kw_only=True)
class FinetuneBenchSettings:
    """Both stages, ours and every path that TRL has for each."""

    stages: tuple[Stage, ...] = ("sft", "dpo")
    preset: str = ""
    """Shape of the model; default: 4 layers of width 256 over 32,000 pieces."""
    step_tokens: int = 3200
    """Tokens of a step of conversations."""
    step_pairs: int = 8
    """Pairs of a step."""
    conversation_length: int = 1024
    """Longest conversation, in tokens."""
    pair_length: int = 512
    """Longest side of a pair, in tokens."""
    pack_tokens: int = 0
    """Places of our micro-batches; default: the recipes', the longest conversation or pair."""
    data: str = ""
    """Folder of sft/{en,ja}_sharegpt.jsonl.gz and pref/ja_pairs.jsonl.gz; default: shared/data beside the checkout. Where it is
    absent, random tokens of like lengths."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    learning_rate: float = 1e-4
    peers_python: str = ""
    """Interpreter of the peers; default: this one."""
    warmup: int = 1
    """Steps before the first measured one."""
    rounds: int = 5
    """Measured runs of each, in turns."""
    steps: int = 1
    """Steps of a run."""
    breakdown: bool = True
    """Also say where our time goes, by a profiled extra step."""
    limit: float = 600.0
    """Seconds that a candidate may take to load, or for a run."""
    threads: int = 0
    """Threads of each process; default: torch's."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    seed: int = 0
    scratch: str = ""
    """Existing folder for weights and data while measuring; default: the system's for temporary files."""
    out: str = ""
    """Result file; default: print only."""

    def __post_init__(self) -> None:
        for name, least in (("step_tokens", 1), ("step_pairs", 1), ("conversation_length", 16), ("pair_length", 16),
                            ("pack_tokens", 0), ("warmup", 1), ("rounds", 1), ("steps", 1), ("threads", 0)):  # fmt: skip
            if getattr(self, name) < least:
                raise ValueError(f"{name} = {getattr(self, name)}: must be at least {least}")
        if not self.stages:
            raise ValueError("stages: name sft, dpo or both")

    @property
    def config(self) -> MistralConfig:
        return preset(self.preset) if self.preset else SMALL

    @property
    def needed_steps(self) -> int:
        return self.warmup + self.rounds * self.steps + 2

    def length(self, stage: str) -> int:
        return self.conversation_length if stage == "sft" else self.pair_length


def run(settings: FinetuneBenchSettings, command: str = "benchmarks.finetune.run") -> dict[str, Any]:
    """Measure the stages; returns the result, which is also written after each candidate where `out` is given."""
    device = choose_device(settings.device)
    rows: list[dict[str, Any]] = []

    def written(complete: bool) -> dict[str, Any]:
        result = measure.result("finetune", command, device, to_table(settings), rows, complete=complete)
        if settings.out:
            measure.write_result(settings.out, result)
        return result

    def add(row: dict[str, Any]) -> None:
        rows.append(row)
        written(complete=False)

    with tempfile.TemporaryDirectory(dir=settings.scratch or None, prefix="komainu-") as folder:
        for stage in settings.stages:
            measure_stage(settings, stage, device, Path(folder) / stage, add)
    return written(complete=True)


def measure_stage(
    settings: FinetuneBenchSettings, stage: str, device: torch.device, folder: Path, add: Callable[[dict[str, Any]], None]
) -> None:
    """Add a row for ours, one for each of TRL's paths, and one that compares."""
    folder.mkdir()
    described = write_data(settings, stage, folder / "data")
    length, sides = settings.length(stage), 1 if stage == "sft" else 2
    job = new_job(
        stage, settings.config, str(folder / "data"), folder, device=device,
        dtype=settings.dtype if settings.dtype != "auto" else default_dtype(device), threads=settings.threads, context=length,
        step_size=settings.step_tokens if stage == "sft" else settings.step_pairs,
        pack_tokens=settings.pack_tokens or sides * length, steps=settings.needed_steps, seed=settings.seed,
        learning_rate=settings.learning_rate,
    )  # fmt: skip
    give_weights(job, folder)
    job["steps_file"] = str(folder / "steps.safetensors")
    export_steps(steps_of(open_job(job, whole_documents=True), settings.needed_steps), Path(job["steps_file"]))
    works = [work_of(settings.config, step) for step in steps_of(open_job(job), settings.needed_steps)]
    orders = ("ceilings", *(["breakdown"] if settings.breakdown else []))
    entrants = [
        Candidate(NAME, ("-m", "benchmarks.own"), job, of_ours=True, orders=orders),
        *rivals.candidates(list(PEERS[stage]), job, python=settings.peers_python or sys.executable),
    ]
    rows: list[dict[str, Any]] = []
    outcomes: dict[str, Outcome] = {}

    def report(candidate: Candidate, outcome: Outcome) -> None:
        outcomes[candidate.name] = outcome
        row = {"stage": stage, "name": candidate.name, "data": described, "differs": list(candidate.differs)}
        if outcome.missing is None:
            row.update(row_of(outcome, settings, works, outcomes[NAME]))
        else:
            row["missing"] = outcome.missing
        rows.append(row)
        add(row)

    contest(
        entrants, folder, warmup=settings.warmup, rounds=settings.rounds, steps=settings.steps, limit=settings.limit,
        side_by_side=device.type == "cpu", report=report,
    )  # fmt: skip
    add(comparison(stage, rows))


def row_of(outcome: Outcome, settings: FinetuneBenchSettings, works: list[Work], ours: Outcome) -> dict[str, Any]:
    """The measurements of one candidate. What computed the reference beforehand did so for the tokens of all steps."""
    row = speed(works, outcome.rounds, first=settings.warmup, steps=settings.steps, whole_documents=True)
    for name in ("mfu", "hfu", "of_ceiling"):
        del row[name]
    reference = outcome.facts.get("reference")
    every = sum(work.places + work.documents for work in works)
    for name, spent in (("tokens_per_second", "seconds"), ("tokens_per_cpu_second", "cpu_seconds")):
        extra = reference[spent] / every if reference else 0.0
        row[f"{name}_with_reference"] = {
            key: value if key == "samples" else 1 / (1 / value + extra) for key, value in row[name].items()
        }
    if reference:
        row["reference"] = {"seconds": reference["seconds"], "cpu_seconds": reference["cpu_seconds"], "tokens": every}
    losses, base = _losses(outcome), _losses(ours)
    same = not any(counts for answer in outcome.rounds for counts in answer["counts"]) or _same_tokens(outcome, works, settings)
    return {
        **row,
        "memory": outcome.rounds[-1]["memory"],
        "loss_first": losses[0],
        "loss_last": losses[-1],
        "loss_largest_difference": max(abs(a - b) for a, b in zip(losses, base, strict=True)) if same and base else None,
        "breakdown": outcome.answers.get("breakdown"),
        "versions": outcome.facts.get("versions"),
    }


def _losses(outcome: Outcome) -> list[float]:
    return [loss for answer in (outcome.warmup, *outcome.rounds) for loss in answer.get("loss", [])]


def _same_tokens(outcome: Outcome, works: list[Work], settings: FinetuneBenchSettings) -> bool:
    """Whether a trainer that counts its own tokens trained on the steps that ours did."""
    counted = [counts["tokens"] for answer in (outcome.warmup, *outcome.rounds) for counts in answer["counts"]]
    return counted == [work.places + work.documents for work in works[: len(counted)]]


def comparison(stage: str, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Ours over TRL's best path, each measure against the path that is best in it; memory against the path with the least."""
    row = {"stage": stage, "name": f"{NAME} / TRL", "target": TARGETS[stage]}
    ours, theirs = rows[0], [other for other in rows[1:] if "missing" not in other]
    if "missing" in ours or not theirs:
        return {**row, "missing": ours.get("missing", "no path of TRL was measured")}

    def best(value: Callable[[dict[str, Any]], float], choose: Callable = max) -> tuple[float, str]:
        other = choose(theirs, key=value)
        return value(ours) / value(other), other["name"]

    ratios = {}
    for name in ("tokens_per_second", "tokens_per_cpu_second"):
        for which in (name, f"{name}_with_reference") if stage == "dpo" else (name,):
            ratios[which] = best(functools.partial(_median, which))
    kind = "resident_gib" if "resident_gib" in ours["memory"] else "allocated_gib"
    memory = best(lambda other: other["memory"][kind], min)
    return {
        **row,
        "ratio": {name: ratio for name, (ratio, _) in ratios.items()},
        "memory_ratio": memory[0],
        "against": {**{name: other for name, (_, other) in ratios.items()}, "memory": memory[1]},
        "met": memory[0] <= 1 and all(ratio >= TARGETS[stage] for ratio, _ in ratios.values()),
    }


def _median(name: str, row: dict[str, Any]) -> float:
    return row[name]["median"]


def write_data(settings: FinetuneBenchSettings, stage: str, folder: Path) -> str:
    """The stage's documents, no longer than its length, as a prepared dataset; returns what they are.

    As many as the steps take: each pair is trained on, and scored by the reference, once.
    """
    root = Path(settings.data) if settings.data else measure.ROOT.parent / "shared" / "data"
    sources = [root / name for name in FILES[stage]]
    length, steps, pairs = settings.length(stage), settings.needed_steps, stage == "dpo"
    if not all(path.is_file() for path in sources) or settings.config.unpadded_vocab_size != SMALL.vocab_size:
        places = steps * (settings.step_pairs * 2 * length if pairs else settings.step_tokens)
        write_synthetic(
            folder, KINDS[stage], settings.config, places=places, sequence=length - 1, documents="mixed", seed=settings.seed
        )
        return "random tokens"
    from model.vocabulary.tokenizer import Tokenizer, mistral_tokenizer_path

    tokenizer = Tokenizer.load(mistral_tokenizer_path())
    prepared = []
    for path in sources:
        out = folder.with_name(f"all-{path.name}")
        prepare([str(path)], out, tokenizer=tokenizer, kind=KINDS[stage])
        prepared.append(TokenDataset.open(out))
    folder.mkdir()
    rng = np.random.default_rng(settings.seed)
    unit = 2 if pairs else 1
    fitting = []
    for dataset in prepared:
        longest = dataset.lengths.reshape(-1, unit).max(axis=1)
        fitting.append(iter(rng.permutation(np.flatnonzero(longest <= length)).tolist()))
    wanted, had = steps * (settings.step_pairs if pairs else settings.step_tokens), 0
    with DatasetWriter(
        folder, KINDS[stage], vocab_size=tokenizer.vocab_size, tokenizer_fingerprint=tokenizer.fingerprint
    ) as writer:
        while had < wanted:
            for dataset, order in zip(prepared, fitting, strict=True):
                first = unit * next(order)
                for document in range(first, first + unit):
                    prompt = int(dataset.prompt_lengths[document]) if dataset.prompt_lengths is not None else 0
                    writer.add(dataset.tokens(document), dataset.trained(document), prompt)
                had += 1 if pairs else int(dataset.lengths[first]) - 1
        writer.finish()
    return ", ".join(path.name for path in sources)


COLUMNS = ("stage", "name", "tokens_per_second", "tokens_per_cpu_second", "tokens_per_cpu_second_with_reference", "memory",
           "loss_largest_difference", "missing")  # fmt: skip


def show(result: dict[str, Any]) -> str:
    """The rows as text."""
    lines = [{**row, "memory": memory_text(row.get("memory"))} for row in result["rows"] if "target" not in row]
    text = [measure.table(lines, COLUMNS)]
    for row in result["rows"]:
        if row.get("breakdown"):
            text.append(f"{row['stage']} {row['name']}: " + ", ".join(f"{k} {v:.0%}" for k, v in row["breakdown"].items()))
        if "ratio" in row:
            ratios = ", ".join(f"{name} {ratio:.2f} ({row['against'][name]})" for name, ratio in row["ratio"].items())
            text.append(
                f"{row['stage']} {row['name']}: {ratios}, memory {row['memory_ratio']:.2f} ({row['against']['memory']}); "
                f"target {row['target']}: {'met' if row['met'] else 'not met'}"
            )
    return "\n".join(text)


def main(argv: Sequence[str] | None = None) -> None:
    benchmark(FinetuneBenchSettings, lambda settings, text: print(show(run(settings, text))), argv, "finetune")


if __name__ == "__main__":
    main()
