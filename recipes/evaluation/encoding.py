"""The harness's texts as token ids: pairs of context and continuation, with exactly one beginning-of-sequence token.

Context and continuation are encoded as one text, and cut where the context ends. Where a piece joins the two, there is no such
place: the continuation is then encoded alone, as inside a text, and counted. (Cut all the same, the harness scores a part of
the continuation, or nothing: EleutherAI/lm-evaluation-harness issues 1053 and 1297.)
"""

from collections.abc import Sequence
from dataclasses import dataclass

from model.vocabulary.chat import encode_rendered
from model.vocabulary.proto import ModelProto
from model.vocabulary.tokenizer import Tokenizer, inside_text

# Stands in a text where its one beginning-of-sequence token shall be, if not at the beginning: a character of no text.
BOS_HERE = "\ufdd1"


@dataclass(frozen=True)
class Pair:
    """A context and its continuation as ids. joined: whether a piece would have joined them."""

    context: list[int]
    continuation: list[int]
    joined: bool


class Encoder:
    """Encodes plain texts, or with `chat` texts that the chat template has made; of these none has a mark `BOS_HERE`."""

    def __init__(self, tokenizer: Tokenizer, *, chat: bool = False) -> None:
        self.tokenizer, self.chat = tokenizer, chat
        self._inside = inside_text(ModelProto.FromString(tokenizer.model_bytes))

    def texts(self, texts: Sequence[str]) -> list[list[int]]:
        """Each text's ids behind one beginning-of-sequence token; equal texts are encoded once."""
        unique = list(dict.fromkeys(texts))
        plain = [text for text in unique if BOS_HERE not in text]
        if self.chat:
            encoded = [encode_rendered(self.tokenizer, text) for text in plain]
        else:
            encoded = self.tokenizer.encode_batch(plain) if plain else []
        begun = dict(zip(plain, map(self._begun, encoded), strict=True))
        for text in unique:
            if BOS_HERE in text:
                before, after = (self.tokenizer.encode(part) for part in text.split(BOS_HERE, 1))
                begun[text] = [*before, self.tokenizer.bos_id, *after]
        return [begun[text] for text in texts]

    def pairs(self, pairs: Sequence[tuple[str, str]]) -> list[Pair]:
        """Each context and continuation. Spaces at a context's end belong to the continuation, as pieces begin with spaces."""
        stripped = [context.rstrip() for context, _ in pairs]
        moved = [context[len(kept) :] + continuation for kept, (context, continuation) in zip(stripped, pairs, strict=True)]
        contexts = self.texts(stripped)
        wholes = self.texts([kept + continuation for kept, continuation in zip(stripped, moved, strict=True)])
        found = []
        for context, whole, continuation in zip(contexts, wholes, moved, strict=True):
            joined = whole[: len(context)] != context or (len(whole) == len(context) and continuation != "")
            own = self._inside.encode(continuation, out_type=int) if joined else whole[len(context) :]
            found.append(Pair(context, own, joined))
        return found

    def _begun(self, ids: list[int]) -> list[int]:
        start = 0
        while start < len(ids) and ids[start] == self.tokenizer.bos_id:
            start += 1
        return [self.tokenizer.bos_id, *ids[start:]]


class StopTexts:
    """Watches a growing answer for texts that end it."""

    def __init__(self, tokenizer: Tokenizer, stops: Sequence[str]) -> None:
        self._decoder, self._stops = tokenizer.stream_decoder(), [stop for stop in stops if stop]
        self._tail, self._keep = "", max(map(len, self._stops), default=1) - 1

    def __call__(self, token: int) -> bool:
        """Whether one of the texts is complete with this token."""
        self._tail += self._decoder.push(token)
        found = any(stop in self._tail for stop in self._stops)
        self._tail = self._tail[-self._keep :] if self._keep else ""
        return found


def cut_at(text: str, stops: Sequence[str]) -> str:
    """The text up to the first of the texts that end it."""
    for stop in stops:
        if stop:
            text = text.split(stop, 1)[0]
    return text
