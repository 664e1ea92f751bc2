"""Checkpoints on disk: a Hugging Face folder that loads as it is, with the training state beside it in `training/`.

    step-00000100/config.json, model-*.safetensors, tokenizer files ...
    step-00000100/training/state.json               step, updates, settings, plan, model, contents, parent; size and SHA-256
                                                    of every file
    step-00000100/training/optimizer/*.safetensors  moments and master remainders by parameter name, sharded over ranks

A checkpoint appears under its name only when it is complete and on the disk; engine.checkpoint.writing writes it. Any number of
ranks can read it, each its own rows. Data order and noise are functions of the step, so nothing else needs saving.
"""

import hashlib
import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from engine.distributed.ranks import Ranks
from engine.distributed.sharding import local
from engine.optim.adamw import MOMENTS, AdamW
from model.config import read_json
from model.folder import write_file
from model.hub import resolve_folder

STATE = Path("training") / "state.json"
OPTIMIZER = Path("training") / "optimizer"
_KEYS = {"step": int, "updates": int, "settings": dict, "plan": str, "files": dict}

# Most runs have one process and no process group.
warnings.filterwarnings("ignore", "torch.distributed is disabled, unavailable or uninitialized", UserWarning)


@dataclass(frozen=True)
class Parent:
    """The checkpoint that a branch began from. It may be gone since."""

    checkpoint: str  # its path then
    step: int
    fingerprint: str  # `fingerprint_of`


@dataclass(frozen=True)
class TrainingState:
    """A run after a step."""

    step: int  # steps done
    settings: dict[str, Any]  # resolved
    plan: str  # fingerprint of the data order
    model: str | None = None  # weights_sample of the starting model; None for a preset, or as an older version wrote it
    contents: dict[str, str] | None = None  # setting -> fingerprint of the data or tokenizer that it names; None as `model`
    parent: Parent | None = None  # of a branch


@dataclass(frozen=True)
class Fingerprint:
    """Identifies the content of a file."""

    size: int  # bytes
    sha256: str  # hexadecimal

    @classmethod
    def of(cls, path: Path) -> "Fingerprint":
        with open(path, "rb") as file:
            return cls(path.stat().st_size, hashlib.file_digest(file, "sha256").hexdigest())


def point_latest_at(checkpoint: Path) -> None:
    """Write the checkpoint's name to `latest` beside it."""
    write_file(checkpoint.parent / "latest", checkpoint.name + "\n")


def checkpoints(out: str | Path) -> list[Path]:
    """The complete checkpoints of a run folder, oldest first."""
    return sorted(path for path in Path(out).glob("step-*") if re.fullmatch(r"step-\d{8}", path.name))


def newest_checkpoint(out: str | Path) -> Path | None:
    """The newest complete checkpoint of a run folder; None if there is none."""
    complete = checkpoints(out)
    return complete[-1] if complete else None


def model_folder(name: str, *, weights: bool = True) -> Path:
    """The Hugging Face folder of a model's name: the newest checkpoint of a run folder, else what `resolve_folder` returns."""
    return newest_checkpoint(Path(name).expanduser()) or resolve_folder(name, weights=weights)


def read_state(folder: Path) -> TrainingState:
    """The state of a checkpoint. Checks that every file is there in its full size.

    Raises: FileNotFoundError or ValueError naming the file and the remedy: to delete the folder, so that the checkpoint before
        it is the newest.
    """
    table, files = _read_table(folder), fingerprints(folder)
    for name, fingerprint in files.items():
        path = folder / name
        if not path.is_file():
            raise FileNotFoundError(f"{path}: missing from the checkpoint; {_remedy(folder)}")
        if path.stat().st_size != fingerprint.size:
            raise ValueError(f"{path}: {path.stat().st_size} bytes, {fingerprint.size} were written; {_remedy(folder)}")
    parent = Parent(**table["parent"]) if table.get("parent") else None
    return TrainingState(table["step"], table["settings"], table["plan"], table.get("model"), table.get("contents"), parent)


def fingerprint_of(checkpoint: Path) -> str:
    """SHA-256 (hex) of a checkpoint's state file, which holds the SHA-256 of all its other files.

    Raises: FileNotFoundError where the folder is no checkpoint.
    """
    return Fingerprint.of(checkpoint / STATE).sha256


def seconds_to_save(folder: Path) -> float | None:
    """Seconds that writing a checkpoint took; None for a checkpoint that does not say so."""
    seconds = _read_table(folder).get("seconds")
    return seconds if isinstance(seconds, float) else None


def fingerprints(folder: Path) -> dict[str, Fingerprint]:
    """The fingerprints of a checkpoint's files as they were written, by path in the folder, without the state file.

    Raises: as `read_state` does.
    """
    try:
        return {name: Fingerprint(file["size"], file["sha256"]) for name, file in _read_table(folder)["files"].items()}
    except (KeyError, TypeError):
        raise ValueError(f"{folder / STATE}: `files` lacks a size or sha256; {_remedy(folder)}") from None


def changed(path: Path, written: Fingerprint) -> str | None:
    """How a file differs from the file that was written, or None. Reads all of it."""
    if not path.is_file():
        return f"{path}: missing from the checkpoint"
    found = Fingerprint.of(path)
    if found.size != written.size:
        return f"{path}: {found.size} bytes, {written.size} were written"
    if found != written:
        return f"{path}: damaged: its content has changed since it was written (SHA-256 {found.sha256}, was {written.sha256})"
    return None


def _read_table(folder: Path) -> dict[str, Any]:
    path = folder / STATE
    try:
        table = read_json(path)
    except (FileNotFoundError, ValueError) as error:
        raise type(error)(f"{error}; {_remedy(folder)}") from None
    for key, kind in _KEYS.items():
        if not isinstance(table.get(key), kind):
            raise ValueError(f"{path}: key {key!r} is missing or of another type than {kind.__name__}; {_remedy(folder)}")
    return table


def _remedy(folder: Path) -> str:
    return f"delete {folder} to resume from the checkpoint before it"


def load_optimizer(folder: Path, optimizer: AdamW, ranks: Ranks, *, moments: bool = True) -> None:
    """Load a checkpoint's moments and master remainders into the optimizer of the same model, each rank its own rows.

    moments: False loads the remainders alone, as far as there are some: the moments stay 0, before their first update.
    First compares every file of the checkpoint with its fingerprint; the ranks share that work.
    Raises: ValueError on all ranks, naming the file that changed or the tensor that does not fit.
    """
    files = sorted(fingerprints(folder).items())
    problems = [changed(folder / name, written) for name, written in files[ranks.rank :: ranks.ranks]]
    found = next(filter(None, ranks.gather(problems)), None)
    if found:
        raise ValueError(f"{found}; {_remedy(folder)}")
    reader = dcp.HuggingFaceStorageReader(str(folder / OPTIMIZER))
    saved = reader.read_metadata().state_dict_metadata
    wanted = optimizer.state
    if not moments:
        wanted = {name: tensor for name, tensor in wanted.items() if name in saved and not name.endswith(MOMENTS)}
    _check_fits(folder, saved, wanted)
    if wanted:
        mine = {name: tensor for name, tensor in wanted.items() if local(tensor).numel()}
        dcp.load(mine, storage_reader=reader, no_dist=ranks.mesh is None)
    if moments:
        optimizer.updates = _read_table(folder)["updates"]


def _check_fits(folder: Path, saved: Mapping[str, Any], state: Mapping[str, Tensor]) -> None:
    for name, tensor in state.items():
        stored, wanted = saved.get(name), f"{list(tensor.shape)} {tensor.dtype}"
        found = f"{list(stored.size)} {stored.properties.dtype}" if isinstance(stored, TensorStorageMetadata) else "missing"
        if found != wanted:
            raise ValueError(f"{folder / OPTIMIZER}: optimizer state {name}: {found}, the model needs {wanted}")
