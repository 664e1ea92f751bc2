"""Candidate pieces for a language: a SentencePiece BPE trained on text, reduced to the pieces that the scripts allow.

The text is cut into runs before training, at characters that no piece may contain: other scripts' letters, digits and control
characters. Why before: when pieces that span such characters are thrown away after training, every tenth trained piece is lost
and the counts of the others are off. As every piece holds a character of the scripts, a text without one keeps its ids.
"""

from __future__ import annotations

import hashlib
import heapq
import io
import random
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import sentencepiece

from model.vocabulary.scripts import Scripts

MAX_PIECE = 16  # characters
_MAX_RUN = 2048  # characters; SentencePiece numbers the characters of a line with 16 bits


@dataclass(frozen=True)
class Trained:
    """The result of training."""

    pieces: list[str]  # candidates by priority: characters, the most frequent first, then merges in the order of training
    unwanted: int  # number of trained pieces left out, as the scripts do not allow them
    exhausted: bool  # the text has no more pieces to give
    characters: int  # number of characters of the texts


def train(texts: Iterable[str], pieces: int, *, scripts: Scripts | None = None, coverage: float = 0.9998) -> Trained:
    """Train a BPE and return its allowed pieces: `pieces` merges (fewer if the text has no more) and all characters.

    The same arguments give the same pieces.

    Args:
        texts: documents, or any parts of them; no piece spans a line break.
        pieces: number of pieces of two or more characters.
        scripts: the scripts of the pieces; default: Japan's.
        coverage: share of the characters in `texts` (counted with repetition) that get a piece of their own; the rest, rare
            Han characters, stay bytes.

    Raises:
        ValueError: the texts hold no character of the scripts, or an argument is out of range.
    """
    if pieces < 1:
        raise ValueError(f"pieces must be at least 1, not {pieces}")
    if not 0 < coverage <= 1:
        raise ValueError(f"coverage must be above 0 and at most 1, not {coverage}")
    scripts = scripts or Scripts()
    characters = 0
    alphabet: set[str] = set()
    runs: deque[str] = deque()
    for text in texts:
        characters += len(text)
        for run in scripts.runs(text):
            alphabet.update(run)
            runs += (run[i : i + _MAX_RUN] for i in range(0, len(run), _MAX_RUN))
    if not alphabet:
        raise ValueError(
            f"nothing in the text ({characters:,} characters) is of the scripts {scripts}: give text of such a language, "
            "or name the script of the text"
        )
    # Every model has 256 bytes and three special pieces. The margin makes up for pieces that the scripts do not allow.
    size = 259 + len(alphabet) + pieces + pieces // 50 + 100
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=(runs.popleft() for _ in range(len(runs))),  # freed as they go, as sentencepiece copies them
        model_writer=model,
        model_type="bpe",
        vocab_size=size,
        hard_vocab_limit=False,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        add_dummy_prefix=False,
        split_by_unicode_script=False,
        split_digits=True,
        character_coverage=coverage,
        max_sentencepiece_length=MAX_PIECE,
        max_sentence_length=4 * _MAX_RUN + 1,
        num_threads=1,
        minloglevel=2,
    )
    processor = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
    trained = [processor.id_to_piece(id) for id in range(259, processor.get_piece_size())]
    wanted = [piece for piece in trained if scripts.allow(piece)]
    merges = [piece for piece in wanted if len(piece) > 1]
    return Trained(
        pieces=[piece for piece in wanted if len(piece) == 1] + merges[:pieces],
        unwanted=len(trained) - len(wanted),
        exhausted=len(trained) + 259 < size,
        characters=characters,
    )


def distinct(texts: Iterable[str]) -> Iterator[str]:
    """The texts, each once. Remembers 16 bytes of each."""
    seen: set[bytes] = set()
    for text in texts:
        digest = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).digest()
        if digest not in seen:
            seen.add(digest)
            yield text


def sample(texts: Iterable[str], characters: int, seed: int) -> list[str]:
    """A random choice of whole texts, in their order, of about `characters` characters in all; all texts if they fit.

    Reads the texts once and holds no more than the choice. The same texts and seed give the same choice.
    """
    draw = random.Random(seed)
    chosen: list[tuple[float, int, str]] = []
    total = 0
    for index, text in enumerate(texts):
        heapq.heappush(chosen, (-draw.random(), -index, text))
        total += len(text)
        while total - len(chosen[0][2]) >= characters:
            total -= len(heapq.heappop(chosen)[2])
    return [text for _, _, text in sorted(chosen, key=lambda entry: -entry[1])]
