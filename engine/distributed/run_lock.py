"""A run folder's lock that also holds between machines: a file with host, process and a time that is refreshed.

File systems that machines share often keep flock's locks on each machine alone. The file `.lock` names its holder. A holder
that lives refreshes it; whoever finds a file that is not refreshed takes it over. Nobody compares the clocks of two machines.
"""

import json
import os
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from model.folder import sole_writer, write_file

# Seconds between refreshes, and until a lock that is not refreshed counts as abandoned.
REFRESH, ABANDONED = 10.0, 30.0
NAME = ".lock"


@contextmanager
def run_lock(out: Path) -> Iterator[None]:
    """Hold an existing run folder. Raises: BlockingIOError naming the holder where another process holds it."""
    lock, me = out / NAME, {"host": socket.gethostname(), "process": os.getpid()}
    with sole_writer(out, out) as locked:
        _take(lock, me, locked)
        ended = threading.Event()
        thread = threading.Thread(target=_refresh, args=(lock, me, ended), name="run lock", daemon=True)
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join()
            if _holder(lock) == me:
                with suppress(OSError):
                    lock.unlink()


def _take(lock: Path, me: dict[str, object], locked: bool) -> None:
    """Wait until the file's holder shows that it lives or is gone, then write our own."""
    holder, seen = _holder(lock), _read(lock)
    if holder is not None and holder != me and not _is_dead(holder, me, locked):
        print(f"{lock}: {_named(holder)} held this folder; waiting {ABANDONED:.0f} s for a sign of life")
        end = time.monotonic() + ABANDONED
        while time.monotonic() < end:
            time.sleep(min(1.0, ABANDONED / 10))
            now = _read(lock)
            if now and now != seen:
                raise BlockingIOError(
                    f"{lock.parent}: {_named(_holder(lock) or holder)} is writing it now; wait for it or choose another out"
                )
            if not now:
                break
    _write(lock, me)


def _is_dead(holder: dict[str, object], me: dict[str, object], locked: bool) -> bool:
    """Whether a holder on this machine is gone: it would hold flock's lock, or its process ended."""
    if holder["host"] != me["host"]:
        return False
    if locked:
        return True
    try:
        os.kill(int(str(holder["process"])), 0)
    except ProcessLookupError:
        return True
    except (OSError, ValueError):
        pass
    return False


def _refresh(lock: Path, me: dict[str, object], ended: threading.Event) -> None:
    while not ended.wait(REFRESH):
        try:
            _write(lock, me)
        except OSError:
            # A full disk has no room for a new file, but the old file can be overwritten by as many bytes.
            with suppress(OSError), lock.open("r+", encoding="utf-8") as file:
                file.write(_content(me))


def _write(lock: Path, me: dict[str, object]) -> None:
    write_file(lock, _content(me))


def _content(me: dict[str, object]) -> str:
    """The file's text, always of the same length."""
    return json.dumps({**me, "time": f"{time.time():.3f}"}) + "\n"


def _read(lock: Path) -> str:
    try:
        return lock.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return ""


def _holder(lock: Path) -> dict[str, object] | None:
    """Host and process in the file; None where there is no file, or none of ours."""
    try:
        table = json.loads(_read(lock))
        return {"host": table["host"], "process": table["process"]}
    except (ValueError, KeyError, TypeError):
        return None


def _named(holder: dict[str, object]) -> str:
    return f"process {holder['process']} on {holder['host']}"
