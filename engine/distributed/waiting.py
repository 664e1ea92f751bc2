"""Work that rank 0 does alone while the other ranks wait for it, however long it takes.

A collective would end after `parallel.timeout`, and preparing data may take hours. So the ranks look into the store of their
launcher, which needs no process group. If rank 0 dies, the others end too: by their launcher, or because the store is gone.
"""

import json
import time
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from engine.distributed.joining import check_launcher, common_store, world_size
from engine.distributed.ranks import first_line
from engine.settings.sections import ParallelSettings

# Seconds between two looks into the store: the first, and the longest.
_SOON, _LATER = 0.01, 1.0


class Waiting:
    """The ranks of a program of which some parts run on rank 0 alone. All ranks call the same methods in the same order."""

    def __init__(self) -> None:
        """Raises: ValueError or ConnectionError as `join` does, where the launcher is wrong or the ranks cannot meet."""
        check_launcher()
        self.rank, self.ranks, self._calls = 0, world_size(), 0
        self._store: dist.Store | None = None
        if self.ranks > 1:
            store, self.rank, self.ranks = common_store(timedelta(seconds=ParallelSettings.timeout))
            self._store = dist.PrefixStore("waiting", store)

    @property
    def main(self) -> bool:
        return self.rank == 0

    def main_alone(self, action: Callable[[], Any]) -> Any:
        """What the action returns on rank 0, on every rank: something that JSON can hold.

        Raises: on rank 0, what the action raises; on the others ConnectionError with its message, or SystemExit as there.
        """
        if self._store is None:
            return action()
        self._calls += 1
        name = str(self._calls)
        if not self.main:
            return self._heard(name)
        try:
            value = action()
        except BaseException as error:
            code = error.code if isinstance(error, SystemExit) else None
            with suppress(Exception):
                self._store.set(name, json.dumps({"ended": first_line(error), "code": code}))
            raise
        self._store.set(name, json.dumps({"value": value}))
        return value

    def _heard(self, name: str) -> Any:
        assert self._store is not None
        pause = _SOON
        try:
            while not self._store.check([name]):
                time.sleep(pause)
                pause = min(_LATER, 1.5 * pause)
            said = json.loads(self._store.get(name))
        except dist.DistError as error:
            raise ConnectionError(f"rank {self.rank}: rank 0 cannot be reached any more ({first_line(error)})") from None
        if "value" in said:
            return said["value"]
        if isinstance(said["code"], int):
            raise SystemExit(said["code"])
        raise ConnectionError(f"rank 0 ended: {said['ended']}")

    def leave(self) -> None:
        """Wait on rank 0, which may hold the store, until the others have left. Called where nobody failed."""
        if self._store is None:
            return
        left = self._store.add("left", 1)
        while self.main and left < self.ranks:
            time.sleep(_SOON)
            left = self._store.add("left", 0)
