"""The lines of a conversation at a terminal: questions with their history, and commands that change it in place."""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import locale
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol

from model.sampling import Sampling
from model.vocabulary.chat import Message

HISTORY = "~/.local/state/komainu/chat_history"
_KEPT_LINES = 1000
_HELP = """\
/set              the sampler's settings
/set NAME VALUE   change some of them: /set temperature 0.7 top_p 0.9
/system           the system message
/system TEXT      another system message, from the next answer on; /system - removes it
/again            another answer to the last question
/undo             forget the last question and its answer
/reset            forget the conversation; the system message stays
/quit             end, as Ctrl-D does
//TEXT            a question that begins with a slash"""


class Speaker(Protocol):
    """Answers on standard output; `recipes.chat.Speaker`."""

    sampling: Sampling

    def converse(self, history: list[Message], question: str) -> None: ...

    def complete(self, text: str) -> None: ...


class Conversation:
    """What was said so far, and what a line of the user does."""

    def __init__(self, speaker: Speaker, system: str | None = None, *, completion: bool = False) -> None:
        self.speaker, self.completion = speaker, completion
        self.messages: list[Message] = []
        self._last_question: str | None = None
        if system is not None:
            self._set_system(system)

    def ask(self, text: str) -> None:
        """Answer a question, or continue a text. Raises: ValueError where the model cannot take it."""
        if self.completion:
            self.speaker.complete(text)
        else:
            self.speaker.converse(self.messages, text)

    def take(self, line: str) -> bool:
        """Obey a command, or answer a question. Returns: False where the conversation ends.

        Raises: ValueError for an unknown command or a wrong value, after which nothing has changed; also as `ask` does.
        """
        if not line.startswith("/") or line.startswith("//"):
            self._last_question = line[1:] if line.startswith("//") else line
            self.ask(self._last_question)
            return True
        name, _, rest = line.strip().partition(" ")
        if name in ("/quit", "/exit"):
            return False
        commands = self._commands()
        if name not in commands:
            nearest = difflib.get_close_matches(name, commands, n=1, cutoff=0.0)[0]
            raise ValueError(f"{name} is no command here; the nearest one is {nearest} (/help lists all, // begins a question)")
        commands[name](rest.strip())
        return True

    def _commands(self) -> dict[str, Callable[[str], None]]:
        of_all = {"/help": lambda _: self._help(), "/set": self._set, "/again": lambda _: self._again()}
        if self.completion:
            return of_all
        of_talk = {"/system": self._system, "/undo": lambda _: self._undo(), "/reset": lambda _: self._reset()}
        return {**of_all, **of_talk}

    def _help(self) -> None:
        known = (*self._commands(), "/quit", "//TEXT")
        for line in _HELP.splitlines():
            if line.split()[0] in known:
                print(line, file=sys.stderr)

    def _set(self, rest: str) -> None:
        words = rest.replace("=", " ").split()
        if len(words) % 2:
            raise ValueError(f"/set takes names and values in turn, as in /set temperature 0.7; {words[-1]!r} stands alone")
        names = [name.replace("-", "_") for name in words[::2]]
        changes: dict[str, Any] = {name: _sampling_value(name, value) for name, value in zip(names, words[1::2], strict=True)}
        self.speaker.sampling = dataclasses.replace(self.speaker.sampling, **changes)
        remark(", ".join(f"{name} {value:g}" for name, value in dataclasses.asdict(self.speaker.sampling).items()))

    def _system(self, rest: str) -> None:
        if rest:
            self._set_system("" if rest == "-" else rest)
        head = self._head()
        remark(f"system message: {head[0]['content']}" if head else "no system message")

    def _set_system(self, text: str) -> None:
        head = [Message(role="system", content=text)] if text else []
        self.messages = head + self.messages[len(self._head()) :]

    def _head(self) -> list[Message]:
        return [message for message in self.messages[:1] if message["role"] == "system"]

    def _undo(self) -> None:
        said = self.messages[len(self._head()) :]
        if not said:
            raise ValueError("nothing was said yet")
        self.messages = self._head() + said[:-2]
        remark(f"forgotten: {said[-2]['content']!r:.60} and its answer")

    def _reset(self) -> None:
        self.messages = self._head()
        remark("the conversation begins anew")

    def _again(self) -> None:
        if self._last_question is None:
            raise ValueError("there is no question yet")
        answered = self.messages[-2:-1]
        if answered and answered[0]["content"] == self._last_question:
            self.messages = self.messages[:-2]
        self.ask(self._last_question)


def _sampling_value(name: str, text: str) -> float:
    """A sampler's value. Raises: ValueError for an unknown name or a text that is no such number."""
    kinds = {name: type(value) for name, value in dataclasses.asdict(Sampling()).items()}
    if name not in kinds:
        nearest = difflib.get_close_matches(name, kinds, n=1, cutoff=0.0)[0]
        raise ValueError(f"{name} is no setting of the sampler; the nearest one is {nearest} (of {', '.join(kinds)})")
    try:
        return int(text) if kinds[name] is int else float(text)
    except ValueError:
        what = "a whole number" if kinds[name] is int else "a number"
        raise ValueError(f"{name} takes {what}, not {text!r}") from None


def questions(history: str = "") -> Iterator[str]:
    """The non-blank lines of standard input, until its end or Ctrl-C. At a terminal the file `history` keeps them."""
    asks = sys.stdin.isatty()
    editor = _line_editor() if asks else None
    with _kept(editor, Path(history).expanduser()) if editor and history else contextlib.nullcontext():
        while True:
            try:
                line = input("> " if asks else "")
            except (EOFError, KeyboardInterrupt):
                if asks:
                    print()
                return
            if line.strip():
                yield line


def _line_editor() -> ModuleType | None:
    """readline, whose import gives input() line editing and a history; None for a Python without it.

    The editor takes the locale from the environment at each line. Where that knows bytes only (LC_ALL=C), a backspace would
    halve a Japanese character.
    """
    if locale.nl_langinfo(locale.CODESET) != "UTF-8":
        os.environ["LC_ALL"] = "C.UTF-8"
    try:
        import readline
    except ImportError:
        return None
    return readline


@contextlib.contextmanager
def _kept(editor: ModuleType, file: Path) -> Iterator[None]:
    """Read the history at the beginning and write it at the end, for this user's eyes alone. A failure is a remark."""
    with _remarked(file):
        if file.exists():
            editor.read_history_file(file)
    try:
        yield
    finally:
        with _remarked(file):
            file.parent.mkdir(parents=True, exist_ok=True)
            os.close(os.open(file, os.O_CREAT | os.O_WRONLY, 0o600))
            editor.set_history_length(_KEPT_LINES)
            editor.write_history_file(file)


@contextlib.contextmanager
def _remarked(file: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        remark(f"the history of questions in {file}: {error.strerror or error}; --history names another file")


def remark(text: str) -> None:
    """Print a remark of the program, apart from the model's answers."""
    print(f"[{text}]", file=sys.stderr, flush=True)
