"""Checkpoints: a Hugging Face folder that loads as it is, and the training state beside it in `training/`.

    step-00000100/config.json, model-*.safetensors, tokenizer files ...
    step-00000100/training/state.json           step, updates, settings, plan; name and size of every file
    step-00000100/training/optimizer-*.safetensors  moments and master remainders by parameter name

A checkpoint appears under its name only when complete and on the disk. Order of data and noise are functions of the step, so
the step number is all that remains to be saved.
"""

import json
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from engine.optimizer import AdamW
from model.config import read_json
from model.folder import complete_folder, write_file
from model.mistral import Mistral
from model.vocabulary.tokenizer import Tokenizer, write_tokenizer_folder
from model.weights import MAX_SHARD_BYTES, resolve_folder, save_model, save_tensors

STATE = Path("training") / "state.json"


@dataclass(frozen=True)
class TrainingState:
    """step: steps done. settings: the run's resolved settings. plan: fingerprint of the data order."""

    step: int
    settings: dict[str, Any]
    plan: str


def save_checkpoint(
    out: Path, state: TrainingState, model: Mistral, optimizer: AdamW, tokenizer: Tokenizer, *, keep: int
) -> Path:
    """Write `out`/step-N, point `out`/latest at it, and remove all but the newest `keep`. Returns its path."""
    folder = out / f"step-{state.step:08d}"
    for debris in out.glob(".step-*"):
        # What a killed run was writing or removing; nothing else would free its disk space.
        shutil.rmtree(debris)
    with complete_folder(folder, overwrite=True) as partial:
        save_model(model, partial)
        write_tokenizer_folder(partial, tokenizer.model_bytes)
        (partial / STATE.parent).mkdir()
        _save_tensors(partial / STATE.parent, optimizer.state)
        files = {str(file.relative_to(partial)): file.stat().st_size for file in sorted(partial.rglob("*")) if file.is_file()}
        table = {
            "step": state.step, "updates": optimizer.updates, "settings": state.settings, "plan": state.plan, "files": files,
        }  # fmt: skip
        (partial / STATE).write_text(json.dumps(table, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    point_latest_at(folder)
    for old in checkpoints(out)[:-keep]:
        # Renamed first: a kill in the middle must not leave half a checkpoint under a complete one's name.
        doomed = old.rename(old.with_name(f".{old.name}.old"))
        shutil.rmtree(doomed)
    return folder


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
    remedy = _remedy(folder)
    try:
        table = read_json(folder / STATE)
    except (FileNotFoundError, ValueError) as error:
        raise type(error)(f"{error}; {remedy}") from None
    try:
        state = TrainingState(table["step"], table["settings"], table["plan"])
        files = table["files"]
    except KeyError as error:
        raise ValueError(f"{folder / STATE}: key {error} is missing; {remedy}") from None
    for name, size in files.items():
        path = folder / name
        if not path.is_file():
            raise FileNotFoundError(f"{path}: missing from the checkpoint; {remedy}")
        if path.stat().st_size != size:
            raise ValueError(f"{path}: {path.stat().st_size} bytes, {size} were written; {remedy}")
    return state


def _remedy(folder: Path) -> str:
    return f"delete {folder} to resume from the checkpoint before it"


def load_optimizer(folder: Path, optimizer: AdamW) -> None:
    """Give a checkpoint's moments and remainders to an optimizer over the same model."""
    tensors: dict[str, Tensor] = {}
    for file in sorted((folder / STATE.parent).glob("optimizer-*.safetensors")):
        try:
            with safe_open(file, framework="pt") as opened:
                tensors.update({name: opened.get_tensor(name) for name in opened.keys()})  # noqa: SIM118
        except SafetensorError as error:
            raise ValueError(f"{file}: not a whole safetensors file ({error}); {_remedy(folder)}") from None
    optimizer.load(tensors, read_json(folder / STATE)["updates"])


def _save_tensors(folder: Path, tensors: dict[str, Tensor]) -> None:
    """Write tensors of mixed dtypes to numbered files near the shard size, one of them in memory at a time."""
    shard: dict[str, Tensor] = {}
    number = 1
    for name, tensor in tensors.items():
        if shard and sum(t.nbytes for t in shard.values()) + tensor.nbytes > MAX_SHARD_BYTES:
            save_tensors(shard, folder / f"optimizer-{number:05d}.safetensors")
            shard, number = {}, number + 1
        shard[name] = tensor.detach().cpu().contiguous()
    save_tensors(shard, folder / f"optimizer-{number:05d}.safetensors")
