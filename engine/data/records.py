"""Reads records: a text, a conversation or a preference pair, or the reason why a record cannot be used."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from model.vocabulary.chat import Message

SHAREGPT_ROLES = {"system": "system", "human": "user", "gpt": "assistant"}
MESSAGE_ROLES = {"system": "system", "user": "user", "assistant": "assistant"}


class Unusable(Exception):
    """A record that cannot be used. reason: one of few, to be counted. detail: about this record."""

    def __init__(self, reason: str, detail: str):
        super().__init__(f"{reason}: {detail}")
        self.reason = reason
        self.detail = detail


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


def read_conversation(value: Any) -> list[Message]:
    """The messages of a record: [system,] user, assistant, ... in strict alternation, with at least one assistant turn.

    Formats, tried in this order: `messages` [{role, content}]; ShareGPT's `conversations` [{from, value}] with system, human
    and gpt; `prompt` and `completion`; Alpaca's `instruction`, `input` (may be empty or absent) and `output`. An empty system
    message is dropped.
    Raises: Unusable.
    """
    if not isinstance(value, Mapping):
        raise Unusable("not an object", f"is {_name(value)}")
    if value.get("messages") is not None:
        messages = _messages(value["messages"], "messages")
    elif value.get("conversations") is not None:
        messages = _messages(value["conversations"], "conversations", "from", "value", SHAREGPT_ROLES)
    elif value.get("prompt") is not None and value.get("completion") is not None:
        messages = _turns(value["prompt"], "user", "prompt") + _turns(value["completion"], "assistant", "completion")
    elif value.get("instruction") is not None and value.get("output") is not None:
        context = _text(value.get("input") or "", "field 'input'")
        instruction = _text(value["instruction"], "field 'instruction'")
        question = f"{instruction}\n\n{context}" if context.strip() else instruction
        messages = [
            Message(role="user", content=question),
            Message(role="assistant", content=_text(value["output"], "field 'output'")),
        ]
    else:
        raise Unusable(
            "no conversation",
            "none of 'messages', 'conversations', 'prompt' and 'completion', "
            f"'instruction' and 'output' in the fields {', '.join(map(repr, value))}"[:200],
        )
    messages = _check(messages)
    if all(message["role"] != "assistant" for message in messages):
        raise Unusable("no assistant turn", f"{len(messages)} messages, none of the assistant")
    return messages


def read_pair(value: Any) -> Pair:
    """The preference pair of a record with `prompt`, `chosen` and `rejected`.

    `prompt` is a text or messages. `chosen` and `rejected` are texts, [the last message], or whole conversations; with whole
    conversations `prompt` may be absent.
    Raises: Unusable.
    """
    text_or_turns = _optional(value, "prompt")
    given = None if text_or_turns is None else _turns(text_or_turns, "user", "prompt")
    contexts, answers = [], []
    for side in ("chosen", "rejected"):
        turns = _turns(_field(value, side), "assistant", side)
        if not turns or turns[-1]["role"] != "assistant":
            raise Unusable("no assistant turn", f"'{side}' does not end with an assistant message")
        if len(turns) > 1:
            contexts.append(turns[:-1])
        answers.append(turns[-1]["content"])
    prompt = contexts[0] if contexts else given
    if prompt is None:
        raise Unusable("no prompt", "neither 'prompt' nor a conversation in 'chosen' and 'rejected'")
    # Beside a prompt that is one text, the conversation may also hold a system message or earlier turns.
    agrees = given in (None, prompt) or (isinstance(text_or_turns, str) and prompt[-1:] == given)
    if not agrees or any(context != prompt for context in contexts):
        raise Unusable("sides of different prompts", "'prompt', 'chosen' and 'rejected' disagree before the last answer")
    chosen, rejected = answers
    for side, answer in (("chosen", chosen), ("rejected", rejected)):
        if not answer.strip():
            raise Unusable("empty answer", f"'{side}' is empty")
    if chosen.strip() == rejected.strip():
        raise Unusable("identical chosen and rejected", repr(chosen[:40]))
    prompt = _check(prompt)
    if not prompt or prompt[-1]["role"] != "user":
        raise Unusable("roles do not alternate", "the prompt does not end with a user message")
    return Pair(prompt, chosen, rejected)


def _check(messages: list[Message]) -> list[Message]:
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


def _turns(value: Any, role: str, field: str) -> list[Message]:
    """A list of messages; a text becomes one message of `role`."""
    if isinstance(value, list):
        return _messages(value, field)
    return [Message(role=role, content=_text(value, f"field '{field}'"))]


def _messages(
    value: Any, field: str, role_key: str = "role", text_key: str = "content", roles: Mapping[str, str] = MESSAGE_ROLES
) -> list[Message]:
    if not isinstance(value, list):
        raise Unusable("no conversation", f"field '{field}' is {_name(value)}, not a list")
    messages = []
    for number, turn in enumerate(value, 1):
        if not isinstance(turn, Mapping) or role_key not in turn or text_key not in turn:
            raise Unusable("no conversation", f"turn {number} of '{field}' lacks '{role_key}' or '{text_key}'")
        role = roles.get(turn[role_key]) if isinstance(turn[role_key], str) else None
        if role is None:
            raise Unusable("unknown role", f"{turn[role_key]!r} in turn {number} of '{field}'; known are {', '.join(roles)}")
        messages.append(Message(role=role, content=_text(turn[text_key], f"turn {number} of '{field}'")))
    return messages


def _field(value: Any, field: str) -> Any:
    found = _optional(value, field)
    if found is None:
        raise Unusable("missing field", f"no '{field}' among the fields {', '.join(map(repr, value))}"[:200])
    return found


def _optional(value: Any, field: str) -> Any:
    if not isinstance(value, Mapping):
        raise Unusable("not an object", f"is {_name(value)}")
    return value.get(field)


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
