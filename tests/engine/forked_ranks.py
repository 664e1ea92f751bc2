"""Not a test: ranks of a run on this machine, forked from a process that has imported torch, as imports are dear."""

import os
import socket
import sys
import traceback
from collections.abc import Callable


def fork_ranks(ranks: int, body: Callable[[int], int | None]) -> list[int]:
    """Process ids of as many ranks, each of which calls `body` with its number and has its environment as torchrun would have
    set it. Exit code of a rank: what the body returns, 0 for None, 1 where it raises, which is printed."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
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
    # Nothing of what the forking process would do at its end.
    os._exit(code)


def end_of(children: list[int]) -> list[int]:
    """Exit codes of processes, negative for the signal that ended one."""
    return [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
