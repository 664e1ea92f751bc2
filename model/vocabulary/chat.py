"""The chat template: Shisa's, in the llama-2 form.

A conversation has one segment an exchange, `<s>[INST] {user} [/INST] {answer} </s>`. The system message stands inside the
first segment:

    <s>[INST] <<SYS>>\n{system}\n<</SYS>>\n\n{user} [/INST] {answer} </s><s>[INST] {user} [/INST] {answer} </s>

Source: the model card of augmxnt/shisa-7b-v1. The template published there drops `<s>` from the first segment, and also
`[INST] ` where there is no system message; this one opens every segment alike and equals it otherwise.

Each segment is encoded as a whole, between the ids of `<s>` and `</s>`. So a message's text never becomes a special token, and
an answer has the same tokens in training as after its prompt in generation.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypedDict

from model.config import MistralConfig
from model.vocabulary.template import BOS, CHAT_TEMPLATE, CHATML_TEMPLATE, EOS, FolderTemplate, unmarked
from model.vocabulary.tokenizer import CHATML, Tokenizer

Message = TypedDict("Message", {"role": str, "content": str})  # noqa: UP013 - the two keys read best on one line

# Stands inside a special token that a message spells, so that it stays text in the rendered conversation.
_TEXT_MARK = "\ufdd0"


@dataclass(frozen=True)
class EncodedChat:
    """A conversation as token ids; `trained` marks the assistant's tokens and the `</s>` after them."""

    ids: list[int]
    trained: list[bool]


def check_messages(messages: Sequence[Message]) -> None:
    """Check that the template can express a conversation: [system,] user, assistant, user, ... in strict alternation.

    Raises:
        ValueError: one line with the message's number, its fault and the expected form. Faults: no user message, an unknown
            role, a system message after the first place, a role out of turn, content that is not text, an empty question or
            answer (an empty system message is allowed, as the template has a place for it).
    """
    if not messages:
        raise ValueError("the conversation is empty: it needs at least a user message")
    for number, message in enumerate(messages, 1):
        if not isinstance(message, dict) or "role" not in message or "content" not in message:
            raise ValueError(f"message {number} must be an object with 'role' and 'content', not {message!r:.80}")
    system = messages[0]["role"] == "system"
    for number, message in enumerate(messages, 1):
        role, content = message["role"], message["content"]
        turn = number - 1 - system
        expected = "system" if turn < 0 else ("user", "assistant")[turn % 2]
        if role not in ("system", "user", "assistant"):
            raise ValueError(f"message {number} has the unknown role {role!r}: use system, user or assistant")
        if role == "system" != expected:
            raise ValueError(f"message {number} is a system message: only the first message may be one")
        if role != expected:
            after = f"after a message of role {messages[number - 2]['role']!r}" if number > 1 else "at the beginning"
            raise ValueError(f"message {number} has role {role!r} {after}, where {expected!r} must stand")
        if not isinstance(content, str):
            raise ValueError(f"message {number} ({role}): its content must be text, not {type(content).__name__}")
        if role != "system" and not content.strip():
            raise ValueError(f"message {number} ({role}) is empty")
    if len(messages) <= system:
        raise ValueError("the conversation has a system message but no user message")


def render(messages: Sequence[Message], *, add_generation_prompt: bool = False) -> str:
    """The conversation as text, equal to `apply_chat_template(messages, tokenize=False)` of transformers.

    `add_generation_prompt` changes nothing, here and there: a conversation whose last message is the user's ends with
    `[/INST]`, and the model continues.

    Raises:
        ValueError: see `check_messages`.
    """
    return "".join(BOS + prompt + ("" if answer is None else answer + EOS) for prompt, answer in _segments(messages))


def encode_chat(tokenizer: Tokenizer, messages: Sequence[Message]) -> EncodedChat:
    """The conversation as token ids with its training mask.

    A token is the assistant's only if all of its characters come after `[/INST]`. Where the tokenizer's folder has a template
    of its own, that template forms the conversation.

    Raises:
        ValueError: see `check_messages`; also where the folder's template refuses the conversation.
    """
    if tokenizer.template is not None:
        return _encode_by_folder(tokenizer, tokenizer.template, messages)
    ids: list[int] = []
    trained: list[bool] = []
    for prompt, answer in _segments(messages):
        # Not the first section: the id of `<s>` stands before it.
        pieces, offsets = tokenizer.encode_with_offsets(prompt + (answer or ""), first=False)
        ids += [tokenizer.bos_id, *pieces]
        trained += [False, *(answer is not None and begin >= len(prompt) for begin, _ in offsets)]
        if answer is not None:
            ids.append(tokenizer.eos_id)
            trained.append(True)
    return EncodedChat(ids, trained)


def encode_prompt(tokenizer: Tokenizer, messages: Sequence[Message]) -> list[int]:
    """The token ids for the model to continue: the conversation up to and including the last `[/INST]`.

    Raises:
        ValueError: see `check_messages`; also when the last message is not the user's.
    """
    check_messages(messages)
    if messages[-1]["role"] != "user":
        raise ValueError(f"a prompt must end with a user message, not with one of role {messages[-1]['role']!r}")
    if tokenizer.template is not None:
        text = tokenizer.template.render(_as_text(tokenizer, messages), add_generation_prompt=True)
        return _encode_parts(tokenizer, [(text, False)]).ids
    return encode_chat(tokenizer, messages).ids


def prompt_text(tokenizer: Tokenizer, messages: Sequence[Message]) -> str:
    """A conversation as the text that `encode_rendered` takes, up to where the model goes on.

    The last message may be the assistant's: the beginning of an answer, which the model continues.
    Raises: ValueError, see `encode_prompt`.
    """
    begun = None
    if messages and messages[-1]["role"] == "assistant":
        begun, messages = _as_text(tokenizer, messages[-1:])[0]["content"], messages[:-1]
    check_messages(messages)
    if messages[-1]["role"] != "user":
        raise ValueError(f"a prompt must end with a user message, not with one of role {messages[-1]['role']!r}")
    marked = _as_text(tokenizer, messages)
    text = render(marked) if tokenizer.template is None else tokenizer.template.render(marked, add_generation_prompt=True)
    return text if begun is None else f"{text.rstrip(' ')} {begun}"


def encode_rendered(tokenizer: Tokenizer, text: str) -> list[int]:
    """Ids of a text that begins with one of `prompt_text`: spelled special tokens are ids of their own."""
    return _encode_parts(tokenizer, [(text, False)]).ids


def end_id(tokenizer: Tokenizer) -> int:
    """The token that an assistant's answer ends with, in the tokenizer's chat template."""
    if tokenizer.template is not None:
        probe = [Message(role="user", content="a"), Message(role="assistant", content="b")]
        encoded = encode_chat(tokenizer, probe)
        last = encoded.ids[max((place for place, trained in enumerate(encoded.trained) if trained), default=0)]
        if last in tokenizer.special_ids.values():
            return last
    return tokenizer.eos_id


# The templates that have a name.
TEMPLATES = ("shisa", "chatml")


def with_named_template(tokenizer: Tokenizer, name: str) -> Tokenizer:
    """The tokenizer with a chat template by name: "shisa" (ours), "chatml", or a file of Jinja.

    Raises: FileNotFoundError or ValueError for an unknown name, a template that cannot form a conversation, or a tokenizer
        without ChatML's tokens.
    """
    if name == "shisa":
        return tokenizer.with_template(CHAT_TEMPLATE)
    if name == "chatml":
        if missing := [token for token in CHATML if token not in tokenizer.special_ids]:
            raise ValueError(f"template = 'chatml': the tokenizer has no token {missing[0]}; recipes.vocabulary adds it")
        return tokenizer.with_template(CHATML_TEMPLATE)
    if not Path(name).is_file():
        raise FileNotFoundError(f"template = {name!r}: neither shisa nor chatml, nor a file with a template in Jinja")
    given = tokenizer.with_template(Path(name).read_text(encoding="utf-8"))
    try:
        encode_chat(given, [Message(role="user", content="a"), Message(role="assistant", content="b")])
    except ValueError as error:
        raise ValueError(f"template = {name!r}: {error}") from None
    return given


def template_name(tokenizer: Tokenizer) -> str:
    """What the tokenizer's chat template is, in words."""
    if tokenizer.template is None:
        return "shisa (llama-2's form)"
    return "chatml" if unmarked(tokenizer.template.source) == unmarked(CHATML_TEMPLATE) else "one of its own"


def ends_of(tokenizer: Tokenizer, config: MistralConfig) -> frozenset[int]:
    """Every token that ends an answer: the tokenizer's end token, and those that the model's configuration names."""
    return frozenset({tokenizer.eos_id, *config.end_ids})


def _encode_by_folder(tokenizer: Tokenizer, template: FolderTemplate, messages: Sequence[Message]) -> EncodedChat:
    """`encode_chat` by a folder's own template; an answer is trained on up to its last special token, which ends it."""
    check_messages(messages)
    return _encode_parts(tokenizer, template.render_parts(_as_text(tokenizer, messages)))


def _as_text(tokenizer: Tokenizer, messages: Sequence[Message]) -> list[Message]:
    """The messages, marked where they spell a special token."""
    special = _special_pattern(tokenizer)

    def mark(text: str) -> str:
        return special.sub(lambda found: found[0][0] + _TEXT_MARK + found[0][1:], text)

    return [Message(role=message["role"], content=mark(message["content"])) for message in messages]


def _special_pattern(tokenizer: Tokenizer) -> re.Pattern[str]:
    return re.compile("|".join(map(re.escape, sorted(tokenizer.special_ids, key=len, reverse=True))))


def _encode_parts(tokenizer: Tokenizer, parts: Sequence[tuple[str, bool]]) -> EncodedChat:
    """Consecutive texts as ids: special tokens are ids of their own, and each text between them is encoded alone."""
    text = "".join(part for part, _ in parts)
    bounds: list[tuple[int, int]] = []  # the assistant's parts as [begin, end)
    place = 0
    for part, said in parts:
        if said:
            last = max((found.end() for found in _special_pattern(tokenizer).finditer(part)), default=len(part))
            bounds.append((place, place + last))
        place += len(part)
    ids: list[int] = []
    trained: list[bool] = []

    def add(id: int, begin: int, end: int) -> None:
        ids.append(id)
        trained.append(any(first <= begin and end <= stop and begin < stop for first, stop in bounds))

    done = 0
    for found in [*_special_pattern(tokenizer).finditer(text), None]:
        section = text[done : None if found is None else found.start()]
        # Offsets in the rendered text, whose marks are no part of the encoded text.
        places = [done + place for place, character in enumerate(section) if character != _TEXT_MARK]
        pieces, offsets = (
            tokenizer.encode_with_offsets(section.replace(_TEXT_MARK, ""), first=done == 0) if places else ([], [])
        )
        places.append(done + len(section))
        for id, (begin, end) in zip(pieces, offsets, strict=True):
            add(id, places[begin], places[end])
        if found is not None:
            add(tokenizer.special_ids[found[0]], found.start(), found.end())
            done = found.end()
    return EncodedChat(ids, trained)


def _segments(messages: Sequence[Message]) -> list[tuple[str, str | None]]:
    """The text between each `<s>` and `</s>`, as (prompt, answer); the answer may be None."""
    check_messages(messages)
    head = ""
    segments: list[tuple[str, str | None]] = []
    for message in messages:
        content = message["content"]
        if message["role"] == "system":
            head = f"<<SYS>>\n{content}\n<</SYS>>\n\n"
        elif message["role"] == "user":
            segments.append((f"[INST] {head}{content} [/INST]", None))
            head = ""
        else:
            segments[-1] = (segments[-1][0], f" {content} ")
    return segments
