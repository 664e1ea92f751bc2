"""What a checkpoint costs: seconds, gigabytes a second, how long the loop stands still, host memory.

    python -m benchmarks.checkpoint                 a small model on a CPU, four layers of Mistral 7B on CUDA
    python -m benchmarks.checkpoint --preset mistral-7b --layers 2 --dtype bfloat16 --folder /data --out results.json

The state of a training run (parameters, moments, and for bfloat16 the masters' remainders) is saved and loaded by each provider
in processes of its own, so that their memory is theirs alone. A load ends with a model and an optimizer ready to go on, which
are compared with what was saved. "seconds" of a save end when everything is on the disk (fsync included), "blocked_seconds"
when training could go on. Before a load the files are dropped from the page cache, as far as the system does that. "above_gib"
is the largest resident set during the operation beyond the one before it; of a load it holds the state itself where that lies
in host memory.
"""

import contextlib
import hashlib
import importlib
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from benchmarks import measure
from benchmarks.command import benchmark
from benchmarks.data import synthetic_texts, trained_tokenizer
from benchmarks.kernels import SMALL
from engine.checkpoint.state import TrainingState, load_optimizer, newest_checkpoint, read_state
from engine.checkpoint.writing import Checkpointer
from engine.distributed.ranks import Ranks
from engine.environment import choose_device
from engine.optim.adamw import AdamW
from engine.settings.sections import OptimizerSettings
from engine.settings.toml import to_table
from model.config import MistralConfig, preset
from model.folder import sync_all
from model.mistral import Mistral
from model.weights import load_model

COLUMNS = (
    "provider", "operation", "gib", "files", "seconds", "gb_per_second", "blocked_seconds", "peak_host_gib", "above_gib",
    "wrong", "missing",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class CheckpointSettings:
    """What to save, and where."""

    preset: str = ""
    """Model; default mistral-7b on CUDA, a small one on a CPU."""
    layers: int = 0
    """Its layers; default 4 for mistral-7b on CUDA, else all."""
    gib: float = 0.0
    """Size of the state instead: as many layers as come closest, at least one."""
    providers: tuple[str, ...] = ()
    """Names as in the table; default all."""
    folder: str = ""
    """Folder on the disk to measure; default: the system's temporary one."""
    rounds: int = 3
    """Times that each provider saves and loads."""
    limit: float = 600.0
    """Seconds after which a provider is cut off."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: CUDA if there is a GPU."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """auto: bfloat16 on CUDA, float32 on a CPU."""
    out: str = ""
    """File of the result; default: print only."""

    def __post_init__(self) -> None:
        for name, least in (("layers", 0), ("gib", 0), ("rounds", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} = {getattr(self, name)}: must be at least {least}")
        if self.layers and self.gib:
            raise ValueError(f"layers = {self.layers} and gib = {self.gib} exclude each other: leave one out")
        for name in self.providers:
            if name not in PROVIDERS:
                raise ValueError(f"providers: unknown {name!r}; there are {', '.join(PROVIDERS)}")


@dataclass(frozen=True)
class Shape:
    """The state that is saved."""

    config: MistralConfig
    dtype: torch.dtype
    device: torch.device

    @classmethod
    def of(cls, settings: CheckpointSettings) -> "Shape":
        device = choose_device(settings.device)
        cuda = device.type == "cuda"
        dtype = getattr(torch, settings.dtype) if settings.dtype != "auto" else (torch.bfloat16 if cuda else torch.float32)
        name = settings.preset or ("mistral-7b" if cuda else "small")
        config = SMALL if name == "small" else preset(name)
        layers = settings.layers or (4 if cuda and not settings.preset else config.num_hidden_layers)
        if settings.gib:
            least = replace(config, num_hidden_layers=1).parameters
            layer = replace(config, num_hidden_layers=2).parameters - least
            layers = max(1, 1 + round((settings.gib * 2**30 / bytes_of(dtype) - least) / layer))
        return cls(replace(config, num_hidden_layers=layers), dtype, device)

    def empty(self) -> tuple[Mistral, AdamW]:
        """A model and its optimizer before anything is loaded."""
        with torch.device("meta"):
            model = Mistral(self.config)
        model = model.to(self.dtype).to_empty(device=self.device)
        return model, AdamW(model.named_parameters(), OptimizerSettings())

    def filled(self) -> tuple[Mistral, AdamW]:
        """Random values, as no file system can store zeros for less than that."""
        model, optimizer = self.empty()
        generator = torch.Generator(self.device).manual_seed(0)
        for tensor in tensors_of(model, optimizer).values():
            if tensor.is_floating_point():
                tensor.normal_(generator=generator)
            else:
                tensor.random_(generator=generator)
        return model, optimizer


def bytes_of(dtype: torch.dtype) -> int:
    """Bytes of the state a parameter: itself, two float32 moments, an int16 remainder for bfloat16."""
    return dtype.itemsize + 8 + (2 if dtype == torch.bfloat16 else 0)


def tensors_of(model: Mistral, optimizer: AdamW) -> dict[str, Tensor]:
    """Everything of a run's state that is a tensor, by name."""
    return {name: parameter.detach() for name, parameter in model.named_parameters()} | optimizer.state


def digest(tensors: dict[str, Tensor]) -> str:
    """Tells states apart: of each tensor's bits, the sum and that of every seventh word."""
    words = {2: torch.int16, 4: torch.int32}
    sums = []
    for name, tensor in sorted(tensors.items()):
        bits = tensor.view(words[tensor.itemsize]).flatten()
        sums.append((name, int(bits.sum(dtype=torch.int64)), int(bits[::7].sum(dtype=torch.int64))))
    return hashlib.sha256(repr(sums).encode()).hexdigest()


@dataclass(frozen=True)
class Provider:
    """Who saves and loads.

    save: prepares, and returns what is timed; that may return something whose result() is to be waited for. load: everything
    from a folder to a model and an optimizer.
    """

    save: Callable[[Path, Mistral, AdamW], Any]
    load: Callable[[Path, Shape], tuple[Mistral, AdamW]]


@dataclass(frozen=True)
class Pending:
    """A save that goes on in the background."""

    result: Callable[[], None]


def _save_ours(folder: Path, model: Mistral, optimizer: AdamW) -> Any:
    tokenizer = trained_tokenizer(synthetic_texts(50, 1))
    checkpointer = Checkpointer(folder, model, optimizer, tokenizer, Ranks(model.lm_head.weight.device), keep=1)

    def save() -> "Pending":
        checkpointer.save(TrainingState(1, {}, ""))
        return Pending(checkpointer.close)

    return save


def _load_ours(folder: Path, shape: Shape) -> tuple[Mistral, AdamW]:
    checkpoint = newest_checkpoint(folder)
    assert checkpoint is not None
    read_state(checkpoint)
    model = load_model(checkpoint, dtype=shape.dtype, device=shape.device)
    optimizer = AdamW(model.named_parameters(), OptimizerSettings())
    load_optimizer(checkpoint, optimizer, Ranks(shape.device))
    return model, optimizer


def _distributed() -> Any:
    # Large enough to show in the memory of the others.
    return importlib.import_module("torch.distributed.checkpoint")


def _save_distributed(folder: Path, model: Mistral, optimizer: AdamW) -> Any:
    return partial(_distributed().save, tensors_of(model, optimizer), checkpoint_id=folder, no_dist=True)


def _save_distributed_async(folder: Path, model: Mistral, optimizer: AdamW) -> Any:
    return partial(_distributed().async_save, tensors_of(model, optimizer), checkpoint_id=folder, no_dist=True)


def _load_distributed(folder: Path, shape: Shape) -> tuple[Mistral, AdamW]:
    model, optimizer = shape.empty()
    _distributed().load(tensors_of(model, optimizer), checkpoint_id=folder, no_dist=True)
    return model, optimizer


def _save_safetensors(folder: Path, model: Mistral, optimizer: AdamW) -> Any:
    return partial(save_file, tensors_of(model, optimizer), folder / "state.safetensors")


def _load_safetensors(folder: Path, shape: Shape) -> tuple[Mistral, AdamW]:
    model, optimizer = shape.empty()
    saved = load_file(folder / "state.safetensors", device=str(shape.device))
    for name, tensor in tensors_of(model, optimizer).items():
        tensor.copy_(saved[name])
    return model, optimizer


def _save_raw(folder: Path, model: Mistral, optimizer: AdamW) -> Any:
    def save() -> None:
        with open(folder / "state.bin", "wb", buffering=0) as file:
            for tensor in tensors_of(model, optimizer).values():
                _all(file.write, memoryview(_bytes(tensor.cpu())))

    return save


def _load_raw(folder: Path, shape: Shape) -> tuple[Mistral, AdamW]:
    model, optimizer = shape.empty()
    with open(folder / "state.bin", "rb", buffering=0) as file:
        for tensor in tensors_of(model, optimizer).values():
            host = tensor if tensor.device.type == "cpu" else torch.empty_like(tensor, device="cpu")
            _all(file.readinto, memoryview(_bytes(host)))
            if host is not tensor:
                tensor.copy_(host)
    return model, optimizer


def _bytes(tensor: Tensor) -> Any:
    return tensor.view(torch.uint8).flatten().numpy()


def _all(move: Callable[[memoryview], int | None], view: memoryview) -> None:
    """The system moves at most 2 GiB a call."""
    while len(view):
        view = view[move(view) or 0 :]


PROVIDERS: dict[str, Provider] = {
    "komainu": Provider(_save_ours, _load_ours),
    "torch.distributed.checkpoint": Provider(_save_distributed, _load_distributed),
    "torch.distributed.checkpoint, async": Provider(_save_distributed_async, _load_distributed),
    "safetensors save_file": Provider(_save_safetensors, _load_safetensors),
    "bytes in one file": Provider(_save_raw, _load_raw),
}


def run(settings: CheckpointSettings, command: str = "benchmarks.checkpoint") -> dict[str, Any]:
    """Measure, print a table, write the result after each provider; returns it."""
    shape = Shape.of(settings)
    resolved = to_table(settings) | {
        "preset": settings.preset or ("small" if shape.device.type == "cpu" else "mistral-7b"),
        "layers": shape.config.num_hidden_layers, "gib": _state_bytes(shape) / 2**30,
        "dtype": str(shape.dtype).removeprefix("torch."),
    }  # fmt: skip
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="komainu-", dir=settings.folder or None) as name:
        free = shutil.disk_usage(name).free
        if free < 1.1 * _state_bytes(shape):
            raise ValueError(
                f"{Path(name).parent}: {free / 2**30:.1f} GiB free, the state takes {_state_bytes(shape) / 2**30:.1f}: choose "
                "another folder, or fewer layers"
            )
        for provider in settings.providers or PROVIDERS:
            folder = Path(name) / "state"
            folder.mkdir()
            rows += provider_rows(settings, provider, folder)
            shutil.rmtree(folder)
            if settings.out:
                content = measure.result("checkpoint", command, shape.device, resolved, rows, complete=False)
                measure.write_result(settings.out, content)
    print(measure.table(rows, [column for column in COLUMNS if any(column in row for row in rows)]), flush=True)
    result = measure.result("checkpoint", command, shape.device, resolved, rows)
    if settings.out:
        measure.write_result(settings.out, result)
    return result


def _state_bytes(shape: Shape) -> int:
    return shape.config.parameters * bytes_of(shape.dtype)


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
            found = measure.call_apart("benchmarks.checkpoint", operation, arguments, limit=settings.limit)
        except measure.PartError as error:
            found = {"missing": str(error)}
        state = found.pop("digest", None)
        if operation == "load" and "missing" not in found and state != saved["digest"]:
            found["wrong"] = "what was loaded is not what was saved"
        yield row | found
        saved = saved or found | {"digest": state}


def save(settings: dict[str, Any], provider: str, folder: str) -> dict[str, Any]:
    """Save a state `rounds` times, each time anew; the last one stays in `folder`."""
    chosen = CheckpointSettings(**settings)
    shape = Shape.of(chosen)
    model, optimizer = shape.filled()
    blocked, seconds, memory = [], [], Memory()
    for turn in range(chosen.rounds):
        target = Path(folder) / "checkpoint"
        if turn:
            shutil.rmtree(target)
        target.mkdir()
        work = PROVIDERS[provider].save(target, model, optimizer)
        measure.synchronize(shape.device)
        with memory.watched():
            start = time.perf_counter()
            pending = work()
            blocked.append(time.perf_counter() - start)
            if hasattr(pending, "result"):
                pending.result()
            sync_all(target)
            seconds.append(time.perf_counter() - start)
    return _described(target, seconds, memory) | {
        "blocked_seconds": measure.spread(blocked), "digest": digest(tensors_of(model, optimizer)),
    }  # fmt: skip


def load(settings: dict[str, Any], provider: str, folder: str) -> dict[str, Any]:
    """Load what `save` left `rounds` times."""
    chosen = CheckpointSettings(**settings)
    shape = Shape.of(chosen)
    target = Path(folder) / "checkpoint"
    seconds, memory = [], Memory()
    state: tuple[Mistral, AdamW] | None = None
    for _ in range(chosen.rounds):
        state = None
        forget_files(target)
        with memory.watched():
            start = time.perf_counter()
            state = PROVIDERS[provider].load(target, shape)
            measure.synchronize(shape.device)
            seconds.append(time.perf_counter() - start)
    assert state is not None
    return _described(target, seconds, memory) | {"digest": digest(tensors_of(*state))}


class Memory:
    """The largest resident set while watched, and by how much it grew."""

    def __init__(self) -> None:
        self.peak = self.above = 0.0

    @contextlib.contextmanager
    def watched(self) -> Iterator[None]:
        cpu = torch.device("cpu")
        measure.reset_peak_resident()
        before = measure.peak_memory(cpu)["resident_gib"]
        yield
        peak = measure.peak_memory(cpu)["resident_gib"]
        self.peak, self.above = max(self.peak, peak), max(self.above, peak - before)


def _described(folder: Path, seconds: Sequence[float], memory: Memory) -> dict[str, Any]:
    sizes = [path.stat().st_size for path in folder.rglob("*") if path.is_file()]
    spread = measure.spread(seconds)
    return {
        "gib": sum(sizes) / 2**30, "files": len(sizes), "seconds": spread,
        "gb_per_second": sum(sizes) / 1e9 / spread["median"], "peak_host_gib": memory.peak, "above_gib": memory.above,
    }  # fmt: skip


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
    benchmark(CheckpointSettings, run, argv, "checkpoint")


if __name__ == "__main__":
    main()
