"""What a run's settings name, opened and checked: folders to write, model, tokenizer, prepared datasets."""

import dataclasses
import os
from pathlib import Path

from engine.checkpoint.state import model_folder, newest_checkpoint
from engine.continuing import Past
from engine.data.dataset import TokenDataset
from engine.distributed.agreement import seen
from engine.distributed.ranks import Ranks
from engine.settings.training import TrainSettings
from kernels import padded_to_tiles
from model.config import PRESET, MistralConfig, preset
from model.vocabulary.chat import end_id
from model.vocabulary.fitting import fitted_config
from model.vocabulary.tokenizer import Tokenizer


def check_writable(folder: Path, setting: str) -> None:
    """Refuse a setting's folder that cannot be created or written, before hours of work depend on it."""
    existing = next(path for path in (folder, *folder.parents) if path.exists())
    if not existing.is_dir():
        raise NotADirectoryError(f"{folder}: cannot be written: {existing} is not a folder; choose another {setting}")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise PermissionError(f"{folder}: cannot be written: no permission for {existing}; choose another {setting}")


def folder_of(name: str, ranks: Ranks, *, weights: bool) -> Path:
    """The folder of a model's name. Rank 0 decides which checkpoint of a run folder is the newest."""
    newest = ranks.decided(lambda: str(newest_checkpoint(name) or ""))
    return seen(Path(newest), ranks) if newest else model_folder(name, weights=weights)


def named_folder(setting: str, settings: TrainSettings, ranks: Ranks, past: Past | None) -> Path | None:
    """The folder that `model` or `tokenizer` names; None where a run that goes on has lost it: the checkpoint is enough."""
    name = getattr(settings, setting)
    kept = past is not None and past.state.settings.get(setting) == name
    try:
        return folder_of(name, ranks, weights=setting == "model" and not (kept or settings.dry_run))
    except FileNotFoundError:
        if kept:
            return None
        raise


def tokenizer_of(settings: TrainSettings, ranks: Ranks, model: Path | None, past: Past | None) -> Tokenizer:
    if not settings.tokenizer and settings.from_ and past is not None:
        return Tokenizer.load(past.checkpoint)
    if not settings.tokenizer and settings.model.startswith(PRESET):
        raise ValueError(f"model = {settings.model}: a preset has no tokenizer; name its folder as tokenizer")
    folder = named_folder("tokenizer", settings, ranks, past) if settings.tokenizer else model
    if folder is None:
        assert past is not None
        folder = past.checkpoint
    return Tokenizer.load(folder)


def config_of(settings: TrainSettings, model: Path | None, tokenizer: Tokenizer) -> MistralConfig:
    if model is None:
        return dataclasses.replace(
            preset(settings.model.removeprefix(PRESET)),
            vocab_size=padded_to_tiles(tokenizer.vocab_size),
            unpadded_vocab_size=tokenizer.vocab_size,
            bos_token_id=tokenizer.bos_id,
            eos_token_id=end_id(tokenizer),
        )
    return fitted_config(model, tokenizer)


def open_dataset(path: str, kinds: tuple[str, ...], tokenizer: Tokenizer) -> TokenDataset:
    dataset = TokenDataset.open(path)
    if dataset.kind not in kinds:
        raise ValueError(f"{path}: holds {dataset.kind}, this recipe trains on {' or '.join(kinds)}")
    if dataset.tokenizer_fingerprint != tokenizer.fingerprint:
        raise ValueError(f"{path}: was prepared with another tokenizer than the model's; prepare it again with recipes.prepare")
    return dataset
