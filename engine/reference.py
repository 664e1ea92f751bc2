"""The frozen reference of preference tuning: its log-probabilities, computed once and kept on disk.

A file is named by all that its numbers depend on (weights, dtype, data, context), so a later run with the same reference and
data takes it over, and nothing stale is ever read.
"""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from tqdm import tqdm

from engine.data.batches import Batch
from engine.data.dataset import TokenDataset
from engine.objectives.preference import reference_log_probs
from engine.run import Run
from model.config import read_json
from model.folder import sync, write_file
from model.mistral import Mistral
from model.weights import save_tensors

# The reference's hash, so that a resumed run finds its tables without loading it.
MANIFEST = "reference.json"


def reference_tables(
    run: Run, sets: Mapping[str, tuple[TokenDataset, list[Batch]]], cache: Path
) -> tuple[dict[str, Tensor], Mistral]:
    """Log-probabilities of each set's pairs, and the policy to train.

    Args: sets: name -> (dataset, its pairs in micro-batches); cache: folder of the files.
    Returns: name -> float32 [pairs, 2] of (chosen, rejected), NaN for a pair in no micro-batch; and the model of the run's
        next step: the reference itself for a fresh run, the checkpoint's for a resumed one.
    Raises: ValueError when a resumed run needs the reference's weights and they are not those that it began with.
    """
    manifest = run.out / MANIFEST
    model: Mistral | None = None
    if run.checkpoint is not None and manifest.is_file():
        weights = read_json(manifest).get("weights", "")
    else:
        model = run.load_initial_model()
        weights = weights_hash(model)
    tables: dict[str, Tensor] = {}
    for name, (dataset, batches) in sets.items():
        path = cache / f"{_key(run, weights, dataset, batches)}.safetensors"
        table = _read(path, len(dataset) // 2)
        if table is None:
            if model is None:
                model = run.load_initial_model()
                _check_unchanged(run, weights_hash(model), weights)
            table = _compute(model, name, dataset, batches)
            _write(path, table)
        tables[name] = table
    if run.checkpoint is None:
        assert model is not None
        run.out.mkdir(parents=True, exist_ok=True)
        write_file(manifest, json.dumps({"weights": weights}) + "\n")
        return tables, model
    return tables, run.load_model()


def _check_unchanged(run: Run, weights: str, began_with: str) -> None:
    if weights != began_with:
        raise ValueError(
            f"model = {run.settings.model}: its weights are not those that the run in {run.out} began with as its reference; "
            "restore them or choose another out"
        )


def weights_hash(model: Mistral) -> str:
    """SHA-256 of all parameters with their names, dtypes and shapes."""
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        digest.update(f"{name} {parameter.dtype} {list(parameter.shape)}\n".encode())
        digest.update(parameter.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _key(run: Run, weights: str, dataset: TokenDataset, batches: list[Batch]) -> str:
    digest = hashlib.sha256(f"1 {weights} {dataset.fingerprint} {run.settings.context_length}\n".encode())
    for batch in batches:
        assert batch.pair_D is not None
        digest.update(batch.pair_D.numpy().tobytes())
    return digest.hexdigest()[:32]


def _compute(model: Mistral, name: str, dataset: TokenDataset, batches: list[Batch]) -> Tensor:
    tokens = sum(batch.tokens for batch in batches)
    with tqdm(total=tokens, unit="tok", unit_scale=True, desc=f"reference log-probs, {name}", disable=None) as bar:
        return reference_log_probs(model, batches, len(dataset) // 2, bar.update)


def _read(path: Path, pairs: int) -> Tensor | None:
    """The table of a file; None where there is none, or none that is whole, so that it is computed again."""
    if not path.is_file():
        return None
    try:
        table = load_file(path).get("log_probs")
    except SafetensorError:
        return None
    return table if table is not None and table.shape == (pairs, 2) else None


def _write(path: Path, table: Tensor) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    save_tensors({"log_probs": table.contiguous()}, partial)
    sync(partial)
    partial.replace(path)
