"""How a recipe is called from a shell: settings in, one clear line out when something is wrong."""

import sys
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from engine.config import parse

Settings = TypeVar("Settings")


def command(settings_class: type[Settings], run: Callable[[Settings], Any], argv: Sequence[str] | None, prog: str) -> None:
    """Parse settings and run. What the user can mend ends with `error: ...` and status 1; a defect keeps its traceback."""
    settings = parse(settings_class, argv, prog=prog)
    try:
        run(settings)
    except (ValueError, OSError, RuntimeError, FloatingPointError) as error:
        if type(error).__module__ != "builtins":
            raise
        raise SystemExit(f"error: {error}") from None
    except KeyboardInterrupt:
        print("stopped; what was complete before is kept", file=sys.stderr)
        raise SystemExit(130) from None
