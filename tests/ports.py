"""Not a test: ports for servers that tests start."""

import random
import socket

# Below the range from which systems draw ports for outgoing connections, one of which could take a port before its server does.
_PORTS = range(15_000, 32_000)


def free_port() -> int:
    """A port of this machine that nothing listens on."""
    # Not the global generator: hypothesis seeds it, and two processes of tests would draw the same ports.
    for port in random.SystemRandom().sample(_PORTS, 100):
        try:
            with socket.create_server(("127.0.0.1", port)):
                return port
        except OSError:
            continue
    raise OSError(f"no free port among 100 of {_PORTS.start} to {_PORTS.stop}")
