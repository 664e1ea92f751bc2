"""Predict a training run before anything is allocated: memory item by item, the largest micro-batch, tokens per second.

    python -m recipes.plan recipes/shisa/pretrain.toml --model preset:shisa-7b --gpu h200
    python -m recipes.plan recipes/shisa/sft.toml --gpus 8 --gpu h100 --optimizer.moments bfloat16 --pack-tokens 8192

The configuration is a training recipe's TOML file, with the same dotted overrides. No data, no weights and no GPU are needed:
the model's config.json or a preset is enough.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from engine.estimate.devices import DEVICES, NODE, Device
from engine.settings.toml import parse, read_table
from engine.settings.training import TrainSettings
from kernels import TILE, padded_to_tiles
from kernels.recompute import Recompute
from model.config import PRESET, MistralConfig, preset, read_config
from recipes.dpo import DpoSettings
from recipes.drawing import new_figure, save_figure
from recipes.pretrain import PretrainSettings
from recipes.sft import SftSettings

if TYPE_CHECKING:
    from engine.estimate.fitting import Fitting
    from engine.estimate.memory import MemoryPlan, Training
    from engine.estimate.throughput import Speed

# GiB outside torch's allocator, assumed because they depend on the driver: the CUDA context with our kernels; NCCL's buffers.
_CONTEXT, _NCCL = 0.6, 1.0
# Share of the temporary memory that the allocator cannot use (assumed). A run logs what it really reserves.
_FRAGMENTATION = 0.02
# The largest micro-batch to try, in tokens.
_LARGEST = 2**17


@dataclass(frozen=True, eq=False)
class Outlook:
    """The prediction for one GPU of a run."""

    training: Training
    device: Device
    gpus: int
    limit: float  # GiB of a GPU
    memory: MemoryPlan
    overhead: dict[str, float]  # GiB outside the plan, by name
    largest: dict[str, int]  # recompute mode -> tokens of the largest micro-batch that memory holds; 0 for none
    speeds: dict[str, Speed]  # recompute mode -> speed with that micro-batch, where a document (both sides of a pair) fits
    least: int  # tokens of the smallest micro-batch that a document fits
    curve: list[Speed]  # speed on 1, 2, 4 ... GPUs and the run's own number, where the run fits
    left_out: dict[int, str]  # other numbers of GPUs -> why they are not in `curve`
    fitting: list[Fitting]  # settings that would fit, where the run does not

    @property
    def free(self) -> float:
        """GiB left; below 0 where the run does not fit."""
        return _free(self.limit, self.memory, self.overhead)

    def basis(self, gpus: int) -> str:
        """What the predicted speed on a number of GPUs rests on."""
        if gpus == 1 and self.device.measured and not self.training.fp8_layers:
            return f"predicted; {self.device.measured}"
        return "predicted; never measured" + ("" if gpus <= NODE else ", network assumed")

    @property
    def assumptions(self) -> tuple[str, ...]:
        from engine.estimate.throughput import ASSUMPTIONS, FP8_ASSUMPTION

        return (*ASSUMPTIONS, FP8_ASSUMPTION) if self.training.fp8_layers else ASSUMPTIONS

    def table(self) -> dict[str, Any]:
        """For JSON: sizes in GiB."""
        scaling = [
            {
                **dataclasses.asdict(found),
                "not_hidden": found.not_hidden,
                "hidden": found.hidden,
                "basis": self.basis(found.gpus),
            }
            for found in self.curve
        ]
        return {
            "tokens": self.training.tokens,
            "recompute": self.training.recompute,
            "gpus": self.gpus,
            "memory_gib": self.limit,
            "moment": self.memory.moment,
            "items_gib": {name: size / 2**30 for name, size in self.memory.items.items()},
            **{f"{name}_gib": size for name, size in self.overhead.items()},
            "peak_gib": self.memory.peak / 2**30,
            "free_gib": self.free,
            "largest_micro_batch": self.largest,
            "tokens_per_second": {
                mode: {"not_hidden": found.not_hidden, "hidden": found.hidden} for mode, found in self.speeds.items()
            },
            "basis": self.basis(self.gpus),
            "scaling": scaling,
            "left_out": self.left_out,
            "fitting": [fitting.settings for fitting in self.fitting],
            "assumptions": self.assumptions,
        }


def settings_of(path: str, overrides: Sequence[str]) -> TrainSettings:
    """The settings of a training recipe; the keys in the file tell which recipe."""
    table = read_table(Path(path))
    recipe: type[TrainSettings] = PretrainSettings
    if {"preference", "share_prompts", "reference_cache"} & table.keys():
        recipe = DpoSettings
    elif "neftune_alpha" in table:
        recipe = SftSettings
    return parse(recipe, [path, *overrides], prog="python -m recipes.plan")


def config_of(settings: TrainSettings) -> MistralConfig:
    """The model's shape. Raises: FileNotFoundError where the folder does not exist, naming the remedy."""
    from engine.checkpoint.state import model_folder

    if settings.model.startswith(PRESET):
        return preset(settings.model.removeprefix(PRESET))
    name = settings.model or settings.from_
    if not Path(name).exists() or not name:
        # A hub repository is not downloaded either, just for its shape.
        raise FileNotFoundError(f"model = {name}: no such folder yet; name its shape: --model preset:shisa-7b")
    return read_config(model_folder(name, weights=False))


def look_ahead(
    settings: TrainSettings,
    device: Device,
    gpus: int = 1,
    memory_gib: float = 0.0,
    config: MistralConfig | None = None,
) -> Outlook:
    """Predict a run.

    Args:
        memory_gib: memory of a GPU; 0 for the device's own.
        config: the model's shape; None to read it where `model` says.

    Raises: ValueError where parallel.replicas does not divide the GPUs, or optimizer.offload meets several GPUs.
    """
    import torch

    from engine.estimate.fitting import fitting_settings
    from engine.estimate.memory import Training, largest_micro_batch
    from engine.estimate.throughput import speed
    from engine.precision import fp8_layers
    from kernels.attention.backward import in_one_pass

    replicas = settings.parallel.replicas
    if gpus < 1 or gpus % replicas:
        raise ValueError(f"gpus = {gpus}: must be a multiple of parallel.replicas = {replicas}, at least 1")
    offloaded = settings.optimizer.offload != "none"
    if offloaded and gpus > 1:
        raise ValueError("optimizer.offload works on one rank only: several GPUs share the moments already; leave it out")
    config = config or config_of(settings)
    paired = isinstance(settings, DpoSettings)
    sides = 2 if paired else 1
    tokens = settings.pack_tokens or sides * settings.context_length
    # Without data the lengths of pairs are unknown: assume the longest.
    step_tokens = settings.step_size * (2 * settings.context_length if paired else 1)
    dtype = torch.float32 if settings.dtype == "float32" else torch.bfloat16
    gradients = settings.optimizer.chosen_gradients(step_tokens, tokens, bfloat16=dtype == torch.bfloat16)
    training = Training(
        config,
        dtype,
        dataclasses.replace(settings.optimizer, gradients=gradients),
        settings.recompute,
        tokens=tokens,
        rows=tokens,
        accumulates=step_tokens > gpus * tokens,
        log_probs=paired,
        kernels=dtype == torch.bfloat16,
        shards=gpus // replicas,
        reshard=settings.parallel.reshard,
        fp8_layers=fp8_layers(settings, config),
        keep_codes=settings.fp8.keep_weights and gpus == 1,
        reduce_once=settings.parallel.reduce_once,
        one_pass=in_one_pass(torch.device("cpu"), dtype),  # a CPU has the table of the chip that both kinds of GPU have
    )
    limit = memory_gib or device.memory
    found, overhead = _memory(training, gpus)
    held = _held(found)
    # A micro-batch cannot exceed a rank's part of a step (in whole tiles).
    most = min(_LARGEST, padded_to_tiles(-(-step_tokens // gpus)))
    room = limit - overhead["context"]
    # Fragmentation concerns temporary memory alone; charged to everything, the micro-batch would come out too small.
    bytes_of_room = int((room - max(0.0, room - held / 2**30) * _FRAGMENTATION / (1 + _FRAGMENTATION)) * 2**30)
    largest = {
        mode: largest_micro_batch(dataclasses.replace(training, recompute=mode), bytes_of_room, most=most, multiple=TILE)
        for mode in get_args(Recompute)
    }
    least = min(sides * settings.context_length, most)
    asked = {"context": settings.context_length, "step_tokens": step_tokens}
    speeds = {
        mode: speed(
            dataclasses.replace(training, recompute=mode, tokens=fits, rows=fits), device, gpus=gpus, replicas=replicas, **asked
        )
        for mode, fits in largest.items()
        if fits >= least
    }
    curve, left_out = [], {}
    for number in [1] if offloaded else sorted({gpus, *(2**power for power in range(11))}):
        copies = replicas if number == gpus else max(1, number // NODE)
        accumulates = step_tokens > number * tokens
        keep = settings.fp8.keep_weights and number == 1
        there = dataclasses.replace(training, accumulates=accumulates, shards=number // copies, keep_codes=keep)
        missing = -_free(limit, *_memory(there, number))
        if missing > 0:
            left_out[number] = f"{missing:.1f} GiB too little"
        elif number > 1 and number * tokens > step_tokens:
            left_out[number] = f"step_size has fewer micro-batches of {tokens:,} tokens"
        else:
            curve.append(speed(there, device, gpus=number, replicas=copies, **asked))

    def fits(memory: MemoryPlan) -> bool:
        return _free(limit, memory, _overhead(memory, gpus)) >= 0

    fitting = [] if fits(found) else fitting_settings([training], fits, least=least, fresh=True)
    return Outlook(training, device, gpus, limit, found, overhead, largest, speeds, least, curve, left_out, fitting)


def _memory(training: Training, gpus: int) -> tuple[MemoryPlan, dict[str, float]]:
    """(a GPU's memory plan, GiB outside it by name)."""
    from engine.estimate.memory import plan

    found = plan(training)
    return found, _overhead(found, gpus)


def _overhead(found: MemoryPlan, gpus: int) -> dict[str, float]:
    """GiB outside a plan, by name."""
    return {
        "context": _CONTEXT + (_NCCL if gpus > 1 else 0.0),
        "fragmentation": _FRAGMENTATION * (found.peak - _held(found)) / 2**30,
    }


def _held(found: MemoryPlan) -> int:
    """Bytes that are held throughout a step."""
    return found.items["weights"] + found.items["optimizer"] + found.items["gradients"]


def _free(limit: float, found: MemoryPlan, overhead: dict[str, float]) -> float:
    return limit - found.peak / 2**30 - sum(overhead.values())


def lines_of(outlook: Outlook, name: str) -> list[str]:
    """The plan as text."""
    import torch

    training, config = outlook.training, outlook.training.config
    optimizer = training.optimizer
    gpus = _gpus(str(outlook.gpus))
    fp8 = f"FP8 in {len(training.fp8_layers)} of {config.num_hidden_layers} layers, " if training.fp8_layers else ""
    lines = [
        f"{name}: {config.parameters / 1e9:.3f} billion parameters on {gpus} of {outlook.limit:g} GiB",
        f"{fp8}recompute {training.recompute}, "
        f"{optimizer.moments} moments{' on the host' if optimizer.offload != 'none' else ''}, "
        f"micro-batches of {training.tokens:,} tokens{' (gradient accumulation)' if training.accumulates else ''}",
        "",
        f"GiB on a GPU at the peak, in the {outlook.memory.moment}",
    ]
    lines += [f"  {item:<24}{size / 2**30:>9.2f}" for item, size in outlook.memory.items.items() if size]
    lines += [f"  {item + ' (assumed)':<24}{size:>9.2f}" for item, size in outlook.overhead.items()]
    free = outlook.free
    lines += [f"  {'free' if free >= 0 else 'DOES NOT FIT: too much by':<24}{abs(free):>{9 if free >= 0 else 8}.2f}", ""]
    if free < 0:
        found = [f"{fitting} ({fitting.peak / 2**30:.2f} GiB)" for fitting in outlook.fitting]
        lines += [f"these would fit: {', or '.join(found)}" if found else "no setting is lean enough on so many GPUs", ""]
    lines += _modes(outlook)
    if optimizer.offload != "none":
        moment = getattr(torch, optimizer.moments).itemsize
        lines += ["", f"host memory: {config.parameters * 2 * moment / 2**30:.1f} GiB of moments, page-locked"]
    lines += ["", *_scaling(outlook)]
    return [*lines, "", "assumed:", *(f"  {text}" for text in outlook.assumptions)]


def _gpus(numbers: str) -> str:
    return f"{numbers} GPU" if numbers == "1" else f"{numbers} GPUs"


def _modes(outlook: Outlook) -> list[str]:
    """The largest micro-batch and the speed of each recompute mode."""
    speeds, basis = outlook.speeds, outlook.basis(outlook.gpus)
    lines = []
    if speeds:
        lines.append(f"{'recompute':<12}{'largest micro-batch':>20}{'tokens/s not hidden':>21}{'hidden':>12}")
    for mode, found in speeds.items():
        lines.append(f"{mode:<12}{outlook.largest[mode]:>20,}{found.not_hidden:>21,.0f}{found.hidden:>12,.0f}  {basis}")
    small = [f"{mode} ({most:,})" for mode, most in outlook.largest.items() if mode not in speeds]
    if small:
        lines.append(f"left out, as fewer than {outlook.least:,} tokens fit: {', '.join(small)}")
    return lines


def _scaling(outlook: Outlook) -> list[str]:
    """The speed on each number of GPUs that the run fits, the slower assumption first."""
    lines = []
    if outlook.curve:
        first = outlook.curve[0]
        compared = f"of {_gpus(str(first.gpus))}"
        lines.append(f"{'GPUs':>6}{'tokens a step':>16}{'tokens/s not hidden':>21}{'a GPU':>10}{compared:>12}{'hidden':>12}")
    for found in outlook.curve:
        each = found.not_hidden / found.gpus
        lines.append(
            f"{found.gpus:>6,}{found.step_tokens:>16,}{found.not_hidden:>21,.0f}{each:>10,.0f}"
            f"{each / (first.not_hidden / first.gpus):>12.1%}{found.hidden:>12,.0f}  {outlook.basis(found.gpus)}"
        )
    reasons: dict[str, list[str]] = {}
    for number, reason in outlook.left_out.items():
        reasons.setdefault(reason, []).append(f"{number:,}")
    if reasons:
        lines.append("left out: " + "; ".join(f"{_gpus(', '.join(found))}: {reason}" for reason, found in reasons.items()))
    return lines


def draw(outlook: Outlook, file: Path) -> None:
    """Tokens per second of a GPU over the number of GPUs. Without matplotlib one line says so.

    Raises: ValueError where the run fits no number of GPUs.
    """
    if not outlook.curve:
        raise ValueError("--plot: no number of GPUs fits this run: lower pack_tokens, or choose a leaner recompute")
    figure = new_figure(6.4, 4.0)
    if figure is None:
        return
    axes = figure.add_subplot()
    for label in ("not_hidden", "hidden"):
        each = [getattr(found, label) / found.gpus for found in outlook.curve]
        axes.plot([found.gpus for found in outlook.curve], each, marker="o", label=f"communication {label.replace('_', ' ')}")
    axes.set(xscale="log", xlabel="GPUs", ylabel="tokens/s a GPU, predicted", ylim=(0, None))
    axes.set_xticks([found.gpus for found in outlook.curve], labels=[str(found.gpus) for found in outlook.curve], minor=False)
    axes.minorticks_off()
    axes.legend()
    save_figure(figure, file)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m recipes.plan",
        description=__doc__,
        formatter_class=argparse.RawTextHelpFormatter,
        # "--dev" must not become one of the options below.
        allow_abbrev=False,
    )
    parser.add_argument("config", help="TOML file of a training recipe; its dotted overrides may follow (--pack-tokens 8192)")
    parser.add_argument("--gpu", choices=sorted(DEVICES), default="h200", help="kind of GPU (default %(default)s)")
    parser.add_argument("--gpus", type=int, default=1, help="GPUs of the run (default %(default)s)")
    parser.add_argument("--memory-gib", type=float, default=0.0, help="memory of a GPU (default: the device's)")
    parser.add_argument("--json", action="store_true", help="print JSON instead of text")
    parser.add_argument("--plot", type=Path, help="draw the scaling curve to this file (.png, .svg or .pdf)")
    arguments, overrides = parser.parse_known_args(argv)
    for option, value in pairwise(overrides):
        if option == "--device" and value in DEVICES:
            parser.error(f"--device says where a recipe runs (auto, cpu, cuda); the kind of GPU is --gpu {value}")
    try:
        settings = settings_of(arguments.config, overrides)
        outlook = look_ahead(settings, DEVICES[arguments.gpu], arguments.gpus, arguments.memory_gib)
        if arguments.plot:
            draw(outlook, arguments.plot.expanduser())
    except (ValueError, OSError) as error:
        raise SystemExit(f"error: {error}") from None
    print(json.dumps(outlook.table(), indent=2) if arguments.json else "\n".join(lines_of(outlook, settings.model)))


if __name__ == "__main__":
    main()
