"""Python's garbage collector, run when a log line is written instead of whenever it likes.

A collection looks at every object that torch and its libraries have made, for up to half a second, in which this rank launches
nothing and all others wait for it.
"""

import gc


class GarbageAtLogLines:
    """A context manager within which garbage of cycles is collected only by `collect`."""

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
        """Collect now. What is left after the first time, the libraries and the model, is not looked at again."""
        gc.collect()
        if not self._frozen:
            gc.freeze()
            self._frozen = True
