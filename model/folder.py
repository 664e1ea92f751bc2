"""Folders and files that appear under their name only when complete.

Checkpoints, exports, tokenizers, token shards and reports are written to a hidden sibling, synced and renamed. A killed process
leaves at most the hidden sibling; the next writer of a folder removes it.
"""

import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


@contextmanager
def complete_folder(path: str | Path, *, overwrite: bool = False) -> Iterator[Path]:
    """Yield a hidden folder to write into; on leaving without an error it becomes `path`, all at once.

    Where `path` is a symbolic link, its target is replaced.
    Raises: FileExistsError when `path` exists and `overwrite` is false; PermissionError or OSError naming `path` when it cannot
        be written; BlockingIOError when another process is writing it. On any error inside the block the hidden folder is
        removed and `path` is left as it was.
    """
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
    """Hold the lock of an existing folder; the system releases a killed process's lock.

    Raises: BlockingIOError naming `name` when another process holds the lock.
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
    """Remove the remains of a killed process, but not the folder itself, which holds the lock."""
    for left in folder.iterdir():
        if left.is_dir() and not left.is_symlink():
            shutil.rmtree(left)
        else:
            left.unlink()


def replace_folder(source: Path, target: Path) -> None:
    """Rename `source` to `target`. An old `target` is moved aside first and removed last, so one of the two always exists."""
    old = target.with_name(f".{target.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if target.exists():
        target.rename(old)
    source.rename(target)
    sync(target.parent)
    shutil.rmtree(old, ignore_errors=True)


@contextmanager
def complete_file(path: str | Path) -> Iterator[Path]:
    """Yield a hidden path to write to; on leaving without an error it becomes `path`, all at once.

    The hidden name holds the process id, so that two processes never write the same file. An old `path` is replaced.
    Raises: OSError of the original kind, naming `path` and the remedy, when the file cannot be written. On any error the hidden
        file is removed and `path` is left as it was.
    """
    path = Path(path)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        yield partial
        sync(partial)
        partial.replace(path)
    except BaseException as error:
        with suppress(OSError):
            partial.unlink()
        if isinstance(error, OSError):
            reason = error.strerror or str(error)
            raise type(error)(f"{path}: could not be written: {reason}; free the disk or choose another folder") from None
        raise


def write_file(path: str | Path, data: str | bytes) -> None:
    """Write a file, text as UTF-8, so that its name never holds half of the data. Raises: OSError as `complete_file` does."""
    with complete_file(path) as partial:
        partial.write_bytes(data.encode() if isinstance(data, str) else data)


def sync(path: Path) -> None:
    """Flush a file, or a folder's list of entries, to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sync_all(folder: Path) -> None:
    """Flush a folder and everything in it to the disk."""
    for entry in (*folder.rglob("*"), folder):
        sync(entry)
