"""What a file or folder holds, as SHA-256 by file: stages are compared by content, so a copy or a new date is no change.

A checkpoint and a prepared dataset know their own hashes, and are not read again. Other files are hashed once; while size and
time stay the same, the hash is taken from the markers.
"""

import glob
import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from engine.data.dataset import REPORT, file_sha256, read_report
from recipes.chain.stages import is_pattern


@dataclass
class Contents:
    """Reads contents, each file at most once. known: (path, size in bytes, time in ns) -> SHA-256 of files seen before."""

    known: dict[tuple[str, int, int], str] = field(default_factory=dict)

    def of(self, path: str | Path) -> dict[str, list[Any]] | None:
        """Each file of a path (a file, a folder, a pattern) with its SHA-256, size and time; None where nothing is there.

        A run folder and a checkpoint are their newest weights and tokenizer. Raises: ValueError or FileNotFoundError for a
        damaged checkpoint or dataset, naming file and remedy.
        """
        from engine.checkpoint.state import STATE, fingerprints, newest_checkpoint, read_state

        if is_pattern(str(path)):
            found = sorted(glob.glob(str(path), recursive=True))
            files = [file for each in found for file in _files(Path(each))]
            return {str(file): self._stamped(file) for file in files} or None
        path = Path(path)
        if path.is_file():
            return {"": self._stamped(path)}
        if not path.is_dir():
            return None
        checkpoint = newest_checkpoint(path) or path
        if (checkpoint / STATE).is_file():
            read_state(checkpoint)
            weights = {name: file for name, file in fingerprints(checkpoint).items() if not name.startswith("training")}
            return {name: [file.sha256, file.size, 0] for name, file in sorted(weights.items())}
        if (path / REPORT).is_file():
            report = read_report(path)
            # A model that is trained on it carries its chat template.
            known = json.dumps([report.get("fingerprint"), report.get("template")])
            return {REPORT: [hashlib.sha256(known.encode()).hexdigest(), 0, 0]}
        # An empty folder is nothing: a stage that was killed may have made it.
        return {str(file.relative_to(path)): self._stamped(file) for file in _files(path)} or None

    def _stamped(self, file: Path) -> list[Any]:
        stat = file.stat()
        key = (str(file.resolve()), stat.st_size, stat.st_mtime_ns)
        if key not in self.known:
            self.known[key] = file_sha256(file)
        return [self.known[key], stat.st_size, stat.st_mtime_ns]

    def remember(self, path: str, files: dict[str, list[Any]] | None) -> None:
        """Take the hashes that a marker holds for a path."""
        folder = Path(path)
        for name, (sha256, size, time) in (files or {}).items():
            file = Path(name) if is_pattern(path) else folder / name if name else folder
            if time:
                self.known.setdefault((str(file.resolve()), size, time), sha256)


def _files(path: Path) -> Iterable[Path]:
    """A file, or the files of a folder at any depth, without hidden ones."""
    if path.is_file():
        yield path
        return
    for child in sorted(path.iterdir()):
        if not child.name.startswith("."):
            yield from _files(child)


def difference(before: dict[str, list[Any]] | None, now: dict[str, list[Any]] | None) -> str | None:
    """The first file in which two contents differ, in words; None where they are equal."""
    before, now = before or {}, now or {}
    for name in sorted({*before, *now}):
        if name not in now or name not in before:
            return f"{name or 'the file'} is {'new' if name in now else 'gone'}"
        if before[name][0] != now[name][0]:
            return f"{name or 'the file'} has another content"
    return None
