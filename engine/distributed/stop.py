"""All ranks save and stop after the same step: after SIGTERM or Ctrl-C, when a checkpoint is due by the clock, or failed."""

import os
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist

from engine.distributed.ranks import Ranks

NAMES: dict[int, str] = {signal.SIGTERM: "SIGTERM", signal.SIGINT: "Ctrl-C"}


@dataclass(frozen=True)
class Wishes:
    """What at least one rank wishes. All ranks act on the same wishes after the same step."""

    stop: int = 0  # the largest signal that asked to stop; 0 for none
    save: bool = False  # the clock of rank 0 says that a checkpoint is due
    failed: bool = False  # a checkpoint could not be written


class Interruption:
    """Tells after each step what the ranks wish. A context manager, inside which SIGTERM and Ctrl-C ask to stop.

    Schedulers send SIGTERM some time before they kill, and torchrun passes it on. The ranks' wishes are compared while the next
    step runs. No rank waits for the comparison, so the answer is one step old. A second Ctrl-C ends the process at once.
    """

    def __init__(
        self,
        ranks: Ranks,
        *,
        save_every: float = 0.0,  # seconds between checkpoints; 0: none by the clock
        failed: Callable[[], bool] = lambda: False,  # whether a checkpoint of this rank could not be written
    ) -> None:
        self._ranks, self._save_every, self._failed = ranks, save_every, failed
        self._saved = time.monotonic()
        self._signal = self._agreed_signal = 0
        self._save = self._checkpoint_failed = False
        self._previous_handlers: dict[int, Any] = {}
        self._pending: tuple[dist.Work, torch.Tensor] | None = None

    def __enter__(self) -> "Interruption":
        if threading.current_thread() is threading.main_thread():
            self._previous_handlers = {number: signal.signal(number, self._on_signal) for number in NAMES}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous_handlers.items():
            signal.signal(number, handler)

    def _on_signal(self, number: int, _frame: FrameType | None) -> None:
        self._signal = max(self._signal, number)
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            # print() may be what the signal interrupted.
            os.write(2, b"\nCtrl-C: saving after this step; press it again to leave at once\n")

    def saved(self) -> None:
        """Count the time to the next checkpoint from now."""
        self._saved = time.monotonic()

    def answer(self) -> Wishes:
        """What the ranks wished when `ask` was last called; a single rank's wishes of now. Call it after every step."""
        if self._ranks.mesh is None:
            return Wishes(*self._mine())
        self._hear()
        wishes = Wishes(self._agreed_signal, self._save, self._checkpoint_failed)
        self._save = self._checkpoint_failed = False
        return wishes

    def ask(self) -> None:
        """Send this rank's wishes to the others, once it has acted on the answer. Every rank calls it after every step."""
        if self._ranks.mesh is not None:
            self._send(self._mine())

    def stopping(self) -> bool:
        """Whether all ranks stop now, without waiting for the end of a step. All ranks call it equally often."""
        if self._ranks.mesh is None:
            return bool(self._signal)
        self._hear()
        self._send((self._signal, False, False))
        return bool(self._agreed_signal)

    def _mine(self) -> tuple[int, bool, bool]:
        due = self._ranks.main and 0 < self._save_every <= time.monotonic() - self._saved
        return self._signal, due, self._failed()

    def _send(self, wishes: tuple[int, bool, bool]) -> None:
        requests = torch.tensor([float(wish) for wish in wishes])
        work = dist.all_reduce(requests, op=dist.ReduceOp.MAX, async_op=True)
        assert work is not None
        self._pending = (work, requests)

    def _hear(self) -> None:
        if self._pending is None:
            return
        work, requests = self._pending
        work.wait()
        stop, save, failed = requests.tolist()
        self._pending = None
        self._agreed_signal = max(self._agreed_signal, int(stop))
        self._save, self._checkpoint_failed = self._save or bool(save), self._checkpoint_failed or bool(failed)
