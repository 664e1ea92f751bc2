"""Answers to look at for leakage, read from files, and what was found in them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from engine.data.records import Unusable, read_conversation
from engine.data.sources import RECORD_SUFFIXES, SourceFile, find_sources
from model.vocabulary.chat import Message
from recipes.evaluation.statistics import Interval, wilson


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

    An answer is `response`, or else the last message where that is the assistant's. prompts: it may be absent, and is "" then.
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
    messages, response = (value.get("messages"), value.get("response")) if isinstance(value, Mapping) else (None, None)
    if not isinstance(messages, list) or not all(_is_message(message) for message in messages):
        try:
            messages = [Message(role=turn["role"], content=turn["content"]) for turn in read_conversation(value)]
        except Unusable as reason:
            raise ValueError(
                f"{place}: not an answer: needs 'messages' (a list of {{role, content}}) and 'response', or a conversation as "
                f"recipes.prepare reads it ({reason})"
            ) from None
        response = None
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
    """How many answers leak, with a 95 % interval."""

    leaks: int
    answers: int
    interval: Interval

    @property
    def share(self) -> float:
        return self.leaks / self.answers


def rate(leaks: Sequence[bool], prompts: Sequence[str]) -> Rate:
    """The rate of leaks. Answers to one prompt belong together.

    Wilson's interval, which has a width for 0 leaks too, of as many answers as would vary so much if they were independent
    (Kish's effective size); without leaks, of as many as there are prompts.
    Raises: ValueError without answers.
    """
    leak_N = np.asarray(leaks, dtype=float)
    _, group_N = np.unique(np.asarray(prompts), return_inverse=True)
    groups = int(group_N.max()) + 1 if len(group_N) else 0
    share = float(leak_N.mean()) if len(leak_N) else 0.0
    residual_G = np.bincount(group_N, leak_N - share, groups)
    variance = groups / max(1, groups - 1) * float(residual_G @ residual_G) / max(1, len(leak_N)) ** 2
    effective = share * (1 - share) / variance if variance > 0 else groups
    effective = min(len(leak_N), max(1.0, effective))
    return Rate(sum(leaks), len(leaks), wilson(share * effective, effective))


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
