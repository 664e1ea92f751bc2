"""Not a test: forks the ranks of a run from a process that has imported torch, because importing torch is slow."""

import gc
import os
import sys
import traceback
from collections.abc import Callable

from tests.ports import free_port


def spare_forks_the_garbage() -> None:
    """Let garbage collections in forks pass over the objects that torch has made so far, which would take half a second."""
    gc.collect()
    gc.freeze()


def fork_ranks(ranks: int, body: Callable[[int], int | None]) -> list[int]:
    """Fork `ranks` processes, set the environment that torchrun sets, and call `body` with the rank in each.

    A process exits with what the body returns (0 for None), or prints the traceback and exits with 1.
    Returns: the process ids.
    """
    port = free_port()
    return [_fork(rank, ranks, port, body) for rank in range(ranks)]


def _fork(rank: int, ranks: int, port: int, body: Callable[[int], int | None]) -> int:
    child = os.fork()
    if child:
        return child
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(ranks), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    code = 1
    try:
        code = body(rank) or 0
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    # Skip everything that the parent process would do at its end.
    os._exit(code)


def end_of(children: list[int]) -> list[int]:
    """Wait for processes. Returns their exit codes, negative for the signal that ended one."""
    return [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
