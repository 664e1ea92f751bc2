"""Turns records into token documents, and counts what it reads and skips."""

import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from engine.data.languages import is_in
from engine.data.records import Pair, Turn, Unusable, read_conversation, read_pair, read_text, said_in
from engine.data.sources import Record
from engine.data.too_long import TooLong, parts_of_conversation, parts_of_text
from model.vocabulary.chat import EncodedChat, Message, encode_chat
from model.vocabulary.tokenizer import Tokenizer

Document = tuple[Any, Any, int]  # ids, trained or None, prompt length


class Entry(NamedTuple):
    """A usable record."""

    key: int  # decides whether the record is held out
    documents: list[Document]


class Reader:
    """Turns records into token documents, and counts records, characters, roles and skipped records."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        kind: str,
        text_field: str,
        language: str,
        max_length: int | None,
        too_long: TooLong,
        seed: int,
        strict: bool,
    ):
        self.tokenizer, self.kind, self.text_field, self.language = tokenizer, kind, text_field, language
        self.limit, self.way, self.seed, self.strict = max_length, too_long, seed, strict
        self.records = 0
        self.characters = 0
        self.roles: Counter[str] = Counter()
        self.too_long: Counter[str] = Counter()
        self.skipped: dict[str, dict[str, Any]] = {}
        self.last_skip = ""

    def entries(self, records: Sequence[Record]) -> Iterator[Entry]:
        """The usable records of a batch, in order."""
        self.records += len(records)
        usable = []
        for record in records:
            try:
                usable.append((record.place, self.content(record.value)))
            except Unusable as unusable:
                self._skip(record.place, unusable)
        texts = [content for _, content in usable] if self.kind == "text" else []
        self.characters += sum(map(len, texts))
        encoded = self.tokenizer.encode_batch(texts) if texts else [[]] * len(usable)
        for (place, content), ids in zip(usable, encoded, strict=True):
            try:
                if isinstance(content, str):
                    documents = self._text([self.tokenizer.bos_id, *ids, self.tokenizer.eos_id])
                elif isinstance(content, Pair):
                    documents = self._pair(content)
                else:
                    documents = self._chats(content)
            except Unusable as unusable:
                self._skip(place, unusable)
                continue
            yield Entry(self.key(content), documents)

    def content(self, value: Any) -> Any:
        """A record's text, messages or pair. Raises: Unusable."""
        content: Any
        if self.kind == "text":
            content = said = read_text(value, self.text_field)
        elif self.kind == "conversations":
            content = read_conversation(value)
            said = said_in(content)
        else:
            content = read_pair(value)
            said = f"{said_in(content.prompt)}\n{content.chosen}"
        if self.language and not is_in(said, self.language):
            raise Unusable(f"not in the language {self.language!r}", repr(said[:60]))
        return content

    def key(self, content: Any) -> int:
        """A hash of the content below 2^64. A pair hashes its prompt alone: no prompt is both trained on and held out."""
        text = content if isinstance(content, str) else json.dumps(content.prompt if isinstance(content, Pair) else content)
        return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8, key=str(self.seed).encode()).digest())

    def _text(self, ids: list[int]) -> list[Document]:
        if self.limit is None or len(ids) <= self.limit:
            return [(ids, None, 0)]
        return [(part, None, 0) for part in self._fitted(parts_of_text(ids, self.limit, self.way), len(ids))]

    def _chats(self, messages: list[Turn]) -> list[Document]:
        """A conversation as one document, or as those that become of a longer one."""
        whole = self._chat(messages)
        if self.limit is None or len(whole[0]) <= self.limit:
            self._count(messages)
            return [whole]
        parts = parts_of_conversation(messages, lambda turns: len(self._encoded(turns).ids), self.limit, self.way)
        documents = []
        for part in self._fitted(parts, len(whole[0])):
            ids, trained, _ = self._chat(part)
            if trained[: self.limit].any():
                documents.append((ids[: self.limit], trained[: self.limit], 0))
                self.too_long["cut"] += self.way == "split" and len(ids) > self.limit
                self._count(part)
        if not documents:
            raise Unusable(f"question longer than max_length = {self.limit}", f"{len(whole[0])} tokens in all")
        return documents

    def _fitted(self, parts: list[Any], length: int) -> list[Any]:
        """The parts of a document that was too long, counted. Raises: Unusable where it is skipped."""
        if not parts:
            raise Unusable(f"longer than max_length = {self.limit}", f"{length} tokens")
        self.too_long[self.way] += 1
        self.too_long["parts"] += len(parts) if self.way == "split" else 0
        return parts

    def _chat(self, messages: Sequence[Turn]) -> Document:
        encoded = self._encoded(messages)
        trained = np.array(encoded.trained)
        # The trained tokens of an answer are a run of their own: the next segment's beginning token follows.
        answer = np.cumsum(np.diff(trained, prepend=False) & trained) - 1
        weights = [message.get("train", True) for message in messages if message["role"] == "assistant"]
        if all(weights):
            return encoded.ids, trained, 0
        if answer.max() + 1 != len(weights):
            runs = f"{answer.max() + 1} runs of trained tokens, {len(weights)} answers"
            raise Unusable("an answer of weight 0 that the chat template hides", runs)
        return encoded.ids, trained & np.array(weights)[answer], 0

    def _encoded(self, messages: Sequence[Message]) -> EncodedChat:
        try:
            return encode_chat(self.tokenizer, messages)
        except ValueError as error:
            if self.tokenizer.template is None:
                raise
            raise Unusable("the chat template of the tokenizer's folder refuses it", str(error)) from None

    def _pair(self, pair: Pair) -> list[Document]:
        documents: list[Document] = []
        lengths = []
        for answer in (pair.chosen, pair.rejected):
            encoded = self._encoded([*pair.prompt, Message(role="assistant", content=answer)])
            # Everything before the last answer is prompt, earlier answers included.
            trained = np.array(encoded.trained)
            prompt_length = int(np.flatnonzero(~trained)[-1]) + 1
            trained[:prompt_length] = False
            lengths.append(len(trained))
            if self.limit is not None and len(trained) > self.limit:
                hopeless = prompt_length >= self.limit
                if hopeless or self.way == "skip":
                    raise Unusable(
                        f"{'prompt' if hopeless else 'pair'} longer than max_length = {self.limit}",
                        f"{prompt_length} tokens of prompt, {len(trained)} with the answer",
                    )
            documents.append((encoded.ids[: self.limit], trained[: self.limit], prompt_length))
        if documents[0][0] == documents[1][0]:
            raise Unusable("identical chosen and rejected", "the same tokens")
        self.too_long["cut"] += self.limit is not None and max(lengths) > self.limit
        self._count(
            [*pair.prompt, Message(role="assistant", content=pair.chosen), Message(role="assistant", content=pair.rejected)]
        )
        return documents

    def _count(self, messages: Sequence[Message]) -> None:
        self.roles.update(message["role"] for message in messages)
        self.characters += sum(len(message["content"]) for message in messages)

    def _skip(self, place: str, unusable: Unusable) -> None:
        self.last_skip = f"{place}: {unusable}"
        if self.strict:
            raise ValueError(f"{self.last_skip}: mend or remove the record, or prepare without strict to skip such records")
        first = {"count": 0, "first": place, "detail": unusable.detail}
        self.skipped.setdefault(unusable.reason, first)["count"] += 1
