"""Python's garbage collector, run at log lines instead of at random moments.

A collection visits every object that torch and its libraries have made. It takes up to half a second, during which this rank
launches nothing and all other ranks wait for it.
"""

import gc


class GarbageAtLogLines:
    """A context manager inside which reference cycles are collected only by `collect`."""

    def __init__(self) -> None:
        self._enabled, self._frozen = gc.isenabled(), False

    def __enter__(self) -> "GarbageAtLogLines":
        gc.disable()
        return self

    def __exit__(self, *_: object) -> None:
        gc.unfreeze()
        if self._enabled:
            gc.enable()

    def collect(self) -> None:
        """Collect now. The objects that survive the first collection (libraries, the model) are not visited again."""
        gc.collect()
        if not self._frozen:
            gc.freeze()
            self._frozen = True
