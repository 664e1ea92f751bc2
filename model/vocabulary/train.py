"""New pieces for a language: a SentencePiece BPE model trained on text, reduced to the pieces worth merging."""

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
_MAX_RUN = 2048  # characters; SentencePiece numbers the places of a line with 16 bits


@dataclass(frozen=True)
class Trained:
    """What training gives.

    Attributes:
        pieces: candidates in order of priority: the characters, most frequent first, then the merges as trained.
        unwanted: trained pieces left out because they hold nothing of the scripts.
        exhausted: the text has no further piece to give.
        characters: number of characters of text trained on, after sampling.
    """

    pieces: list[str]
    unwanted: int
    exhausted: bool
    characters: int


def train(texts: Iterable[str], pieces: int, *, scripts: Scripts | None = None, coverage: float = 0.9998) -> Trained:
    """Train a BPE of some scripts and give its pieces: `pieces` merges (fewer if the text has no more) and all characters.

    Pieces are those that the scripts allow (see `Scripts`), so no text without a character of theirs can ever be written with
    a new piece. The text is cut where no piece may reach across (at other scripts' letters, digits, control characters)
    before training: cut afterwards, every tenth piece trained would be thrown away, and the counts of the rest would be off.

    Repeated with the same arguments it gives the same pieces.

    Args:
        texts: documents, or any parts of them; line breaks are boundaries.
        pieces: how many pieces of two or more characters.
        scripts: the scripts of the pieces; default: Japan's.
        coverage: share of the characters in `texts` (counted with repetition) that get a piece of their own; the rest, rare
            Han characters, stay bytes.

    Raises:
        ValueError: there is nothing of the scripts in the texts, or an argument is out of range.
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
            "or name the script of the text's"
        )
    # 256 bytes and three specials come with every model. A wide margin: what the scripts do not allow is dropped.
    size = 259 + len(alphabet) + pieces + pieces // 50 + 100
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=(runs.popleft() for _ in range(len(runs))),  # sentencepiece copies them, so they need not stay
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
    """The texts, each once; what it remembers of each is 16 bytes."""
    seen: set[bytes] = set()
    for text in texts:
        digest = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).digest()
        if digest not in seen:
            seen.add(digest)
            yield text


def sample(texts: Iterable[str], characters: int, seed: int) -> list[str]:
    """A random choice of whole texts, of about `characters` characters in all, in their old order; all where they fit.

    One pass, holding no more than the choice; the same texts and seed give the same choice.
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
