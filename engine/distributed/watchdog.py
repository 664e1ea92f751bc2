"""A rank that hangs prints its stacks and ends."""

import faulthandler
import signal
import sys

from engine.distributed.ranks import Ranks


class Watchdog:
    """Expects a sign of life of this process every `seconds`. A context manager.

    Without a sign of life, the stacks of all threads go to standard error, even while no Python code can run. On one of several
    ranks SIGALRM ends the process after as many seconds more, so that its launcher can start it again. The ranks that wait for
    it have left by then: their collective raises after `seconds`.
    """

    def __init__(self, ranks: Ranks, seconds: float) -> None:
        self._seconds = seconds
        self._ends = ranks.mesh is not None and signal.getsignal(signal.SIGALRM) is signal.SIG_DFL

    def __enter__(self) -> "Watchdog":
        self.alive()
        return self

    def __exit__(self, *_: object) -> None:
        self.pause()

    def alive(self) -> None:
        """Give a sign of life: count the seconds from now."""
        # sys.stderr may have been replaced by an object that is no file.
        faulthandler.dump_traceback_later(self._seconds, file=sys.__stderr__ or 2)
        if self._ends:
            signal.setitimer(signal.ITIMER_REAL, 2 * self._seconds)

    def pause(self) -> None:
        """Expect nothing until the next sign of life."""
        faulthandler.cancel_dump_traceback_later()
        if self._ends:
            signal.setitimer(signal.ITIMER_REAL, 0)
