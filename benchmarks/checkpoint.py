"""The cost of a checkpoint: seconds, gigabytes a second, how long training stands still, host memory.

    python -m benchmarks.checkpoint                 a small model on a CPU, four layers of Mistral 7B on CUDA
    python -m benchmarks.checkpoint --preset mistral-7b --layers 2 --dtype bfloat16 --folder /data --out results.json

Each provider saves and loads the state of a training run (parameters, moments, the masters' remainders of bfloat16) in a
process of its own. A load ends with a model and an optimizer ready to go on, which are compared with the saved state.
"seconds" of a save end when everything is on the disk (fsync included), "blocked_seconds" when training can go on. Before a
load the files are dropped from the page cache, as far as the system allows. "above_gib" is the peak resident set beyond the
resident set before the operation; for a load on the host it includes the state itself.
"""

import hashlib
import importlib
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from benchmarks import measure, processes
from benchmarks.command import benchmark, check_least, check_names
from benchmarks.results import Result, table
from benchmarks.shapes import name_of, shape
from engine.checkpoint.state import TrainingState, load_optimizer, newest_checkpoint, read_state
from engine.checkpoint.writing import Checkpointer
from engine.distributed.ranks import Ranks
from engine.environment import choose_device, choose_dtype
from engine.optim.adamw import AdamW
from engine.settings.sections import OptimizerSettings
from engine.settings.toml import PathName
from model.folder import sync_all
from model.mistral import Mistral
from model.vocabulary.tokenizer import Tokenizer, mistral_tokenizer_path
from model.weights import load_model

COLUMNS = ["provider", "operation", "gib", "files", "seconds", "gb_per_second", "blocked_seconds", "above_gib", "wrong"]
COLUMNS += ["missing"]
State = tuple[Mistral, AdamW]


@dataclass(frozen=True, kw_only=True)
class CheckpointSettings:
    """The state to save, and the place for it."""

    preset: str = ""
    """Model; default: mistral-7b on CUDA, small on a CPU."""
    layers: int = 0
    """Its layers; default: 4 of mistral-7b on CUDA, else all."""
    providers: tuple[str, ...] = ()
    """Names as in the table; default all."""
    folder: PathName = ""
    """Folder on the measured disk; default: the system's temporary one."""
    rounds: int = 3
    """Times that each provider saves and loads."""
    limit: float = 600.0
    """Seconds after which a provider is cut off."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """auto: bfloat16 on CUDA, float32 on a CPU."""
    out: PathName = ""
    """Result file; default: print only."""

    def __post_init__(self) -> None:
        check_least(self, layers=0, rounds=1)
        check_names("providers", self.providers, list(PROVIDERS))


class Subject:
    """The state that is saved: its shape, dtype and device."""

    def __init__(self, settings: CheckpointSettings) -> None:
        self.device = choose_device(settings.device)
        cuda = self.device.type == "cuda"
        self.dtype = choose_dtype(settings.dtype, self.device)
        self.preset = settings.preset or ("mistral-7b" if cuda else "small")
        self.config = shape(self.preset, settings.layers or (4 if cuda and not settings.preset else 0))
        # A parameter, two float32 moments, and an int16 remainder for bfloat16.
        self.bytes = self.config.parameters * (self.dtype.itemsize + 8 + (2 if self.dtype == torch.bfloat16 else 0))

    def empty(self) -> State:
        """A model and its optimizer before anything is loaded."""
        with torch.device("meta"):
            model = Mistral(self.config)
        model = model.to(self.dtype).to_empty(device=self.device)
        return model, AdamW(model.named_parameters(), OptimizerSettings())

    def filled(self) -> State:
        """Random values: a file system may store zeros for less."""
        state = self.empty()
        generator = torch.Generator(self.device).manual_seed(0)
        for tensor in tensors_of(*state).values():
            fill = tensor.normal_ if tensor.is_floating_point() else tensor.random_
            fill(generator=generator)
        return state


def tensors_of(model: Mistral, optimizer: AdamW) -> dict[str, Tensor]:
    """All tensors of a run's state by name."""
    return {name: parameter.detach() for name, parameter in model.named_parameters()} | optimizer.state


def digest(tensors: dict[str, Tensor]) -> str:
    """Tells states apart: the sum of each tensor's bits, and the sum of every seventh word."""
    words = {2: torch.int16, 4: torch.int32}
    sums = []
    for name, tensor in sorted(tensors.items()):
        bits = tensor.view(words[tensor.itemsize]).flatten()
        sums.append((name, int(bits.sum(dtype=torch.int64)), int(bits[::7].sum(dtype=torch.int64))))
    return hashlib.sha256(repr(sums).encode()).hexdigest()


@dataclass(frozen=True)
class Provider:
    # Prepares a save into a folder; returns the timed function, which may return an object whose result() is waited for.
    save: Callable[[Path, Mistral, AdamW], Callable[[], Any]]
    load: Callable[[Path, Subject], State]  # from a folder to a state that is ready to go on


def _save_ours(folder: Path, model: Mistral, optimizer: AdamW) -> Callable[[], Any]:
    tokenizer = Tokenizer.load(mistral_tokenizer_path())
    checkpointer = Checkpointer(folder, model, optimizer, tokenizer, Ranks(model.lm_head.weight.device), keep=1)

    def save() -> Any:
        checkpointer.save(TrainingState(1, {}, ""))
        return SimpleNamespace(result=checkpointer.close)

    return save


def _load_ours(folder: Path, subject: Subject) -> State:
    checkpoint = newest_checkpoint(folder)
    assert checkpoint is not None
    read_state(checkpoint)
    model = load_model(checkpoint, dtype=subject.dtype, device=subject.device)
    optimizer = AdamW(model.named_parameters(), OptimizerSettings())
    load_optimizer(checkpoint, optimizer, Ranks(subject.device))
    return model, optimizer


def _save_distributed(function: str, folder: Path, model: Mistral, optimizer: AdamW) -> Callable[[], Any]:
    # Imported late: it is large enough to show in the others' memory.
    save = getattr(importlib.import_module("torch.distributed.checkpoint"), function)
    return partial(save, tensors_of(model, optimizer), checkpoint_id=folder, no_dist=True)


def _load_distributed(folder: Path, subject: Subject) -> State:
    state = subject.empty()
    importlib.import_module("torch.distributed.checkpoint").load(tensors_of(*state), checkpoint_id=folder, no_dist=True)
    return state


def _save_safetensors(folder: Path, model: Mistral, optimizer: AdamW) -> Callable[[], Any]:
    return partial(save_file, tensors_of(model, optimizer), folder / "state.safetensors")


def _load_safetensors(folder: Path, subject: Subject) -> State:
    state = subject.empty()
    saved = load_file(folder / "state.safetensors", device=str(subject.device))
    for name, tensor in tensors_of(*state).items():
        tensor.copy_(saved[name])
    return state


PROVIDERS: dict[str, Provider] = {
    "komainu": Provider(_save_ours, _load_ours),
    "torch.distributed.checkpoint": Provider(partial(_save_distributed, "save"), _load_distributed),
    "torch.distributed.checkpoint, async": Provider(partial(_save_distributed, "async_save"), _load_distributed),
    "safetensors save_file": Provider(_save_safetensors, _load_safetensors),
}


def run(settings: CheckpointSettings, command: str = "benchmarks.checkpoint.run") -> dict[str, Any]:
    """Measure, print a table; returns the result, whose file is written after each provider."""
    subject = Subject(settings)
    resolved = {"preset": subject.preset, "layers": subject.config.num_hidden_layers, "dtype": name_of(subject.dtype)}
    result = Result("checkpoint", command, subject.device, settings, resolved)
    for provider in settings.providers or PROVIDERS:
        with tempfile.TemporaryDirectory(prefix="komainu-", dir=settings.folder or None) as folder:
            free = shutil.disk_usage(folder).free
            if free < 1.1 * subject.bytes:
                raise ValueError(
                    f"{Path(folder).parent}: {free / 2**30:.1f} GiB free, the state takes {subject.bytes / 2**30:.1f}: choose "
                    "another folder, or fewer layers"
                )
            arguments = {"settings": asdict(settings), "provider": provider, "folder": folder}
            try:
                found = processes.call_apart("benchmarks.checkpoint", "save_and_load", arguments, limit=settings.limit)
            except processes.ApartError as error:
                found = {name: {"missing": str(error)} for name in ("save", "load")}
            result.add(*({"provider": provider, "operation": name, **row} for name, row in found.items()))
    print(table(result.rows, COLUMNS), flush=True)
    return result.finish()


def save_and_load(settings: dict[str, Any], provider: str, folder: str) -> dict[str, dict[str, Any]]:
    """Save a state `rounds` times, each time anew, then load the last checkpoint as often. Returns a row of each."""
    chosen = CheckpointSettings(**settings)
    subject, target, measured = Subject(chosen), Path(folder) / "checkpoint", Measured()
    state: State | None = subject.filled()
    assert state is not None
    saved = digest(tensors_of(*state))
    for _ in range(chosen.rounds):
        shutil.rmtree(target, ignore_errors=True)
        target.mkdir()
        work = PROVIDERS[provider].save(target, *state)
        measure.synchronize(subject.device)
        measured.begin()
        pending = work()
        measured.blocked.append(time.perf_counter() - measured.start)
        if hasattr(pending, "result"):
            pending.result()
        sync_all(target)
        measured.end()
    rows, measured = {"save": measured.row(target)}, Measured()
    for _ in range(chosen.rounds):
        state = None
        forget_files(target)
        measured.begin()
        state = PROVIDERS[provider].load(target, subject)
        measure.synchronize(subject.device)
        measured.end()
    rows["load"] = measured.row(target)
    if digest(tensors_of(*state)) != saved:
        rows["load"]["wrong"] = "the loaded state is not the saved one"
    return rows


class Measured:
    """Seconds and host memory of an operation."""

    def __init__(self) -> None:
        self.start, self._before = 0.0, 0.0
        self.seconds: list[float] = []
        self.blocked: list[float] = []
        self.above: list[float] = []

    def begin(self) -> None:
        measure.reset_peak_resident()
        self._before = measure.peak_resident_gib()
        self.start = time.perf_counter()

    def end(self) -> None:
        self.seconds.append(time.perf_counter() - self.start)
        self.above.append(measure.peak_resident_gib() - self._before)

    def row(self, folder: Path) -> dict[str, Any]:
        sizes = [path.stat().st_size for path in folder.rglob("*") if path.is_file()]
        spread = measure.spread(self.seconds)
        row: dict[str, Any] = {"gib": sum(sizes) / 2**30, "files": len(sizes), "seconds": spread}
        row |= {"gb_per_second": sum(sizes) / 1e9 / spread["median"], "above_gib": max(self.above)}
        return row | ({"blocked_seconds": measure.spread(self.blocked)} if self.blocked else {})


def forget_files(folder: Path) -> None:
    """Ask the system to drop a folder's files, which are on the disk, from its page cache."""
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def main(argv: Sequence[str] | None = None) -> None:
    benchmark(CheckpointSettings, run, "checkpoint", argv)


if __name__ == "__main__":
    main()
