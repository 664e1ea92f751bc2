"""The frozen reference of preference tuning: its log-probabilities, computed once and kept on disk.

A file's name is a hash of everything that its numbers depend on: the model's configuration, weights, dtype, data, context. So a
later run with the same reference and data reuses the file, and no stale file is ever read.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from tqdm import tqdm

from engine.checkpoint.state import read_state
from engine.continuing import REFERENCE
from engine.data.batch import EvaluationBatches, share_of
from engine.data.dataset import TokenDataset
from engine.distributed.ranks import lost_ranks_named
from engine.distributed.sharding import reshard, whole
from engine.objectives.preference import reference_log_probs
from engine.run import Run
from model.config import MistralConfig, read_json
from model.folder import write_file
from model.mistral import Mistral
from model.tensor_file import TensorStream, write_tensor_file

# Holds the hashes of the reference's weights and configuration, so that a resumed run finds its tables without the weights.
MANIFEST = "reference.json"
# Fields of the configuration that no log-probability depends on. All others count, those of a later version too.
_WITHOUT_INFLUENCE = frozenset({"max_position_embeddings", "initializer_range", "bos_token_id", "eos_token_id"})


@dataclass(frozen=True)
class Reference:
    """The hashes (hex) that identify a reference model. config: None for a run that began before the configuration counted."""

    weights: str
    config: str | None


@lost_ranks_named()
def reference_tables(
    run: Run,
    sets: Mapping[str, tuple[TokenDataset, EvaluationBatches]],  # name -> (dataset, its pairs in micro-batches)
    cache: Path,  # folder of the files
) -> tuple[dict[str, Tensor], Mistral]:
    """Log-probabilities of each set's pairs, and the policy to train.

    A branch has the reference of its parent, whose folder may hold the tables already.

    Returns: name -> float32 [pairs, 2] of (chosen, rejected), NaN for a pair in no micro-batch; and the model of the run's
        next step: the reference itself for a fresh run, the checkpoint's model for a resumed run or a branch.
    Raises: ValueError when the reference's configuration has changed since a resumed run began, or its weights where the run
        needs them.
    """
    ranks, before = run.ranks, _before(run)
    model: Mistral | None = None
    known = read_json(before / MANIFEST) if ranks.main and before and (before / MANIFEST).is_file() else None
    known = ranks.from_main(known)
    if known is None:
        model = run.load_initial_model()
        reference = Reference(weights_hash(model), config_hash(run.config))
    else:
        reference = Reference(known.get("weights", ""), known.get("config"))
        if reference.config not in (None, config_hash(run.config)):
            raise ValueError(_changed(run, "configuration"))
    tables: dict[str, Tensor] = {}
    for name, (dataset, batches) in sets.items():
        path = cache / f"{_key(run, reference, dataset, batches)}.safetensors"
        own = table = _read(path, len(dataset) // 2)
        if own is None and before:
            table = _read(before / REFERENCE / path.name, len(dataset) // 2)
        # Each rank reads for itself; if one rank lacks the table, all ranks compute it.
        if ranks.sum_(torch.tensor(float(table is None))) > 0:
            if model is None:
                model = _starting_model(run, cache)
                if weights_hash(model) != reference.weights:
                    raise ValueError(_changed(run, "weights"))
            table = _compute(run, model, name, dataset, batches)
        assert table is not None
        if own is None and ranks.main and not run.settings.replay:
            cache.mkdir(parents=True, exist_ok=True)
            write_tensor_file(path, {"log_probs": TensorStream.of(table)})
        tables[name] = table
    if run.checkpoint is None and ranks.main and not run.settings.replay:
        run.out.mkdir(parents=True, exist_ok=True)
        write_file(run.out / MANIFEST, json.dumps(asdict(reference)) + "\n")
    if run.continued is None:
        assert model is not None
        return tables, model
    model = None  # frees it before the policy is loaded
    return tables, run.load_model()


def _before(run: Run) -> Path | None:
    """The run folder that knows the reference already: the run's own, or that of a branch's parent with the same reference."""
    if run.checkpoint is not None:
        return run.out
    if run.parent is None:
        return None
    began = read_state(Path(run.parent.checkpoint)).settings
    same = "preference" in began and began["model"] == run.settings.model
    return Path(run.parent.checkpoint).parent if same else None


def _starting_model(run: Run, cache: Path) -> Mistral:
    try:
        return run.load_initial_model()
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{error}; it must compute log-probabilities of the reference that {cache} lacks") from None


def _changed(run: Run, what: str) -> str:
    return (
        f"model = {run.settings.model}: its {what} changed since the run in {run.out} began with it as its reference; "
        f"restore the {what} or choose another out"
    )


def config_hash(config: MistralConfig) -> str:
    """SHA-256 (hex) of the fields of a configuration that log-probabilities depend on."""
    table = {name: value for name, value in asdict(config).items() if name not in _WITHOUT_INFLUENCE}
    return hashlib.sha256(json.dumps(table, sort_keys=True).encode()).hexdigest()


def weights_hash(model: Mistral) -> str:
    """SHA-256 (hex) of all whole parameters with their names, dtypes and shapes."""
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        digest.update(f"{name} {parameter.dtype} {list(parameter.shape)}\n".encode())
        digest.update(whole(parameter.detach()).cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _key(run: Run, reference: Reference, dataset: TokenDataset, batches: EvaluationBatches) -> str:
    identity = f"1 {reference.weights}" if reference.config is None else f"2 {reference.weights} {reference.config}"
    digest = hashlib.sha256(f"{identity} {dataset.fingerprint} {run.settings.context_length}\n".encode())
    for units in batches.parts():
        # Both sides of a pair name it, as the tables of earlier versions were named.
        digest.update((units.document // 2).astype(np.int64).tobytes())
    return digest.hexdigest()[:32]


def _compute(run: Run, model: Mistral, name: str, dataset: TokenDataset, batches: EvaluationBatches) -> Tensor:
    rank, ranks = run.ranks.rank, run.ranks.ranks
    mine, tokens = share_of(batches, rank, ranks), batches[rank::ranks].tokens
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
