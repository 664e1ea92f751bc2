"""Checkpoints: a Hugging Face folder that loads as it is, and the training state beside it in `training/`.

    step-00000100/config.json, model-*.safetensors, tokenizer files ...
    step-00000100/training/state.json               step, updates, settings, plan; size and SHA-256 of every file
    step-00000100/training/optimizer/*.safetensors  moments and master remainders by parameter name, in the ranks' shards

A checkpoint appears under its name only when complete and on the disk; `engine.checkpoint.writing` writes it. It is read by any
number of ranks, each its own rows. Order of data and noise are functions of the step, so the step number is all that remains to
be saved.
"""

import hashlib
import re
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from engine.distributed.ranks import Ranks, gather, host_group
from engine.distributed.sharding import local
from engine.optim.adamw import AdamW
from model.config import read_json
from model.folder import write_file
from model.weights import resolve_folder

STATE = Path("training") / "state.json"
OPTIMIZER = Path("training") / "optimizer"
_KEYS = {"step": int, "updates": int, "settings": dict, "plan": str, "files": dict}

# One process without a process group is what most runs are.
warnings.filterwarnings("ignore", "torch.distributed is disabled, unavailable or uninitialized", UserWarning)


@dataclass(frozen=True)
class TrainingState:
    """step: steps done. settings: the run's resolved settings. plan: fingerprint of the data order."""

    step: int
    settings: dict[str, Any]
    plan: str


@dataclass(frozen=True)
class Fingerprint:
    """What a file of a checkpoint is known by. sha256: in hexadecimal."""

    size: int
    sha256: str

    @classmethod
    def of(cls, path: Path) -> "Fingerprint":
        with open(path, "rb") as file:
            return cls(path.stat().st_size, hashlib.file_digest(file, "sha256").hexdigest())


def point_latest_at(checkpoint: Path) -> None:
    """Write the checkpoint's name to `latest` beside it."""
    write_file(checkpoint.parent / "latest", checkpoint.name + "\n")


def checkpoints(out: str | Path) -> list[Path]:
    """Complete checkpoints of a run folder, oldest first."""
    return sorted(path for path in Path(out).glob("step-*") if re.fullmatch(r"step-\d{8}", path.name))


def newest_checkpoint(out: str | Path) -> Path | None:
    """The newest complete checkpoint of a run folder, None where there is none."""
    complete = checkpoints(out)
    return complete[-1] if complete else None


def model_folder(name: str) -> Path:
    """The Hugging Face folder that a model's name means: a run folder's newest checkpoint, else what `resolve_folder` says."""
    return newest_checkpoint(name) or resolve_folder(name)


def read_state(folder: Path) -> TrainingState:
    """The state of a checkpoint, after checking that every file is there in its full size.

    Raises: FileNotFoundError or ValueError naming the file; the remedy is to delete the folder, the one before it then counts.
    """
    table, files = _read_table(folder), fingerprints(folder)
    for name, fingerprint in files.items():
        path = folder / name
        if not path.is_file():
            raise FileNotFoundError(f"{path}: missing from the checkpoint; {_remedy(folder)}")
        if path.stat().st_size != fingerprint.size:
            raise ValueError(f"{path}: {path.stat().st_size} bytes, {fingerprint.size} were written; {_remedy(folder)}")
    return TrainingState(table["step"], table["settings"], table["plan"])


def fingerprints(folder: Path) -> dict[str, Fingerprint]:
    """Every file of a checkpoint but its state, by its path in the folder, as written. Raises as `read_state` does."""
    try:
        return {name: Fingerprint(file["size"], file["sha256"]) for name, file in _read_table(folder)["files"].items()}
    except (KeyError, TypeError):
        raise ValueError(f"{folder / STATE}: files must give size and sha256 of each; {_remedy(folder)}") from None


def changed(path: Path, written: Fingerprint) -> str | None:
    """What tells a file from what was written, None for nothing; the whole of it is read."""
    if not path.is_file():
        return f"{path}: missing from the checkpoint"
    found = Fingerprint.of(path)
    if found.size != written.size:
        return f"{path}: {found.size} bytes, {written.size} were written"
    if found != written:
        return f"{path}: damaged, its bytes are not those that were written (SHA-256 {found.sha256}, was {written.sha256})"
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


def load_optimizer(folder: Path, optimizer: AdamW, ranks: Ranks) -> None:
    """Give a checkpoint's moments and remainders to an optimizer over the same model, each rank its own rows of them.

    Before that every file of the checkpoint is compared with what was written; the ranks share that work.
    Raises: ValueError on all ranks, naming the file that changed or the tensor that does not fit.
    """
    group = host_group(ranks)
    files = sorted(fingerprints(folder).items())
    problems = [changed(folder / name, written) for name, written in files[ranks.rank :: ranks.ranks]]
    found = next(filter(None, gather(problems, ranks, group)), None)
    if found:
        raise ValueError(f"{found}; {_remedy(folder)}")
    reader = dcp.HuggingFaceStorageReader(str(folder / OPTIMIZER))
    _check_fits(folder, reader, optimizer)
    mine = {name: tensor for name, tensor in optimizer.state.items() if local(tensor).numel()}
    dcp.load(mine, storage_reader=reader, process_group=group, no_dist=group is None)
    optimizer.updates = _read_table(folder)["updates"]


def _check_fits(folder: Path, reader: dcp.HuggingFaceStorageReader, optimizer: AdamW) -> None:
    saved = reader.read_metadata().state_dict_metadata
    for name, tensor in optimizer.state.items():
        stored, wanted = saved.get(name), f"{list(tensor.shape)} {tensor.dtype}"
        found = f"{list(stored.size)} {stored.properties.dtype}" if isinstance(stored, TensorStorageMetadata) else "missing"
        if found != wanted:
            raise ValueError(f"{folder / OPTIMIZER}: optimizer state {name}: {found}, the model needs {wanted}")
