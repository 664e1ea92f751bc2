"""Folders and files that appear under their name only when complete.

Checkpoints, exports, tokenizers, token shards and reports are written to a hidden sibling, synced and renamed. A killed process
leaves at most the hidden sibling; the next writer of a folder removes it.
"""

import errno
import fcntl
import os
import secrets
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

# A file system that lacks an operation answers with one of these.
_LACKING = frozenset({errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.EINVAL})
_HELD = frozenset({errno.EWOULDBLOCK, errno.EAGAIN, errno.EACCES})


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
def sole_writer(folder: Path, name: Path) -> Iterator[bool]:
    """Hold the lock of an existing folder; the system releases a killed process's lock.

    Yields: whether the file system has such locks. Without them a warning says so, and nothing keeps two writers apart.
    Raises: BlockingIOError naming `name` when another process holds the lock; OSError naming it for another failure.
    """
    lock = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            locked = True
        except OSError as error:
            if error.errno in _HELD:
                text = f"{name}: another process is writing it now; wait for it or choose another name"
                raise BlockingIOError(text) from None
            if error.errno not in _LACKING:
                raise type(error)(f"{name}: could not be locked: {error.strerror or error}") from None
            _say_lacking(f"has no locks ({error.strerror}): two processes that write one folder would not notice each other")
            locked = False
        yield locked
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

    No two writers share a hidden name, not even on two machines that share a disk. An old `path` is replaced.
    Raises: OSError of the original kind, naming `path` and the remedy, when the file cannot be written. On any error the hidden
        file is removed and `path` is left as it was.
    """
    path = Path(path)
    partial = path.with_name(f".{path.name}.{secrets.token_hex(8)}.partial")
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
    """Flush a file, or a folder's list of entries, to the disk.

    Where the file system cannot flush folders, a warning says so. Raises: OSError naming the path for any other failure.
    """
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in _LACKING or not path.is_dir():
            raise OSError(error.errno, error.strerror, str(path)) from None
        _say_lacking(f"cannot flush folders ({error.strerror}): a machine that stops may lose the newest names")
    finally:
        os.close(handle)


def _say_lacking(what: str) -> None:
    """Say once what a file system lacks."""
    if what not in _said:
        _said.add(what)
        warnings.warn(f"this file system {what}", stacklevel=3)


_said: set[str] = set()


def sync_all(folder: Path) -> None:
    """Flush a folder and everything in it to the disk."""
    for entry in (*folder.rglob("*"), folder):
        sync(entry)
