"""How a benchmark is called from a shell: as a recipe is, but its result keeps the command, and a stop ends what it started."""

import shlex
import signal
import sys
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from recipes.command import command

Settings = TypeVar("Settings")


def benchmark(
    settings_class: type[Settings], run: Callable[[Settings, str], Any], argv: Sequence[str] | None, name: str
) -> None:
    """Parse settings and call run(settings, the command that makes the result again). name: the benchmark's module."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    program = f"python -m benchmarks.{name}"
    text = shlex.join([*program.split(), *arguments])
    # A command that is stopped ends its candidates, too.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    command(settings_class, lambda settings: run(settings, text), arguments, program)
