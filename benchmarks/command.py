"""A benchmark as a command: settings in, one clear line out when they are wrong."""

import shlex
import signal
import sys
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from recipes.command import command

Settings = TypeVar("Settings")


def benchmark(
    settings_class: type[Settings],
    run: Callable[[Settings, str], Any],  # (settings, the command that makes the result again)
    name: str,  # of the benchmark's module
    argv: Sequence[str] | None = None,
) -> None:
    """Parse settings and run the benchmark."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    program = f"python -m benchmarks.{name}"
    text = shlex.join([*program.split(), *arguments])
    # SIGTERM unwinds the stack, so that the processes that were started end too.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    command(settings_class, lambda settings: run(settings, text), arguments, program)


def check_least(settings: Any, **least: float) -> None:
    """Check numbers, or each number of a tuple. Raises: ValueError naming a setting that is below its least value."""
    for name, bound in least.items():
        value = getattr(settings, name)
        if any(number < bound for number in (value if isinstance(value, tuple) else (value,))):
            raise ValueError(f"{name} = {value}: must be at least {bound}")


def check_names(setting: str, names: Sequence[str], known: Sequence[str]) -> None:
    """Check names. Raises: ValueError with the unknown name and all known names."""
    for name in names:
        if name not in known:
            raise ValueError(f"{setting}: unknown {name!r}; choose from {', '.join(known)}")
