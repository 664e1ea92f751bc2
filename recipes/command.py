"""The shell side of every recipe: settings in, one clear line out where something is wrong."""

import os
import sys
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from engine.distributed.ranks import leave
from engine.environment import DeviceError
from engine.settings.toml import parse

Settings = TypeVar("Settings")


def command(settings_class: type[Settings], run: Callable[[Settings], Any], argv: Sequence[str] | None, prog: str) -> None:
    """Parse settings and run. A user's mistake ends with `error: ...` and status 1; a defect keeps its traceback."""
    settings = parse(settings_class, argv, prog=prog)
    try:
        run(settings)
        leave()
    except (ValueError, OSError, FloatingPointError, DeviceError) as error:
        # A library's own error class was not written for our user.
        if type(error).__module__ not in ("builtins", DeviceError.__module__):
            raise
        rank = os.environ.get("RANK", "0")
        raise SystemExit(f"error: {error}" if rank == "0" else f"error on rank {rank}: {error}") from None
    except SystemExit:
        # A stop by SIGTERM reaches all ranks at the same step, so they leave the process group together.
        leave()
        raise
    except KeyboardInterrupt:
        print("stopped; everything that was complete is kept", file=sys.stderr)
        raise SystemExit(130) from None
