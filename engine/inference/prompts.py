"""A file of prompts, read before a run starts: every mistake in it is found then."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine.data.sources import SourceFile
from model.config import MistralConfig
from model.vocabulary.chat import Message, encode_prompt
from model.vocabulary.tokenizer import Tokenizer

_SUFFIXES = (".txt", ".jsonl", ".json")


@dataclass(frozen=True)
class FilePrompt:
    """A prompt of a file."""

    text: str  # for people: the prompt, or the conversation
    ids: list[int]


def read_prompts(
    path: str,
    tokenizer: Tokenizer,
    config: MistralConfig,
    *,
    chat: bool,  # a prompt is a user's message in the chat template; otherwise the beginning of a text
    new_tokens: int,  # room that an answer needs
) -> list[FilePrompt]:
    """The prompts of a .txt file (one a line) or of JSON Lines, whose records have `prompt` (a text) or `messages`.

    Raises: FileNotFoundError, or ValueError naming file, line and remedy: for a file of another type or without prompts, a
        record without a prompt, a conversation that the chat template refuses, a prompt that leaves no room for its answer.
    """
    file = Path(path)
    if not file.is_file():
        raise FileNotFoundError(f"evaluate.prompts = {path}: no such file")
    if not file.name.removesuffix(".gz").endswith(_SUFFIXES):
        raise ValueError(f"evaluate.prompts = {path}: must be .txt (a prompt a line) or JSON Lines (.jsonl)")
    found = []
    for record in SourceFile(file, file.stat().st_size).records("line"):
        try:
            prompt = _read(record.value, tokenizer, chat)
        except ValueError as error:
            raise ValueError(f"{record.place}: {error}") from None
        room = config.max_position_embeddings - len(prompt.ids)
        if room < new_tokens:
            raise ValueError(
                f"{record.place}: a prompt of {len(prompt.ids)} tokens and an answer of evaluate.new_tokens = {new_tokens} do "
                f"not fit the model's max_position_embeddings = {config.max_position_embeddings}; shorten the prompt or lower "
                "new_tokens"
            )
        found.append(prompt)
    return found


def _read(value: Any, tokenizer: Tokenizer, chat: bool) -> FilePrompt:
    """A record as a prompt. Raises: ValueError for a record that is none."""
    given = value if isinstance(value, str) else _prompt_of(value)
    if isinstance(given, str):
        if not given.strip():
            raise ValueError("the prompt is empty; write one or remove the record")
        if not chat:
            return FilePrompt(given, [tokenizer.bos_id, *tokenizer.encode(given)])
        return FilePrompt(given, encode_prompt(tokenizer, [Message(role="user", content=given)]))
    if not chat:
        raise ValueError("pre-training continues plain text: give the text as `prompt` instead of messages")
    ids = encode_prompt(tokenizer, given)
    if len(given) == 1:
        return FilePrompt(given[0]["content"], ids)
    return FilePrompt("\n".join(f"{message['role']}: {message['content']}" for message in given), ids)


def _prompt_of(value: Any) -> str | list[Message]:
    """What a record asks: a text, or messages."""
    if isinstance(value, Mapping):
        prompt, messages = value.get("prompt"), value.get("messages")
        if isinstance(prompt, str) and messages is None:
            return prompt
        if isinstance(messages, list) and prompt is None:
            return messages
        if isinstance(prompt, list) and messages is None:
            return prompt
    raise ValueError('a record needs either "prompt" (a text, or messages) or "messages": {"prompt": "What is 2 + 3?"}')
