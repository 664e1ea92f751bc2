"""An append-only file of JSON objects, one a line, from which a killed run goes on.

A line is on the disk when `append` returns. A kill in the middle of a write leaves a torn last line, which the next opening
cuts off; nothing else is ever changed.
"""

import json
import os
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from model.folder import sole_writer, sync


class Journal:
    """A journal, open for one writer. A context manager."""

    def __init__(self, path: str | Path) -> None:
        """Open or create the file. Its folder is created too.

        Raises: BlockingIOError where another process writes it; OSError naming the path where it cannot be written.
        """
        self.path = Path(path)
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file = os.open(self.path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o666)
        except OSError as error:
            reason = error.strerror or str(error)
            raise type(error)(f"{self.path}: cannot be written: {reason}; name a file in a writable folder") from None
        self._lock = ExitStack()
        try:
            self._lock.enter_context(sole_writer(self.path, self.path))
            self._size = self._mend_end()
            sync(self.path.parent)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> "Journal":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._lock.close()
        if self._file >= 0:
            os.close(self._file)
            self._file = -1

    def append(self, entry: dict[str, Any], *, synced: bool = True) -> int:
        """Add a line. Returns: the byte where it begins, for `at`.

        Args: synced: false leaves the flush to the next synced line: the line outlives the process, but not the machine.
        Raises: OSError naming the path where the disk is full or fails; the file then ends as it did before.
        """
        line = json.dumps(entry, ensure_ascii=False, allow_nan=False).encode("utf-8", "backslashreplace") + b"\n"
        begin = self._size
        try:
            self._write(line)
            if synced:
                os.fsync(self._file)
        except OSError as error:
            os.ftruncate(self._file, begin)
            reason = error.strerror or str(error)
            raise type(error)(f"{self.path}: could not be written: {reason}; free the disk and run the command again") from None
        self._size += len(line)
        return begin

    def at(self, begin: int) -> dict[str, Any]:
        """The entry whose line begins at a byte that `append` or `entries` gave."""
        with open(self.path, "rb") as file:
            file.seek(begin)
            return json.loads(file.readline())

    def entries(self) -> Iterator[tuple[int, dict[str, Any]]]:
        """Each entry with the byte where its line begins, oldest first.

        Raises: ValueError naming file and line for a line that is not a JSON object.
        """
        begin = 0
        with open(self.path, "rb") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield begin, _decoded(line, f"{self.path}:{number}")
                begin += len(line)

    def _write(self, data: bytes) -> None:
        rest = memoryview(data)
        while rest:
            rest = rest[os.write(self._file, rest) :]

    def _mend_end(self) -> int:
        """Remove a last line that a kill has cut short; end a whole one. Returns: the file's size in bytes."""
        line, size = b"", 0
        with open(self.path, "rb") as file:
            for line in file:
                size += len(line)
        if not line or line.endswith(b"\n"):
            return size
        try:
            _decoded(line, "")
        except ValueError:
            os.ftruncate(self._file, size - len(line))
            return size - len(line)
        self._write(b"\n")
        return size + 1


def _decoded(line: bytes, place: str) -> dict[str, Any]:
    try:
        entry = json.loads(line)
    except ValueError as error:
        raise ValueError(f"{place}: not a line of a journal ({error}); remove the line, or name another journal") from None
    if not isinstance(entry, dict):
        raise ValueError(f"{place}: holds a JSON {type(entry).__name__}, not an object; remove the line")
    return entry
