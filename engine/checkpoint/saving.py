"""Saves during a run, and tries again where a checkpoint could not be written: a full disk must not cost the run."""

import time
from collections.abc import Callable, Sequence
from pathlib import Path

from engine.checkpoint.state import TrainingState
from engine.checkpoint.writing import Checkpointer

# Seconds before each further try to write the last checkpoint of a run: time to free a disk.
PATIENCE = (0.0, 60.0, 240.0)


class Saving:
    """A checkpoint that fails is tried again after the next step, then whenever the next one is due.

    The run ends without its last checkpoint only when `finish` gives up. All ranks call this alike.
    """

    def __init__(self, checkpointer: Checkpointer, say: Callable[[str], None]) -> None:
        self._checkpointer, self._say = checkpointer, say
        self._failures = 0  # in a row
        self._begun = False  # a checkpoint that has not been waited for
        self._error: OSError | None = None

    def due_again(self, failed: bool) -> bool:
        """Whether to save now because the checkpoint before failed. failed: on any rank, as all ranks know."""
        if not failed:
            return False
        first = self._failures == 0
        next_try = "trying again after this step" if first else "the next try comes with the next checkpoint that is due"
        return not self._settled(next_try) and first

    def save(self, state: TrainingState) -> Path:
        """Begin a checkpoint. Returns: its path, which does not exist yet."""
        self._settled("trying again now")
        return self._begin(state)

    def finish(self, state: TrainingState, patience: Sequence[float]) -> None:
        """Wait for the checkpoint of this state; try again after each of these pauses. Raises: OSError after the last try."""
        for pause in patience:
            if self._settled(f"trying again in {pause:.0f} s"):
                return
            time.sleep(pause)
            self._begin(state)
        if not self._settled("no further try"):
            assert self._error is not None
            raise self._error

    def _begin(self, state: TrainingState) -> Path:
        self._begun = True
        return self._checkpointer.save(state)

    def _settled(self, next_try: str) -> bool:
        """Wait for the checkpoint that was begun. Returns: whether it is complete; a failure is reported."""
        try:
            self._checkpointer.wait()
        except OSError as error:
            self._begun, self._failures, self._error = False, self._failures + 1, error
            self._say(f"a checkpoint could not be written: {error}; {next_try}")
            return False
        if self._begun:
            self._begun, self._failures = False, 0
        return True
