"""Files that grow line by line, such as metrics.jsonl. What a full disk refuses waits in memory: it must not end a run."""

import os
from collections.abc import Iterable
from pathlib import Path


class LineFile:
    """Appends lines to a file, which appears with the first one."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._waiting: list[str] = []

    def add(self, lines: Iterable[str] = ()) -> None:
        """Append lines, after those that could not be written before.

        Raises: OSError where they could not be written. The file then ends as before, and the lines wait for the next call.
        """
        self._waiting.extend(f"{line}\n" for line in lines)
        if not self._waiting:
            return
        data = "".join(self._waiting).encode()
        with self.path.open("ab", buffering=0) as file:
            end = file.seek(0, os.SEEK_END)
            try:
                while data:
                    data = data[file.write(data) :]
            except OSError:
                # A disk that becomes full takes the beginning of a line.
                file.truncate(end)
                raise
        self._waiting.clear()
