"""A rank that hangs says where, and ends."""

import faulthandler
import signal
import sys

from engine.distributed.ranks import Ranks


class Watchdog:
    """Waits for signs of life of this process. A context manager.

    After `seconds` without one, the stacks of all threads go to standard error, also where no Python code can run. On one of
    several ranks the process ends after as many seconds more, by SIGALRM, so that whoever started it can start it again. The
    ranks that wait for it have left by then: they raise after `seconds` in the collective.
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
        """Count from now."""
        # The process's own standard error: what a program may have put in its place need not be a file.
        faulthandler.dump_traceback_later(self._seconds, file=sys.__stderr__ or 2)
        if self._ends:
            signal.setitimer(signal.ITIMER_REAL, 2 * self._seconds)

    def pause(self) -> None:
        """Expect no sign of life until the next one."""
        faulthandler.cancel_dump_traceback_later()
        if self._ends:
            signal.setitimer(signal.ITIMER_REAL, 0)
