"""The shell side of every recipe: settings in, one clear line out where something is wrong.

Nothing here loads torch before the settings are read, so that `--help` and a wrong setting answer at once.
"""

import difflib
import io
import json
import os
import signal
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from engine.distributed.torchrun import under_torchrun
from engine.settings.toml import parse

Settings = TypeVar("Settings")

# Packages of the extra `eval`, without which some commands cannot run.
_OF_EVAL = frozenset(("choix", "lm_eval", "openai", "rapidfuzz", "scipy"))

# Seconds that the other ranks leave to rank 0, which mostly has the same to say; torchrun ends them when rank 0 has ended.
PATIENCE = 5.0


def command(settings_class: type[Settings], run: Callable[[Settings], Any], argv: Sequence[str] | None, prog: str) -> None:
    """Parse settings and run. A user's mistake ends with `error: ...` and status 1; a defect keeps its traceback.

    Under torchrun one rank says what all ranks found.
    """
    try:
        settings = _settings(settings_class, argv, prog)
    except BrokenPipeError:
        _end_unread()
    from engine.distributed.ranks import leave
    from engine.environment import DeviceError

    try:
        run(settings)
        leave()
    except BrokenPipeError:
        _end_unread()
    except (ValueError, OSError, FloatingPointError, MemoryError, DeviceError) as error:
        # A library's own error class was not written for our user.
        if type(error).__module__ not in ("builtins", DeviceError.__module__):
            raise
        rank = os.environ.get("RANK", "0")
        _end(f"error: {error}" if rank == "0" else f"error on rank {rank}: {error}", 1)
    except ModuleNotFoundError as error:
        # A missing module of our own is a defect.
        package = (error.name or "").partition(".")[0]
        if package not in _OF_EVAL:
            raise
        _end(f"error: {package} is not installed: this command needs the extra eval, pip install 'komainu[eval]'", 1)
    except SystemExit:
        # A stop by SIGTERM reaches all ranks at the same step, so they leave the process group together.
        leave()
        raise
    except KeyboardInterrupt:
        print("stopped; everything that was complete is kept", file=sys.stderr)
        raise SystemExit(130) from None


def commands(
    parts: Mapping[str, tuple[type, Callable[[Any], Any]]],  # a part's name -> its settings and its function
    argv: Sequence[str] | None,
    prog: str,
    description: str,
) -> None:
    """A recipe of several parts: the first argument names the part, the others are the part's own, as `command` reads them."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    name = arguments[0] if arguments else "--help"
    if name in ("--help", "-h"):
        print(f"{' '.join(description.split())}\n")
        print("\n".join(f"  {prog} {part} --help" for part in parts))
        if not arguments:
            raise SystemExit(f"error: name one of {', '.join(parts)}")
        return
    if name not in parts:
        nearest = difflib.get_close_matches(name, parts, n=1, cutoff=0.0)[0]
        raise SystemExit(f"error: {name!r} is not a part of {prog}; the nearest one is {nearest!r} (of {', '.join(parts)})")
    settings_class, run = parts[name]
    command(settings_class, run, arguments[1:], f"{prog} {name}")


def with_first(argv: Sequence[str] | None, name: str) -> list[str]:
    """A command's arguments, whose first one may lack its option's name."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments and not arguments[0].startswith("-") and not arguments[0].endswith(".toml"):
        return [f"--{name}", *arguments]
    return arguments


def with_name(argv: Sequence[str] | None, names: Mapping[str, str]) -> list[str]:
    """A command's arguments, in which the one after a part may lack its option's name. names: a part -> that option."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] not in names:
        return arguments
    return [arguments[0], *with_first(arguments[1:], names[arguments[0]])]


def _settings(settings_class: type[Settings], argv: Sequence[str] | None, prog: str) -> Settings:
    if not under_torchrun():
        return parse(settings_class, argv, prog=prog)
    out, err = io.StringIO(), io.StringIO()
    try:
        with redirect_stdout(out), redirect_stderr(err):
            return parse(settings_class, argv, prog=prog)
    except SystemExit as ended:
        if ended.code:
            _end(*((ended.code, 1) if isinstance(ended.code, str) else (err.getvalue().rstrip(), ended.code)))
        if os.environ.get("RANK") == "0":
            print(out.getvalue(), end="")
        raise


def _end_unread() -> NoReturn:
    """End quietly where the reader of the output has gone, as in `... --help | head`."""
    # Python flushes standard output when it ends, and would complain once more.
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    raise SystemExit(128 + signal.SIGPIPE) from None


def _end(said: str, status: int) -> NoReturn:
    """End this process with a message.

    torchrun repeats the message at the end of its own traceback: it reads the file that TORCHELASTIC_ERROR_FILE names.
    Source: torch.distributed.elastic.multiprocessing.errors.
    """
    if not under_torchrun():
        raise SystemExit(said) from None
    if os.environ.get("RANK") != "0":
        # A run's own handler would note the signal and wait on.
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        time.sleep(PATIENCE)
    if file := os.environ.get("TORCHELASTIC_ERROR_FILE"):
        stamp = {"timestamp": str(int(time.time()))}
        Path(file).write_text(json.dumps({"message": {"message": said, "extraInfo": stamp}}), encoding="utf-8")
    print(said, file=sys.stderr, flush=True)
    raise SystemExit(status) from None
