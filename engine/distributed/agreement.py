"""Ranks that see different things: each proves that it has the same settings, data and weights as rank 0."""

import hashlib
import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch.distributed as dist

from engine.distributed.ranks import Ranks
from model.hub import weight_files

# Seconds that a machine may take to see a folder that another machine has written.
_PATIENCE = 60.0
# Bytes read at each of this many places of a file of weights.
_SAMPLE, _PLACES = 4096, 64


def check_same(ranks: Ranks, facts: Mapping[str, Any], remedy: str) -> None:
    """Raises: ValueError on all ranks, naming the rank and the first fact in which it differs from rank 0."""
    everyone = ranks.gather([dict(facts)])
    for rank, theirs in enumerate(everyone):
        if difference := _difference(everyone[0], rank, theirs):
            raise ValueError(f"{difference}; {remedy}")


def difference_in(
    store: dist.Store,  # that all ranks reach
    rank: int,
    ranks: int,
    facts: Mapping[str, Any],  # values that JSON can hold
) -> str | None:
    """The first fact in which a rank differs from rank 0, on all ranks, before they have a group; None where they agree."""
    if rank == 0:
        store.set("facts", json.dumps(facts))
        told = (store.get(f"difference of rank {other}").decode() for other in range(1, ranks))
        store.set("difference", next(filter(None, list(told)), ""))
    else:
        theirs, mine = json.loads(store.get("facts")), json.loads(json.dumps(facts))
        store.set(f"difference of rank {rank}", _difference(theirs, rank, mine) or "")
    difference = store.get("difference").decode() or None
    if difference:
        # Rank 0 may hold the store in its own process, and all ranks are about to end.
        store.set(f"rank {rank} knows", "")
        if rank == 0:
            store.wait([f"rank {other} knows" for other in range(ranks)])
    return difference


def _difference(expected: Mapping[str, Any], rank: int, facts: Mapping[str, Any]) -> str | None:
    """The first fact in which a rank differs from rank 0, in words."""
    for name in sorted({*expected, *facts}):
        if expected.get(name) != facts.get(name):
            return f"{name}: rank {rank} has {facts.get(name)!r}, rank 0 has {expected.get(name)!r}"
    return None


def seen(folder: Path, ranks: Ranks) -> Path:
    """A folder that rank 0 has chosen, once this rank sees it: listings of shared file systems may be some time old.

    Raises: FileNotFoundError.
    """
    end = time.monotonic() + (0.0 if ranks.main else _PATIENCE)
    while not folder.is_dir():
        if time.monotonic() >= end:
            raise FileNotFoundError(f"{folder}: rank 0 sees it, this rank does not; all machines of a run must share this disk")
        time.sleep(0.5)
    return folder


def weights_sample(folder: Path) -> str | None:
    """SHA-256 (hex) of names, sizes, headers and parts of a folder's weight files: tells two models apart in an instant.

    Returns: None where a file is not there; a dry run fetches none from the hub.
    """
    digest = hashlib.sha256()
    for path in (folder / name for name in weight_files(folder)):
        if not path.is_file():
            return None
        size = path.stat().st_size
        digest.update(f"{path.name} {size}\n".encode())
        with path.open("rb") as file:
            for place in range(_PLACES):
                file.seek(max(0, size - _SAMPLE) * place // (_PLACES - 1))
                digest.update(file.read(_SAMPLE))
    return digest.hexdigest()
