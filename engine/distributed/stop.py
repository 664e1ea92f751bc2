"""All ranks stop after the same step when one of them received SIGTERM, or has a reason of its own."""

import signal
import threading
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist

from engine.distributed.ranks import Ranks


class Interruption:
    """Asks after each step whether any rank wants to stop. A context manager, inside which SIGTERM asks to stop.

    Schedulers send SIGTERM some time before they kill, and torchrun passes it on. The ranks' requests are summed while the next
    step runs. No rank waits for the sum, so the answer is one step old.
    """

    def __init__(self, ranks: Ranks) -> None:
        self._ranks = ranks
        self._terminated = False
        self._previous_handler: Any = None
        self._pending: tuple[dist.Work, torch.Tensor] | None = None

    def __enter__(self) -> "Interruption":
        if threading.current_thread() is threading.main_thread():
            self._previous_handler = signal.signal(signal.SIGTERM, self._on_sigterm)
        return self

    def __exit__(self, *_: object) -> None:
        if self._previous_handler is not None:
            signal.signal(signal.SIGTERM, self._previous_handler)

    def _on_sigterm(self, _number: int, _frame: FrameType | None) -> None:
        self._terminated = True

    def after_step(self, stop: bool = False) -> bool:
        """Returns whether all ranks stop now. Every rank calls this after every step. stop: this rank's own reason to stop."""
        stop = stop or self._terminated
        if self._ranks.mesh is None:
            return stop
        answer = False
        if self._pending is not None:
            work, requests = self._pending
            work.wait()
            answer = bool(requests)
        requests = torch.tensor(float(stop))
        work = dist.all_reduce(requests, async_op=True)
        assert work is not None
        self._pending = (work, requests)
        return answer
