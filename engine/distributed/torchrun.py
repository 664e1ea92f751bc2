"""torchrun as its workers see it: whether it started this process, and how long it waits after SIGTERM before it kills.

Loads without torch, as recipes ask before their command line is read.
"""

import inspect
import os
from pathlib import Path

# torchrun's own default, in seconds.
_SHUTDOWN_TIMEOUT = 30.0


def under_torchrun() -> bool:
    """Whether torchrun started this process."""
    return "TORCHELASTIC_RUN_ID" in os.environ


def shutdown_timeout() -> float | None:
    """Seconds that torchrun gives its workers after SIGTERM; None without torchrun."""
    if not under_torchrun():
        return None
    arguments = _command_line(os.getppid())
    for option, following in zip(arguments, [*arguments[1:], ""], strict=False):
        name, _, value = option.partition("=")
        if name.replace("_", "-") == "--shutdown-timeout":
            return _number(value or following)
    return _number(os.environ.get("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", ""))


def shutdown_warning(
    seconds: float,  # that saving takes
    source: str,  # where the figure comes from
) -> str | None:
    """One line where torchrun would kill the run before a checkpoint is written, else None."""
    limit = shutdown_timeout()
    if limit is None or seconds <= limit:
        return None
    import torch
    from torch.distributed.launcher.api import LaunchConfig

    needed = max(600, 60 * -(-int(2 * seconds) // 60))
    known = "shutdown_timeout" in inspect.signature(LaunchConfig).parameters
    remedy = (
        f"start torchrun with --shutdown-timeout {needed}"
        if known
        else f"torch {torch.__version__}'s torchrun cannot wait longer: set checkpoint_minutes to what you can lose"
    )
    return (
        f"warning    torchrun kills its workers {limit:.0f} s after SIGTERM, saving takes {seconds:.0f} s ({source}): a run "
        f"that is told to stop would lose its last steps; {remedy}"
    )


def _command_line(process: int) -> list[str]:
    try:
        return Path(f"/proc/{process}/cmdline").read_bytes().decode(errors="replace").split("\0")
    except OSError:
        return []


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return _SHUTDOWN_TIMEOUT
