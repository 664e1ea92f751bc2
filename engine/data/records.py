"""Reads records: a text, a conversation or a preference pair, or the reason why a record cannot be used.

People keep conversations under many names; the tables below hold the names that are read. A field that changes a record's
meaning is honoured, or the record is skipped and counted: nothing of the kind is passed over silently.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from model.vocabulary.chat import Message

# Raise this when an equal record gives other turns than before: a dataset prepared earlier then no longer counts as the same.
READING = 3
ROLES = {
    **dict.fromkeys(("system", "developer"), "system"),
    **dict.fromkeys(("user", "human", "prompter"), "user"),
    **dict.fromkeys(("assistant", "gpt", "chatgpt"), "assistant"),
}
CONVERSATIONS = ("messages", "conversations", "conversation")
# A question's field, and the fields that may hold its answer.
QUESTIONS = {
    "prompt": ("completion", "response"),
    "instruction": ("output", "response"),
    "question": ("answer", "response"),
    "query": ("response",),
}
CONTEXTS = ("input", "context")
SYSTEMS = ("system", "system_prompt", "system_message")
_WEIGHTS = ("weight", "loss_weight", "train", "training", "trainable", "loss")
_RECORD_WEIGHTS = ("weight", "train")
_MEDIA = dict.fromkeys(("image", "images", "audio", "audios", "video", "videos"), "media beside the text")
# Fields that no chat template of ours can express, and the reason that is counted.
_CALLS = dict.fromkeys(("tool_calls", "function_call", "tool_call_id"), "tool calls")
_IN_RECORD = {**dict.fromkeys(("tools", "functions"), "tools"), "documents": "documents beside the text", **_CALLS, **_MEDIA}
_IN_TURN = {
    **_CALLS,
    **dict.fromkeys(("reasoning_content", "reasoning", "thinking", "thought"), "reasoning beside the text"),
    **dict.fromkeys(("train_detail", "prefix", "mask", "masked", "loss_mask"), "weights within a turn"),
    "refusal": "a refusal beside the text",
    **_MEDIA,
}


class Unusable(Exception):
    """A record that cannot be used. reason: one of few, to be counted. detail: about this record."""

    def __init__(self, reason: str, detail: str):
        super().__init__(f"{reason}: {detail}")
        self.reason = reason
        self.detail = detail


class Turn(Message, total=False):
    """A message. train: False for an answer that is context only; absent otherwise."""

    train: bool


@dataclass(frozen=True)
class Pair:
    """A preference: two conversations that differ only in their last message, the assistant's."""

    prompt: list[Message]
    chosen: str
    rejected: str


def read_text(value: Any, field: str) -> str:
    """The text of a record: the record itself if it is a string, else its `field`. Raises: Unusable."""
    if not isinstance(value, str):
        value = _field(value, field)
    text = _text(value, f"field '{field}'")
    if not text.strip():
        raise Unusable("empty text", "nothing but white space")
    return text


def read_conversation(value: Any) -> list[Turn]:
    """The messages of a record: [system,] user, assistant, ... in strict alternation, at least one assistant turn trained on.

    Formats, tried in this order: a list of turns (`CONVERSATIONS`), each {role, content} or ShareGPT's {from, value}; a
    question and its answer (`QUESTIONS`), with `input` or `context` (may be absent) and earlier exchanges in `history`.
    A field `system` beside either is the system message; an empty one is dropped. An answer of weight 0 is not trained on; a
    record of weight 0, or with `label` false (a bad answer), is unusable.
    Raises: Unusable.
    """
    _check_record(value)
    if value.get("label") is False:
        raise Unusable("labelled as a bad answer", "label = False")
    listed = listed_field(value)
    if listed is not None:
        turns = _turns(value[listed], "", listed)
        if not _empty(value.get("history")):
            raise Unusable("history beside turns", f"both '{listed}' and 'history' hold turns")
        turns = _with_system(value, turns)
    else:
        names = ((question, answer) for question, answers in QUESTIONS.items() for answer in answers)
        found = next((pair for pair in names if all(value.get(name) is not None for name in pair)), None)
        if found is None and any(value.get(name) == [] for name in CONVERSATIONS):
            raise Unusable("no assistant turn", "no messages")
        if found is None:
            known = ", ".join(f"'{question}' and '{answers[0]}'" for question, answers in QUESTIONS.items())
            raise Unusable(
                "no conversation",
                f"none of '{CONVERSATIONS[0]}', '{CONVERSATIONS[1]}', {known} in the fields {_fields(value)}"[:300],
            )
        question, answer = found
        for name in QUESTIONS[question]:
            if value.get(name) not in (None, value[answer]):
                raise Unusable("two answers", f"'{answer}' and '{name}' differ")
        turns = _asked(value, question) + _turns(value[answer], "assistant", answer)
    turns = _check(turns)
    answers = [turn for turn in turns if turn["role"] == "assistant"]
    if not answers:
        raise Unusable("no assistant turn", f"{len(turns)} messages, none of the assistant")
    if not any(turn.get("train", True) for turn in answers):
        raise Unusable("no trained turn", "every assistant turn has a weight of 0")
    return turns


def read_pair(value: Any) -> Pair:
    """The preference pair of a record with a prompt, `chosen` and `rejected`.

    The prompt is one of `QUESTIONS`, a text or messages, with `input`, `history` and `system` as in a conversation; or the
    turns of `CONVERSATIONS`. `chosen` and `rejected` are texts, the last message, or whole conversations, which need no prompt.
    Texts without a prompt may also be transcripts ("Human: ... Assistant: ...").
    Raises: Unusable.
    """
    _check_record(value)
    asked = next((name for name in QUESTIONS if value.get(name) is not None), None)
    given = None if asked is None else _untrained(_asked(value, asked))
    sides: dict[str, list[Turn]] = {}
    transcripts = [given is None and bool(_transcript(value.get(side))) for side in ("chosen", "rejected")]
    if any(transcripts) and not all(transcripts):
        raise Unusable("sides of different prompts", "one of 'chosen' and 'rejected' is a transcript, the other is none")
    for side in ("chosen", "rejected"):
        turns = _turns(_field(value, side), "assistant", side)
        if given is None and len(turns) == 1:
            turns = _transcript(turns[0]["content"]) or turns
        if not turns or turns[-1]["role"] != "assistant":
            raise Unusable("no assistant turn", f"'{side}' does not end with an assistant message")
        if not turns[-1].get("train", True):
            raise Unusable("answer of weight 0", f"the last turn of '{side}'")
        sides[side] = turns
    contexts = [_untrained(_with_system(value, list(turns[:-1]))) for turns in sides.values() if len(turns) > 1]
    listed = listed_field(value)
    if given is None and not contexts and listed is not None:
        given = _untrained(_with_system(value, _turns(value[listed], "", listed)))
    prompt = contexts[0] if contexts else given
    if prompt is None:
        raise Unusable("no prompt", "neither 'prompt' nor a conversation in 'chosen' and 'rejected'")
    # Beside a prompt that is one text, the conversation may also hold a system message or earlier turns.
    agrees = given in (None, prompt) or (asked is not None and isinstance(value[asked], str) and prompt[-1:] == given[-1:])
    if not agrees or any(context != prompt for context in contexts):
        raise Unusable("sides of different prompts", "'prompt', 'chosen' and 'rejected' disagree before the last answer")
    chosen, rejected = (turns[-1]["content"] for turns in sides.values())
    for side, answer in (("chosen", chosen), ("rejected", rejected)):
        if not answer.strip():
            raise Unusable("empty answer", f"'{side}' is empty")
    if chosen.strip() == rejected.strip():
        raise Unusable("identical chosen and rejected", repr(chosen[:40]))
    checked = _check([Turn(role=turn["role"], content=turn["content"]) for turn in prompt])
    if not checked or checked[-1]["role"] != "user":
        raise Unusable("roles do not alternate", "the prompt does not end with a user message")
    return Pair(_untrained(checked), chosen, rejected)


def said_in(messages: Sequence[Message]) -> str:
    """What user and assistant say, without the system message."""
    return "\n".join(message["content"] for message in messages if message["role"] != "system")


def listed_field(value: Mapping[str, Any]) -> str | None:
    """The field that holds the record's turns; None where there is none."""
    return next((name for name in CONVERSATIONS if not _empty(decoded_json(value.get(name)))), None)


def _untrained(turns: list[Turn]) -> list[Message]:
    """The messages alone: the answers of a prompt are never trained on, whatever their weights."""
    return [Message(role=turn["role"], content=turn["content"]) for turn in turns]


def _check(messages: list[Turn]) -> list[Turn]:
    """The messages without an empty system message. Raises: Unusable where the chat template cannot express them."""
    if messages and messages[0]["role"] == "system" and not messages[0]["content"].strip():
        messages = messages[1:]
    system = bool(messages) and messages[0]["role"] == "system"
    for number, message in enumerate(messages, 1):
        role = message["role"]
        if not message["content"].strip():
            raise Unusable("empty answer" if role == "assistant" else "empty message", f"message {number} ({role})")
        expected = "system" if system and number == 1 else ("user", "assistant")[(number - 1 - system) % 2]
        if role != expected:
            raise Unusable("roles do not alternate", f"message {number} has role {role}, must be {expected}")
    return messages


def _asked(value: Mapping[str, Any], name: str) -> list[Turn]:
    """The turns before an answer: the system message, the history, and the question with its context."""
    turns = _transcript(value[name], prompt=True) or _turns(value[name], "user", name)
    contexts = [(field, _text(value[field], f"field '{field}'")) for field in CONTEXTS if value.get(field) is not None]
    contexts = [(field, text) for field, text in contexts if text.strip()]
    if len(contexts) > 1:
        raise Unusable("two contexts", "both 'input' and 'context' hold text")
    history = _history(value.get("history"))
    if (contexts or history) and [turn["role"] for turn in turns] != ["user"]:
        what = "history" if history else contexts[0][0]
        raise Unusable("history or context beside turns", f"both '{name}' and '{what}' hold turns")
    if contexts:
        texts = [text for text in (turns[0]["content"], contexts[0][1]) if text.strip()]
        turns = [Turn(role="user", content="\n\n".join(texts))]
    return _with_system(value, history + turns)


def _history(value: Any) -> list[Turn]:
    """Earlier exchanges: [[question, answer], ...], or turns."""
    value = decoded_json(value)
    if value is None or value in ("", []):
        return []
    if not isinstance(value, list):
        raise Unusable("history is not a list", f"field 'history' is {_name(value)}")
    if isinstance(value[0], Mapping):
        return _messages(value, "history")
    turns = []
    for number, exchange in enumerate(value, 1):
        if not isinstance(exchange, (list, tuple)) or len(exchange) != 2:
            raise Unusable("no conversation", f"exchange {number} of 'history' is not [question, answer]")
        for role, text in zip(("user", "assistant"), exchange, strict=True):
            turns.append(Turn(role=role, content=_text(text, f"exchange {number} of 'history'")))
    return turns


def _with_system(value: Mapping[str, Any], turns: list[Turn]) -> list[Turn]:
    """The turns behind the record's system message, if it has one of its own."""
    texts = [_text(value[name], f"field '{name}'") for name in SYSTEMS if value.get(name) is not None]
    found = {text for text in texts if text.strip()}
    if turns and turns[0]["role"] == "system" and turns[0]["content"].strip():
        found.add(turns[0]["content"])
    if len(found) > 1:
        raise Unusable("two system messages", f"{len(found)} different ones")
    rest = turns[1:] if turns and turns[0]["role"] == "system" else turns
    return [Turn(role="system", content=text) for text in found] + rest


def _transcript(text: Any, *, prompt: bool = False) -> list[Turn]:
    """The turns of "Human: ... Assistant: ..." as HH-RLHF writes them, empty for other values.

    prompt: the text must end with an empty "Assistant:", for the answer to follow.
    """
    if not isinstance(text, str) or not text.lstrip().startswith("Human:"):
        return []
    _, *parts = re.split(r"\n\n(Human|Assistant):", "\n\n" + text.strip())
    ends_open = parts[-2] == "Assistant" and not parts[-1].strip()
    if len(parts) < 4 or (prompt and not ends_open):
        return []
    text = _text(text, "a transcript")
    roles = {"Human": "user", "Assistant": "assistant"}
    turns = [Turn(role=roles[role], content=said.strip()) for role, said in zip(parts[::2], parts[1::2], strict=True)]
    return turns[:-1] if prompt else turns


def _turns(value: Any, role: str, field: str) -> list[Turn]:
    """Messages from a list, one message, a table of lists, or any of them as JSON; a text becomes one message of `role`."""
    decoded = decoded_json(value, turns=bool(role))
    if isinstance(decoded, Mapping):
        columns = [column for column in decoded.values() if isinstance(column, list)]
        rows = zip(*columns, strict=False) if len({*map(len, columns)}) == 1 and len(columns) == len(decoded) else None
        decoded = [decoded] if rows is None else [dict(zip(decoded, row, strict=True)) for row in rows]
    if isinstance(decoded, list):
        return _messages(decoded, field)
    if not role:
        raise Unusable("no conversation", f"field '{field}' is {_name(value)}, not a list")
    return [Turn(role=role, content=_text(decoded, f"field '{field}'"))]


def _messages(value: list[Any], field: str) -> list[Turn]:
    messages = []
    for number, turn in enumerate(value, 1):
        place = f"turn {number} of '{field}'"
        if not isinstance(turn, Mapping):
            raise Unusable("no conversation", f"{place} is {_name(turn)}, not an object")
        _check_fields(turn, _IN_TURN, f"{place}: ")
        name, content = _one_of(turn, ("role", "from"), place), _one_of(turn, ("content", "value"), place)
        role = ROLES.get(name.lower()) if isinstance(name, str) else None
        if role is None:
            raise Unusable("unknown role", f"{name!r} in {place}; known are {', '.join(ROLES)}")
        message = Turn(role=role, content=_content(content, place))
        if not _trained(turn, role, place) and role == "assistant":
            message["train"] = False
        messages.append(message)
    return messages


def _one_of(turn: Mapping[str, Any], names: tuple[str, str], place: str) -> Any:
    """The value under either name. A key with null counts only where nothing else is there, as in a column of Parquet."""
    present = [name for name in names if name in turn]
    if not present:
        raise Unusable("no conversation", f"{place} lacks '{names[0]}' or '{names[1]}'")
    values = [turn[name] for name in present if turn[name] is not None]
    if len(values) == 2 and values[0] != values[1]:
        raise Unusable("two values for one thing", f"'{names[0]}' and '{names[1]}' of {place} differ")
    return values[0] if values else None


def _trained(turn: Mapping[str, Any], role: str, place: str) -> bool:
    """Whether a turn is trained on, by its weight where it has one."""
    given = {name: turn[name] for name in _WEIGHTS if turn.get(name) is not None}
    for name, weight in given.items():
        if not isinstance(weight, (bool, int, float)) or weight not in (0, 1):
            raise Unusable("weight that is neither 0 nor 1", f"{name} = {weight!r} in {place}")
    if len({bool(weight) for weight in given.values()}) > 1:
        raise Unusable("weights that disagree", f"{', '.join(given)} in {place}")
    trained = all(given.values()) if given else role == "assistant"
    if trained and role != "assistant":
        raise Unusable("weight on a turn that is not the assistant's", f"{', '.join(given)} in {place} ({role})")
    return trained


def _check_record(value: Any) -> None:
    """Check a record's own fields. Raises: Unusable where they change what the record means, or give it a weight of 0."""
    _check_fields(_object(value), _IN_RECORD)
    for name in _RECORD_WEIGHTS:
        weight = value.get(name)
        if weight is not None and (not isinstance(weight, (bool, int, float)) or weight not in (0, 1)):
            raise Unusable("weight that is neither 0 nor 1", f"{name} = {weight!r} of the record")
        if weight is not None and not weight:
            raise Unusable("record of weight 0", f"{name} = {weight!r}")


def _check_fields(value: Mapping[str, Any], unsupported: Mapping[str, str], place: str = "") -> None:
    for name in unsupported.keys() & value.keys():
        if not _empty(decoded_json(value[name])):
            raise Unusable(unsupported[name], f"{place}field '{name}' is not empty")


def _empty(value: Any) -> bool:
    """Whether a value says nothing: null, false, an empty text, list or object, and a list or object of such."""
    if isinstance(value, Mapping):
        return all(map(_empty, value.values()))
    if isinstance(value, list):
        return all(map(_empty, value))
    return value is None or value is False or (isinstance(value, str) and not value.strip())


def decoded_json(value: Any, *, turns: bool = False) -> Any:
    """A text that is JSON of a list or object, decoded; other values as they are.

    turns: the field may also hold plain text, so only a list of messages counts as JSON.
    """
    if not isinstance(value, str) or value.lstrip()[:1] not in ("[", "{"):
        return value
    try:
        found = json.loads(value)
    except (ValueError, RecursionError):
        return value
    if turns:
        known = isinstance(found, list) and found and all(isinstance(turn, dict) for turn in found)
        if not known or not all({"role", "from"} & turn.keys() and {"content", "value"} & turn.keys() for turn in found):
            return value
    return found


def _object(value: Any) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise Unusable("not an object", f"is {_name(value)}")
    return value


def _field(value: Any, field: str) -> Any:
    found = _object(value).get(field)
    if found is None:
        raise Unusable("missing field", f"no '{field}' among the fields {_fields(value)}"[:200])
    return found


def _fields(value: Mapping[str, Any]) -> str:
    return ", ".join(map(repr, value))


def _content(value: Any, what: str) -> str:
    """The text of a turn: a text, or a list of text parts, which follow one another without anything between."""
    if not isinstance(value, list) or not value:
        return _text(value, what)
    texts = []
    for part in value:
        if isinstance(part, Mapping):
            kind = part.get("type")
            rest = [
                key for key in part if key not in ("type", "text", "cache_control", "annotations") and not _empty(part[key])
            ]
            if kind not in (None, "text", "input_text", "output_text") or rest:
                raise Unusable("content is not text", f"{what} holds a part of type {kind!r}")
            part = part.get("text")
        texts.append(_text(part, f"a part of {what}"))
    return "".join(texts)


def _text(value: Any, what: str) -> str:
    if not isinstance(value, str):
        raise Unusable("content is not text", f"{what} is {_name(value)}")
    # JSON can hold half a surrogate pair, which no tokenizer accepts.
    try:
        value.encode()
    except UnicodeEncodeError:
        raise Unusable("not valid Unicode", f"{what} holds half a surrogate pair") from None
    return value


def _name(value: Any) -> str:
    return "null" if value is None else type(value).__name__
