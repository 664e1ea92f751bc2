"""Stopping all ranks after the same step, because one of them was told to (SIGTERM), or has a reason of its own."""

import signal
import threading
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist

from engine.distributed.ranks import Ranks


class Interruption:
    """Asks between steps whether any rank wants to stop. A context manager, within which SIGTERM is such a wish.

    Schedulers send SIGTERM some time before they kill, and torchrun passes it on. The ranks' wishes are added up while the next
    step runs, so that none of them waits for the answer, which is therefore one step old.
    """

    def __init__(self, ranks: Ranks) -> None:
        self._ranks = ranks
        self._told = False
        self._before: Any = None
        self._asked: tuple[dist.Work, torch.Tensor] | None = None

    def __enter__(self) -> "Interruption":
        if threading.current_thread() is threading.main_thread():
            self._before = signal.signal(signal.SIGTERM, self._tell)
        return self

    def __exit__(self, *_: object) -> None:
        if self._before is not None:
            signal.signal(signal.SIGTERM, self._before)

    def _tell(self, _number: int, _frame: FrameType | None) -> None:
        self._told = True

    def after_step(self, wish: bool = False) -> bool:
        """Whether all ranks stop now. To be called by all of them after every step. wish: this rank's own reason."""
        wish = wish or self._told
        if self._ranks.mesh is None:
            return wish
        answer = False
        if self._asked is not None:
            work, total = self._asked
            work.wait()
            answer = bool(total)
        total = torch.tensor(float(wish))
        work = dist.all_reduce(total, async_op=True)
        assert work is not None
        self._asked = (work, total)
        return answer
