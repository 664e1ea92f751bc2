"""The cost of a checkpoint: seconds, gigabytes a second, how long training stands still, host memory.

    python -m benchmarks.checkpoint                 a small model on a CPU, four layers of Mistral 7B on CUDA
    python -m benchmarks.checkpoint --preset mistral-7b --layers 2 --dtype bfloat16 --folder /data --out results.json

Each provider saves and loads the state of a training run (parameters, moments, the masters' remainders of bfloat16) in two
processes of its own. A load ends with a model and an optimizer ready to go on, which are compared with the saved state.
"seconds" of a save end when everything is on the disk (fsync included), "blocked_seconds" when training can go on. Before a load
the files are dropped from the page cache, as far as the system allows. "above_gib" is the peak resident set beyond the resident
set before the operation; for a load on the host it includes the state itself.
"""

import hashlib
import importlib
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from benchmarks import measure, processes
from benchmarks.command import benchmark, check_least, check_names
from benchmarks.results import Result, table
from benchmarks.shapes import dtype_of, name_of, shape
from engine.checkpoint.state import TrainingState, load_optimizer, newest_checkpoint, read_state
from engine.checkpoint.writing import Checkpointer
from engine.distributed.ranks import Ranks
from engine.environment import choose_device
from engine.optim.adamw import AdamW
from engine.settings.sections import OptimizerSettings
from model.folder import sync_all
from model.mistral import Mistral
from model.vocabulary.tokenizer import Tokenizer, mistral_tokenizer_path
from model.weights import load_model

COLUMNS = (
    "provider",
    "operation",
    "gib",
    "files",
    "seconds",
    "gb_per_second",
    "blocked_seconds",
    "peak_host_gib",
    "above_gib",
    "wrong",
    "missing",
)
State = tuple[Mistral, AdamW]


@dataclass(frozen=True, kw_only=True)
class CheckpointSettings:
    """What to save, and where."""

    preset: str = ""
    """Model; default: mistral-7b on CUDA, small on a CPU."""
    layers: int = 0
    """Its layers; default: 4 of mistral-7b on CUDA, else all."""
    providers: tuple[str, ...] = ()
    """Names as in the table; default all."""
    folder: str = ""
    """Folder on the measured disk; default: the system's temporary one."""
    rounds: int = 3
    """Times that each provider saves and loads."""
    limit: float = 600.0
    """Seconds after which a provider is cut off."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """auto: bfloat16 on CUDA, float32 on a CPU."""
    out: str = ""
    """Result file; default: print only."""

    def __post_init__(self) -> None:
        check_least(self, layers=0, rounds=1)
        check_names("providers", self.providers, list(PROVIDERS))


class Subject:
    """The state that is saved: its shape, dtype and device."""

    def __init__(self, settings: CheckpointSettings) -> None:
        self.device = choose_device(settings.device)
        cuda = self.device.type == "cuda"
        self.dtype = dtype_of(settings.dtype, self.device)
        self.preset = settings.preset or ("mistral-7b" if cuda else "small")
        self.config = shape(self.preset, settings.layers or (4 if cuda and not settings.preset else 0))

    @property
    def bytes(self) -> int:
        """A parameter, two float32 moments, and an int16 remainder for bfloat16."""
        return self.config.parameters * (self.dtype.itemsize + 8 + (2 if self.dtype == torch.bfloat16 else 0))

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
            if tensor.is_floating_point():
                tensor.normal_(generator=generator)
            else:
                tensor.random_(generator=generator)
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


@dataclass(frozen=True)
class Pending:
    """A save that goes on in the background."""

    result: Callable[[], None]


def _save_ours(folder: Path, model: Mistral, optimizer: AdamW) -> Callable[[], Any]:
    tokenizer = Tokenizer.load(mistral_tokenizer_path())
    checkpointer = Checkpointer(folder, model, optimizer, tokenizer, Ranks(model.lm_head.weight.device), keep=1)

    def save() -> Pending:
        checkpointer.save(TrainingState(1, {}, ""))
        return Pending(checkpointer.close)

    return save


def _load_ours(folder: Path, subject: Subject) -> State:
    checkpoint = newest_checkpoint(folder)
    assert checkpoint is not None
    read_state(checkpoint)
    model = load_model(checkpoint, dtype=subject.dtype, device=subject.device)
    optimizer = AdamW(model.named_parameters(), OptimizerSettings())
    load_optimizer(checkpoint, optimizer, Ranks(subject.device))
    return model, optimizer


def _distributed() -> Any:
    # Imported late: it is large enough to show in the others' memory.
    return importlib.import_module("torch.distributed.checkpoint")


def _save_distributed(folder: Path, model: Mistral, optimizer: AdamW) -> Callable[[], Any]:
    return partial(_distributed().save, tensors_of(model, optimizer), checkpoint_id=folder, no_dist=True)


def _save_distributed_async(folder: Path, model: Mistral, optimizer: AdamW) -> Callable[[], Any]:
    return partial(_distributed().async_save, tensors_of(model, optimizer), checkpoint_id=folder, no_dist=True)


def _load_distributed(folder: Path, subject: Subject) -> State:
    state = subject.empty()
    _distributed().load(tensors_of(*state), checkpoint_id=folder, no_dist=True)
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
    "torch.distributed.checkpoint": Provider(_save_distributed, _load_distributed),
    "torch.distributed.checkpoint, async": Provider(_save_distributed_async, _load_distributed),
    "safetensors save_file": Provider(_save_safetensors, _load_safetensors),
}


def run(settings: CheckpointSettings, command: str = "benchmarks.checkpoint.run") -> dict[str, Any]:
    """Measure, print a table; returns the result, whose file is written after each provider."""
    subject = Subject(settings)
    resolved = {
        "preset": subject.preset,
        "layers": subject.config.num_hidden_layers,
        "gib": subject.bytes / 2**30,
        "dtype": name_of(subject.dtype),
    }
    result = Result("checkpoint", command, subject.device, settings, settings=resolved)
    with tempfile.TemporaryDirectory(prefix="komainu-", dir=settings.folder or None) as name:
        free = shutil.disk_usage(name).free
        if free < 1.1 * subject.bytes:
            raise ValueError(
                f"{Path(name).parent}: {free / 2**30:.1f} GiB free, the state takes {subject.bytes / 2**30:.1f}: choose "
                "another folder, or fewer layers"
            )
        for provider in settings.providers or PROVIDERS:
            folder = Path(name) / "state"
            folder.mkdir()
            result.add(*provider_rows(settings, provider, folder))
            shutil.rmtree(folder)
    print(table(result.rows, COLUMNS), flush=True)
    return result.finish()


def provider_rows(settings: CheckpointSettings, provider: str, folder: Path) -> Iterator[dict[str, Any]]:
    """Save in one process and load in another."""
    arguments = {"settings": asdict(settings), "provider": provider, "folder": str(folder)}
    saved: dict[str, Any] = {}
    for operation in ("save", "load"):
        row: dict[str, Any] = {"provider": provider, "operation": operation}
        if operation == "load" and "missing" in saved:
            yield row | {"missing": "nothing was saved"}
            return
        try:
            found = processes.call_apart("benchmarks.checkpoint", operation, arguments, limit=settings.limit)
        except processes.ApartError as error:
            found = {"missing": str(error)}
        state = found.pop("digest", None)
        if operation == "load" and "missing" not in found and state != saved["digest"]:
            found["wrong"] = "the loaded state is not the saved one"
        yield row | found
        saved = saved or found | {"digest": state}


def save(settings: dict[str, Any], provider: str, folder: str) -> dict[str, Any]:
    """Save a state `rounds` times, each time anew; the last checkpoint stays in `folder`."""
    chosen = CheckpointSettings(**settings)
    subject, target = Subject(chosen), Path(folder) / "checkpoint"
    state = subject.filled()
    blocked, seconds, memory = [], [], []
    for _ in range(chosen.rounds):
        shutil.rmtree(target, ignore_errors=True)
        target.mkdir()
        work = PROVIDERS[provider].save(target, *state)
        measure.synchronize(subject.device)
        before = _resident_now()
        start = time.perf_counter()
        pending = work()
        blocked.append(time.perf_counter() - start)
        if hasattr(pending, "result"):
            pending.result()
        sync_all(target)
        seconds.append(time.perf_counter() - start)
        memory.append((before, measure.peak_resident_gib()))
    blocked_seconds = {"blocked_seconds": measure.spread(blocked)}
    return _described(target, seconds, memory) | blocked_seconds | {"digest": digest(tensors_of(*state))}


def load(settings: dict[str, Any], provider: str, folder: str) -> dict[str, Any]:
    """Load the saved checkpoint `rounds` times."""
    chosen = CheckpointSettings(**settings)
    subject, target = Subject(chosen), Path(folder) / "checkpoint"
    seconds, memory = [], []
    state: State | None = None
    for _ in range(chosen.rounds):
        state = None
        forget_files(target)
        before = _resident_now()
        start = time.perf_counter()
        state = PROVIDERS[provider].load(target, subject)
        measure.synchronize(subject.device)
        seconds.append(time.perf_counter() - start)
        memory.append((before, measure.peak_resident_gib()))
    assert state is not None
    return _described(target, seconds, memory) | {"digest": digest(tensors_of(*state))}


def _resident_now() -> float:
    measure.reset_peak_resident()
    return measure.peak_resident_gib()


def _described(folder: Path, seconds: Sequence[float], memory: Sequence[tuple[float, float]]) -> dict[str, Any]:
    sizes = [path.stat().st_size for path in folder.rglob("*") if path.is_file()]
    spread = measure.spread(seconds)
    return {
        "gib": sum(sizes) / 2**30,
        "files": len(sizes),
        "seconds": spread,
        "gb_per_second": sum(sizes) / 1e9 / spread["median"],
        "peak_host_gib": max(peak for _, peak in memory),
        "above_gib": max(peak - before for before, peak in memory),
    }


def forget_files(folder: Path) -> None:
    """Ask the system to drop a folder's files, which are on the disk, from its page cache."""
    for path in folder.rglob("*"):
        if path.is_file():
            handle = os.open(path, os.O_RDONLY)
            try:
                os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
            finally:
                os.close(handle)


def main(argv: Sequence[str] | None = None) -> None:
    benchmark(CheckpointSettings, run, "checkpoint", argv)


if __name__ == "__main__":
    main()
