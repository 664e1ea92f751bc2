"""The texts of a record that people read: taken out, and put back changed, in whatever form the record has.

`engine.data.records` reads the meaning of many forms; here a record keeps its form: names of fields, JSON inside a text, parts
of a turn, transcripts, and every field that holds no text of the conversation.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

from engine.data.records import (
    CONTEXTS,
    QUESTIONS,
    ROLES,
    SYSTEMS,
    Unusable,
    decoded_json,
    listed_field,
    read_conversation,
    read_pair,
)

Kind = Literal["conversations", "preferences"]
_SPEAKERS = re.compile(r"((?:\A\s*|\n\n)(?:Human|Assistant):\s*)")


class Text(NamedTuple):
    """A text and who says it: system, user or assistant."""

    role: str
    text: str


# What becomes of a text.
Change = Callable[[Text], str]


def read_texts(value: Any, kind: Kind) -> list[Text]:
    """The different texts of a record, in the order of the conversation; a text that stands in several fields comes once.

    Raises: Unusable where `recipes.prepare` would not read the record.
    """
    if kind == "conversations":
        read_conversation(value)
    else:
        read_pair(value)
    found: dict[Text, None] = {}

    def note(text: Text) -> str:
        found.setdefault(text)
        return text.text

    _changed(value, kind, note)
    return [text for text in found if text.text.strip()]


def with_texts(value: Mapping[str, Any], kind: Kind, texts: Mapping[Text, str]) -> dict[str, Any]:
    """The record with other texts in the places of its own; those that `texts` lacks stay.

    Raises: Unusable where the new texts would give the record another form, such as an answer that begins with "Human:".
    """
    changed = _changed(value, kind, lambda text: texts.get(text, text.text))
    if _shape(changed, kind) != _shape(value, kind):
        raise Unusable("another form", "the new texts change how the record is read")
    return changed


def _shape(value: Any, kind: Kind) -> list[str]:
    turns = read_conversation(value) if kind == "conversations" else read_pair(value).prompt
    return [turn["role"] for turn in turns]


def _changed(value: Mapping[str, Any], kind: Kind, change: Change) -> dict[str, Any]:
    changed: dict[str, Any] = {}
    for name in SYSTEMS:
        if isinstance(value.get(name), str):
            changed[name] = change(Text("system", value[name]))
    listed = listed_field(value)
    asked = next((name for name in QUESTIONS if value.get(name) is not None), None)
    if asked is not None and (listed is None or kind == "preferences"):
        if value.get("history"):
            changed["history"] = _history(value["history"], change)
        changed[asked] = _turns(value[asked], "user", change)
        for name in CONTEXTS:
            if isinstance(value.get(name), str):
                changed[name] = change(Text("user", value[name]))
        answers = QUESTIONS[asked] if kind == "conversations" else ()
        for name in answers:
            if value.get(name) is not None:
                changed[name] = _turns(value[name], "assistant", change)
    if listed is not None:
        changed[listed] = _turns(value[listed], "", change)
    if kind == "preferences":
        for name in ("chosen", "rejected"):
            changed[name] = _turns(value[name], "assistant", change)
    # The fields keep their order.
    return {**value, **changed}


def _history(value: Any, change: Change) -> Any:
    opened = decoded_json(value)
    if opened is not value:
        return _as_json(_history(opened, change))
    if isinstance(value[0], Mapping):
        return _turns(value, "", change)
    return [[change(Text(role, text)) for role, text in zip(("user", "assistant"), pair, strict=True)] for pair in value]


def _turns(value: Any, role: str, change: Change) -> Any:
    """A text, or messages in a list, a table of lists, or JSON of them."""
    opened = decoded_json(value, turns=bool(role))
    if isinstance(value, str):
        return _said(value, role, change) if opened is value else _as_json(_turns(opened, role, change))
    if isinstance(value, Mapping):
        if not all(isinstance(column, list) for column in value.values()):
            return _turn(value, change)
        rows = [_turn(dict(zip(value, row, strict=True)), change) for row in zip(*value.values(), strict=True)]
        return {name: [row[name] for row in rows] for name in value}
    return [_turn(turn, change) for turn in value]


def _turn(turn: Mapping[str, Any], change: Change) -> dict[str, Any]:
    role = ROLES[(turn.get("role") or turn.get("from") or "").lower()]
    return {
        **turn,
        **{name: _content(turn[name], role, change) for name in ("content", "value") if turn.get(name) is not None},
    }


def _content(value: Any, role: str, change: Change) -> Any:
    if isinstance(value, str):
        return change(Text(role, value))
    parts: list[Any] = []
    for part in value:
        said = change(Text(role, part if isinstance(part, str) else part["text"]))
        parts.append(said if isinstance(part, str) else {**part, "text": said})
    return parts


def _said(text: str, role: str, change: Change) -> str:
    """A text; or a transcript, whose speakers' names stay."""
    if not text.lstrip().startswith("Human:"):
        return change(Text(role, text))
    parts = _SPEAKERS.split(text)
    turns = zip(parts[1::2], parts[2::2], strict=True)
    return parts[0] + "".join(mark + change(Text("user" if "Human" in mark else "assistant", said)) for mark, said in turns)


def _as_json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)
