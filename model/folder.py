"""Folders that appear under their name only when complete.

Everything that the engine leaves on disk for others (checkpoints, exports, tokenizers, token shards) is written to a hidden
sibling, synced and renamed. A killed process leaves at most the sibling, which the next attempt removes.
"""

import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def complete_folder(path: str | Path, *, overwrite: bool = False) -> Iterator[Path]:
    """Yield a hidden folder to write into; on leaving without an error it becomes `path`, all at once.

    Raises: FileExistsError when `path` exists and `overwrite` is false; PermissionError or OSError naming `path` when it cannot
        be written; BlockingIOError when another process is writing it. On any error inside the block the hidden folder is
        removed and `path` is left as it was.
    """
    # A link's target is replaced, not the link.
    given, path = Path(path), Path(path).resolve()
    if path.exists() and not path.is_dir():
        raise FileExistsError(f"{given}: is a file; name a folder")
    if path.exists() and not overwrite:
        raise FileExistsError(f"{given}: exists already; name another folder or ask to overwrite it")
    partial = path.with_name(f".{path.name}.partial")
    try:
        partial.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise type(error)(f"{given}: cannot be written: {error.strerror or error}; choose a writable folder") from None
    with sole_writer(partial, given):
        try:
            _empty(partial)
            yield partial
            sync_all(partial)
            replace_folder(partial, path)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise


@contextmanager
def sole_writer(folder: Path, name: Path) -> Iterator[None]:
    """Hold an existing folder against other processes that ask for the same; a killed process holds nothing.

    Raises: BlockingIOError naming `name` when another process holds it.
    """
    lock = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise BlockingIOError(f"{name}: another process is writing it now; wait for it or choose another name") from None
        yield
    finally:
        os.close(lock)


def _empty(folder: Path) -> None:
    """Remove what a killed process has left, but not the folder itself, which bears the lock."""
    for left in folder.iterdir():
        if left.is_dir() and not left.is_symlink():
            shutil.rmtree(left)
        else:
            left.unlink()


def replace_folder(source: Path, target: Path) -> None:
    """Rename `source` to `target`; an old `target` is moved aside first and removed last, so that one of them always exists."""
    old = target.with_name(f".{target.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if target.exists():
        target.rename(old)
    source.rename(target)
    sync(target.parent)
    shutil.rmtree(old, ignore_errors=True)


def write_file(path: str | Path, text: str) -> None:
    """Write a text file so that its name never holds half of it."""
    path = Path(path)
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(text, encoding="utf-8")
    sync(partial)
    partial.replace(path)


def sync(path: Path) -> None:
    """Flush a file or a folder's entries to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sync_all(folder: Path) -> None:
    """Flush a folder and all that is in it to the disk."""
    for entry in (*folder.rglob("*"), folder):
        sync(entry)
