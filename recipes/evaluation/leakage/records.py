"""Answers to look at for leakage, read from files, and what was found in them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine.data.sources import RECORD_SUFFIXES, SourceFile, find_sources
from model.vocabulary.chat import Message
from recipes.evaluation.statistics import Interval, bootstrap_mean, wilson


@dataclass(frozen=True)
class Answered:
    """An answer to a conversation. number: from 1, over all files. fields: the whole record."""

    number: int
    place: str
    messages: list[Message]
    response: str
    fields: Mapping[str, Any]

    @property
    def prompt(self) -> str:
        """The conversation as one text, which names its cluster."""
        return "\n".join(message["content"] for message in self.messages)


def read_answers(path: str, *, prompts: bool = False) -> list[Answered]:
    """The answers of a file, or of a folder's files. In a folder, files whose first record holds no answer are passed over.

    An answer is `response`, or else the last message, of the assistant. prompts: the answer may be absent, and is "" then.
    Raises: FileNotFoundError; ValueError naming file and line of a record that is no answer, or a folder without one.
    """
    folder = Path(path).is_dir()
    answers: list[Answered] = []
    for source in find_sources([path], RECORD_SUFFIXES):
        assert isinstance(source, SourceFile)
        if folder and not _holds_answers(source):
            continue
        for record in source.records("line"):
            answers.append(_read(record.value, len(answers) + 1, record.place, prompts))
    if not answers:
        raise ValueError(f"{path}: no file of records with 'messages' and 'response' in this folder: name such a file")
    return answers


def _holds_answers(source: SourceFile) -> bool:
    try:
        first = next(source.records("line"), None)
        return first is not None and _read(first.value, 1, "") is not None
    except ValueError:
        return False


def _read(value: Any, number: int, place: str, prompts: bool = False) -> Answered:
    messages = value.get("messages") if isinstance(value, Mapping) else None
    if not isinstance(messages, list) or not all(_is_message(message) for message in messages):
        raise ValueError(
            f"{place}: not an answer: must be an object with 'messages' (a list of {{role, content}}) and 'response'"
        )
    response = value.get("response")
    if response is None and messages and messages[-1]["role"] == "assistant":
        *messages, last = messages
        response = last["content"]
    if response is None and prompts:
        response = ""
    if not isinstance(response, str):
        raise ValueError(f"{place}: 'response' must be a text, is {type(response).__name__}")
    return Answered(number, place, messages, response, value)


def _is_message(message: Any) -> bool:
    return isinstance(message, Mapping) and all(isinstance(message.get(name), str) for name in ("role", "content"))


@dataclass(frozen=True)
class Rate:
    """How many answers leak. Where prompts have several answers, the interval is of clusters by prompt; else Wilson's."""

    leaks: int
    answers: int
    interval: Interval

    @property
    def share(self) -> float:
        return self.leaks / self.answers


def rate(leaks: Sequence[bool], prompts: Sequence[str]) -> Rate:
    """The rate of leaks, with a 95 % interval. Raises: ValueError without answers."""
    together = len(set(prompts)) < len(prompts)
    interval = bootstrap_mean([float(leak) for leak in leaks], prompts) if together else wilson(sum(leaks), len(leaks))
    return Rate(sum(leaks), len(leaks), interval)


def rates_by(
    answers: Sequence[Answered], leaks: Sequence[bool], names: Sequence[str]
) -> Iterator[tuple[tuple[str, ...], Rate]]:
    """The rate in each group of answers with the same values of the fields `names`, in the values' order."""
    groups: dict[tuple[Any, ...], list[int]] = {}
    for place, answer in enumerate(answers):
        for name in names:
            if name not in answer.fields:
                raise ValueError(f"{answer.place}: no field '{name}' to group by; the record has {', '.join(answer.fields)}")
        groups.setdefault(tuple(answer.fields[name] for name in names), []).append(place)
    for key in sorted(groups, key=lambda values: [(isinstance(value, str), value) for value in values]):
        places = groups[key]
        yield tuple(map(str, key)), rate([leaks[place] for place in places], [answers[place].prompt for place in places])
