"""How long a rank waits for the others, and which of them holds the others up.

A step takes all ranks equally long, as each collective ends for all at once. The rank that is slow, by its device, its data or
its host, is the one that waits least. What is measured are the waits of the forward pass for gathered weights and for the
step's sums. On CUDA these are times on the device's own stream, and the host waits for none of them.
"""

import itertools
import statistics
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import nn
from torch.distributed.fsdp import FSDPModule

from engine.distributed.ranks import Ranks
from engine.observe.timing import mark, seconds_between


class RankWaits:
    """Adds up what this rank waits while it trains a sharded model; nothing for one rank."""

    def __init__(self, model: nn.Module, ranks: Ranks) -> None:
        self._device, self._several = ranks.device, ranks.mesh is not None
        self._waits: list[tuple[Any, Any]] = []
        self._begun: list[Any] = []
        # FSDP's own hook, which waits, runs between these two.
        for unit in (module for module in model.modules() if isinstance(module, FSDPModule)):
            assert isinstance(unit, nn.Module)
            unit.register_forward_pre_hook(self._before, prepend=True)
            unit.register_forward_pre_hook(self._after)

    def _before(self, unit: nn.Module, _arguments: Any) -> None:
        if unit.training:
            self._begun.append(mark(self._device))

    def _after(self, unit: nn.Module, _arguments: Any) -> None:
        if unit.training:
            self._waits.append((self._begun.pop(), mark(self._device)))

    @contextmanager
    def timed(self) -> Iterator[None]:
        """Count a collective that is called within."""
        start = mark(self._device) if self._several else None
        yield
        if self._several:
            self._waits.append((start, mark(self._device)))

    def take(self) -> float:
        """Seconds since the last call. The device has to be idle."""
        waits, self._waits = self._waits, []
        return sum(itertools.starmap(seconds_between, waits), 0.0)


def slowest(waits: Sequence[float]) -> tuple[int, float]:
    """The rank that waits least, and how much less than the median of the others it waits.

    Args: waits: of each rank, in any unit; at least two.
    """
    rank = min(range(len(waits)), key=waits.__getitem__)
    others = [wait for other, wait in enumerate(waits) if other != rank]
    return rank, statistics.median(others) - waits[rank]
