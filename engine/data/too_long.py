"""Documents longer than a limit: skipped, cut or split."""

from collections.abc import Callable, Sequence
from typing import Literal

from engine.data.records import Turn

TooLong = Literal["skip", "cut", "split"]
WAYS = ("skip", "cut", "split")


def parts_of_text(ids: list[int], limit: int, way: TooLong) -> list[list[int]]:
    """The documents of at most `limit` tokens that become of a longer one; none where it is skipped.

    ids: the whole document. Each later part of a split begins with the first token (`<s>`) again: nothing predicts a document's
    first token, so that every token but the `<s>` is predicted once. A document that was cut has no `</s>`.
    """
    if way == "skip":
        return []
    if way == "cut":
        return [ids[:limit]]
    later = [[ids[0], *ids[start : start + limit - 1]] for start in range(limit, len(ids), limit - 1)]
    return [ids[:limit], *later]


def parts_of_conversation(
    turns: Sequence[Turn],
    length: Callable[[list[Turn]], int],  # tokens of a conversation
    limit: int,
    way: TooLong,
) -> list[list[Turn]]:
    """The conversations that become of one of more than `limit` tokens: whole exchanges, each part behind the system message.

    cut: the exchanges at the beginning that fit. split: all of them, as many in a part as fit. An exchange that is too long by
    itself is a part of its own, whose end the caller cuts. skip: none.
    """
    if way == "skip":
        return []
    head = [turn for turn in turns[:1] if turn["role"] == "system"]
    said = list(turns[len(head) :])
    exchanges = [said[place : place + 2] for place in range(0, len(said), 2)]
    parts: list[list[Turn]] = []
    while exchanges:
        part = [*head, *exchanges.pop(0)]
        while exchanges and length([*part, *exchanges[0]]) <= limit:
            part += exchanges.pop(0)
        parts.append(part)
        if way == "cut":
            break
    return [part for part in parts if any(turn["role"] == "assistant" and turn.get("train", True) for turn in part)]
