"""How long a rank waits for the others, and which rank holds the others up.

A step takes equally long on all ranks, because each collective ends on all of them at once. The slow rank (by its device, data
or host) is the rank that waits least. The measured waits are the forward pass's waits for gathered weights and the waits for
the sums of a step. On CUDA they are times on the device's own stream, and the host waits for none of them.
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
    """Adds up the seconds that this rank waits for others while it trains a sharded model; 0 on a single rank."""

    def __init__(self, model: nn.Module, ranks: Ranks) -> None:
        self._device, self._several = ranks.device, ranks.mesh is not None
        self._waits: list[tuple[Any, Any]] = []  # marks before and after
        self._begun: list[Any] = []
        # FSDP's own hook, which waits for the weights, runs between these two.
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
        """Count the collective inside as a wait."""
        start = mark(self._device) if self._several else None
        yield
        if self._several:
            self._waits.append((start, mark(self._device)))

    def take(self) -> float:
        """Seconds waited since the last call. The device must have finished the work that was timed."""
        waits, self._waits = self._waits, []
        return sum(itertools.starmap(seconds_between, waits), 0.0)


def slowest(waits: Sequence[float]) -> tuple[int, float]:
    """The rank that waits least, and how much less it waits than the median of the others.

    Args: waits: one a rank, in any unit; at least two.
    """
    rank = min(range(len(waits)), key=waits.__getitem__)
    others = [wait for other, wait in enumerate(waits) if other != rank]
    return rank, statistics.median(others) - waits[rank]
