"""The frozen reference of preference tuning: its log-probabilities, computed once and kept on disk.

A file's name is a hash of everything that its numbers depend on (weights, dtype, data, context). So a later run with the same
reference and data reuses the file, and no stale file is ever read.
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

from engine.data.batch import Batch, share_of
from engine.data.dataset import TokenDataset
from engine.distributed.ranks import lost_ranks_named
from engine.distributed.sharding import reshard, whole
from engine.objectives.preference import reference_log_probs
from engine.run import Run
from model.config import read_json
from model.folder import write_file
from model.mistral import Mistral
from model.tensor_file import TensorStream, write_tensor_file

# Holds the hash of the reference's weights, so that a resumed run finds its tables without loading the weights.
MANIFEST = "reference.json"


@lost_ranks_named()
def reference_tables(
    run: Run,
    sets: Mapping[str, tuple[TokenDataset, list[Batch]]],  # name -> (dataset, its pairs in micro-batches)
    cache: Path,  # folder of the files
) -> tuple[dict[str, Tensor], Mistral]:
    """Log-probabilities of each set's pairs, and the policy to train.

    Returns: name -> float32 [pairs, 2] of (chosen, rejected), NaN for a pair in no micro-batch; and the model of the run's
        next step: the reference itself for a fresh run, the checkpoint's model for a resumed run.
    Raises: ValueError when a resumed run needs the reference's weights and they have changed since it began.
    """
    manifest, ranks = run.out / MANIFEST, run.ranks
    model: Mistral | None = None
    known = read_json(manifest).get("weights", "") if run.checkpoint is not None and manifest.is_file() else None
    weights = ranks.from_main(known)
    if weights is None:
        model = run.load_initial_model()
        weights = weights_hash(model)
    tables: dict[str, Tensor] = {}
    for name, (dataset, batches) in sets.items():
        path = cache / f"{_key(run, weights, dataset, batches)}.safetensors"
        table = _read(path, len(dataset) // 2)
        # Each rank reads for itself; if one rank lacks the table, all ranks compute it.
        if ranks.sum_(torch.tensor(float(table is None))) > 0:
            if model is None:
                model = run.load_initial_model()
                _check_unchanged(run, weights_hash(model), weights)
            table = _compute(run, model, name, dataset, batches)
            if ranks.main and not run.settings.replay:
                cache.mkdir(parents=True, exist_ok=True)
                write_tensor_file(path, {"log_probs": TensorStream.of(table)})
        assert table is not None
        tables[name] = table
    if run.checkpoint is None:
        assert model is not None
        if ranks.main and not run.settings.replay:
            run.out.mkdir(parents=True, exist_ok=True)
            write_file(manifest, json.dumps({"weights": weights}) + "\n")
        return tables, model
    return tables, run.load_model()


def _check_unchanged(run: Run, weights: str, began_with: str) -> None:
    if weights != began_with:
        raise ValueError(
            f"model = {run.settings.model}: its weights have changed since the run in {run.out} began with them as its "
            "reference; restore them or choose another out"
        )


def weights_hash(model: Mistral) -> str:
    """SHA-256 (hex) of all whole parameters with their names, dtypes and shapes."""
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        digest.update(f"{name} {parameter.dtype} {list(parameter.shape)}\n".encode())
        digest.update(whole(parameter.detach()).cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _key(run: Run, weights: str, dataset: TokenDataset, batches: list[Batch]) -> str:
    digest = hashlib.sha256(f"1 {weights} {dataset.fingerprint} {run.settings.context_length}\n".encode())
    for batch in batches:
        assert batch.pair_B is not None
        digest.update(batch.pair_B.numpy().tobytes())
    return digest.hexdigest()[:32]


def _compute(run: Run, model: Mistral, name: str, dataset: TokenDataset, batches: list[Batch]) -> Tensor:
    mine = share_of(batches, run.ranks.rank, run.ranks.ranks)
    tokens = sum(batch.tokens for batch in mine)
    disable = None if run.ranks.main else True
    with tqdm(total=tokens, unit="tok", unit_scale=True, desc=f"reference log-probs, {name}", disable=disable) as bar:
        table = reference_log_probs(model, mine, len(dataset) // 2, bar.update)
    reshard(model)
    known = run.ranks.sum_((~table.isnan()).float())
    return run.ranks.sum_(table.nan_to_num()).masked_fill(known == 0, torch.nan)


def _read(path: Path, pairs: int) -> Tensor | None:
    """The table of a file, None if the file is missing or damaged."""
    if not path.is_file():
        return None
    try:
        table = load_file(path).get("log_probs")
    except SafetensorError:
        return None
    return table if table is not None and table.shape == (pairs, 2) else None
