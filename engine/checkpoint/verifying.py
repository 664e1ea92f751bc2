"""Checks that a checkpoint is complete and holds only the kinds of files that a checkpoint has."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from safetensors import SafetensorError, safe_open
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from engine.checkpoint.state import OPTIMIZER, STATE, Fingerprint, changed, fingerprints, read_state
from engine.optim.adamw import AdamW
from engine.settings.sections import OptimizerSettings
from model.config import read_config
from model.mistral import Mistral
from model.vocabulary.tokenizer import Tokenizer
from model.weights import TensorFolder

# Allowed keys in the header of a safetensors file: the Hub's own, and torch's notes about shards.
_HEADER = {"format", "DCP_VERSION", "DCP_SHARDING_INFO"}
# First bytes of a pickle (protocol 2 and later) and of a zip archive, which torch.save writes.
_PICKLES = (b"\x80", b"PK\x03\x04")


def problems(folder: Path) -> Iterator[str]:
    """Everything wrong with a checkpoint: one line a problem, naming the file or tensor. A good checkpoint has none.

    Reads every byte: sizes and SHA-256 of the files, their kinds, the index, names and shapes of all tensors.
    """
    try:
        written = fingerprints(folder)
    except (ValueError, OSError) as error:
        yield str(error)
        return
    found = [*_damaged(folder, written), *_strange(folder, written)]
    yield from found
    if not found:
        for check in (_check_state, _check_weights, _check_optimizer):
            try:
                check(folder)
            except (ValueError, OSError) as error:
                yield str(error)


def _damaged(folder: Path, written: dict[str, Fingerprint]) -> Iterator[str]:
    for name, fingerprint in written.items():
        problem = changed(folder / name, fingerprint)
        if problem:
            yield problem


def _strange(folder: Path, written: dict[str, Fingerprint]) -> Iterator[str]:
    for path in sorted(folder.rglob("*")):
        if path.is_symlink() or not (path.is_file() or path.is_dir()):
            yield f"{path}: is neither a file nor a folder"
        elif path.is_file():
            if str(path.relative_to(folder)) not in written and path != folder / STATE:
                yield f"{path}: is not one of the files that were written"
            problem = _foreign(path)
            if problem:
                yield f"{path}: {problem}"


def _foreign(path: Path) -> str | None:
    """The reason why a file does not belong in a checkpoint, judged by its content; None if it belongs."""
    with open(path, "rb") as file:
        if file.read(4).startswith(_PICKLES):
            return "begins like a pickle or an archive, which no checkpoint holds"
    read = _KINDS.get(path.suffix)
    if read is None:
        return f"is not one of {', '.join(sorted(_KINDS))}"
    try:
        read(path)
    except (ValueError, SafetensorError) as error:
        return f"is not a valid {path.suffix} file: {error}"
    return None


def _read_tensor_file(path: Path) -> None:
    with safe_open(path, framework="pt") as file:
        surplus = set(file.metadata() or {}) - _HEADER
    if surplus:
        raise ValueError(f"its header holds {', '.join(sorted(surplus))}")


def _read_text(path: Path) -> None:
    path.read_text(encoding="utf-8")


_KINDS: dict[str, Callable[[Path], object]] = {
    ".safetensors": _read_tensor_file,
    ".json": lambda path: json.loads(path.read_text(encoding="utf-8")),
    ".jinja": _read_text,
    ".model": lambda path: Tokenizer.load(path),
}


def _check_state(folder: Path) -> None:
    step = read_state(folder).step
    if folder.name.startswith("step-") and folder.name != f"step-{step:08d}":
        raise ValueError(f"{folder / STATE}: belongs to step {step}")


def _check_weights(folder: Path) -> None:
    with TensorFolder(folder) as tensors:
        tensors.check(read_config(folder))
        dtypes = {tensors.dtype(name) for name in tensors.names}
    if len(dtypes) > 1:
        raise ValueError(f"{folder}: the weights have several dtypes: {', '.join(sorted(map(str, dtypes)))}")


def _check_optimizer(folder: Path) -> None:
    """Raises: ValueError naming a tensor that is missing, unknown, of another shape, or has rows not in exactly one shard."""
    with TensorFolder(folder) as tensors, torch.device("meta"):
        model = Mistral(read_config(folder)).to(tensors.dtype("model.norm.weight"))
    shapes = {name: tensor.shape for name, tensor in AdamW(model.named_parameters(), OptimizerSettings()).state.items()}
    saved = dcp.HuggingFaceStorageReader(str(folder / OPTIMIZER)).read_metadata().state_dict_metadata
    for name in sorted(saved.keys() ^ shapes.keys()):
        raise ValueError(f"{folder / OPTIMIZER}: {name} {'is missing' if name in shapes else 'belongs to no parameter'}")
    for name, stored in saved.items():
        assert isinstance(stored, TensorStorageMetadata)
        row = 0
        for chunk in sorted(stored.chunks, key=lambda chunk: chunk.offsets[0]):
            if chunk.offsets[0] != row:
                row = min(row, chunk.offsets[0])
                raise ValueError(f"{folder / OPTIMIZER}: {name}: row {row} is in no shard, or in more than one")
            row += chunk.sizes[0]
        if stored.size != shapes[name]:
            raise ValueError(f"{folder / OPTIMIZER}: {name} has shape {list(stored.size)}, not {list(shapes[name])}")
