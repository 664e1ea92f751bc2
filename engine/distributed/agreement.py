"""Ranks that see different things: each proves that it has the same settings, data and weights as rank 0."""

import hashlib
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from engine.distributed.ranks import Ranks, gather, host_group

# Seconds that a machine may take to see a folder that another machine has written.
_PATIENCE = 60.0
# Bytes read at each of this many places of a file of weights.
_SAMPLE, _PLACES = 4096, 64


def check_same(ranks: Ranks, facts: Mapping[str, Any], remedy: str) -> None:
    """Raises: ValueError on all ranks, naming the rank and the first fact in which it differs from rank 0."""
    everyone = gather([dict(facts)], ranks, host_group(ranks))
    for rank, theirs in enumerate(everyone):
        for name in sorted({*everyone[0], *theirs}):
            mine, other = everyone[0].get(name), theirs.get(name)
            if mine != other:
                raise ValueError(f"{name}: rank {rank} has {other!r}, rank 0 has {mine!r}; {remedy}")


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


def weights_sample(folder: Path) -> str:
    """SHA-256 (hex) of names, sizes, headers and parts of a folder's weight files: tells two models apart in an instant."""
    digest = hashlib.sha256()
    for path in sorted(folder.glob("*.safetensors")):
        size = path.stat().st_size
        digest.update(f"{path.name} {size}\n".encode())
        with path.open("rb") as file:
            for place in range(_PLACES):
                file.seek(max(0, size - _SAMPLE) * place // (_PLACES - 1))
                digest.update(file.read(_SAMPLE))
    return digest.hexdigest()
