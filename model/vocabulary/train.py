"""New pieces for a language: a SentencePiece BPE model trained on text, reduced to the pieces worth merging."""

from __future__ import annotations

import heapq
import io
import random
import re
from collections.abc import Iterable
from dataclasses import dataclass

import sentencepiece

from model.vocabulary.export import SPACE

# Letters of Japanese: kana, Han characters and the marks that stand for letters (々 〆 〇 ー ヽ ゝ).
_LETTERS = (
    "\u3005-\u3007\u3041-\u3096\u309d-\u309f\u30a1-\u30fa\u30fc-\u30ff\u31f0-\u31ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
    "\uff66-\uff9f\U0001b000-\U0001b16f\U00020000-\U0003fffd"
)
# Punctuation of the CJK block and of kana. Other full-width signs (！ （ ￥) may stand in a piece, not make one.
_PUNCTUATION = "\u3001-\u3004\u3008-\u303f\u309b\u309c\u30a0\u30fb\uff61-\uff65"
_WIDE = "\u3000\uff01-\uff60\uffe0-\uffe6"
_JAPANESE = re.compile(f"[{_LETTERS}{_PUNCTUATION}]")
_LETTER = re.compile(f"[{_LETTERS}]")
_WIDE_CHARACTER = re.compile(f"[{_WIDE}]")
# What a piece may be cut from: no letter or digit of another script, no control character, no mark for a space. Wide
# letters and digits come one at a time: Mistral's digits are single pieces as well.
_RUN = re.compile(f"(?:[{_LETTERS}]|[^\\w{SPACE}\\x00-\\x1f\\x7f-\\x9f\u2028\u2029]|_)+|[{_WIDE}]")

MAX_PIECE = 16  # characters
_MAX_RUN = 2048  # characters; SentencePiece numbers the places of a line with 16 bits


@dataclass(frozen=True)
class Trained:
    """What training gives.

    Attributes:
        pieces: candidates in order of priority: the characters, most frequent first, then the merges as trained.
        unwanted: trained pieces left out because they hold nothing Japanese.
        exhausted: the text has no further piece to give.
        characters: number of characters of text trained on, after sampling.
    """

    pieces: list[str]
    unwanted: int
    exhausted: bool
    characters: int


def train(texts: Iterable[str], pieces: int, *, coverage: float = 0.9998) -> Trained:
    """Train a Japanese BPE and give its pieces: `pieces` merges (fewer if the text has no more) and all characters.

    A piece holds a Japanese character or CJK punctuation and, of letters and digits, Japanese ones only; full-width letters
    and digits are pieces of one character. So no text without such characters can ever be written with a new piece. The
    text is cut where no piece may reach across (at other scripts' letters, digits, control characters) before training:
    cut afterwards, every tenth piece trained would be thrown away, and the counts of the rest would be off.

    Repeated with the same arguments it gives the same pieces.

    Args:
        texts: documents, or any parts of them; line breaks are boundaries.
        pieces: how many pieces of two or more characters.
        coverage: share of the characters in `texts` (counted with repetition) that get a piece of their own; the rest, rare
            Han characters, stay bytes.

    Raises:
        ValueError: there is nothing Japanese in the texts, or an argument is out of range.
    """
    if pieces < 1:
        raise ValueError(f"pieces must be at least 1, not {pieces}")
    if not 0 < coverage <= 1:
        raise ValueError(f"coverage must be above 0 and at most 1, not {coverage}")
    characters = 0
    alphabet: set[str] = set()
    runs: list[str] = []
    for text in texts:
        characters += len(text)
        for run in _RUN.findall(text):
            if is_japanese(run):
                alphabet.update(run)
                runs += (run[i : i + _MAX_RUN] for i in range(0, len(run), _MAX_RUN))
    if not any(map(_JAPANESE.match, alphabet)):
        raise ValueError(
            f"nothing Japanese in the text ({characters:,} characters): no kana, no Han character, no CJK punctuation"
        )
    # 256 bytes and three specials come with every model. A wide margin: what is not Japanese is dropped.
    size = 259 + len(alphabet) + pieces + pieces // 50 + 100
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(runs),
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
    wanted = [piece for piece in trained if is_wanted(piece)]
    merges = [piece for piece in wanted if len(piece) > 1]
    return Trained(
        pieces=[piece for piece in wanted if len(piece) == 1] + merges[:pieces],
        unwanted=len(trained) - len(wanted),
        exhausted=len(trained) + 259 < size,
        characters=characters,
    )


def is_wanted(piece: str) -> bool:
    """Whether a piece is Japanese and nothing else, as `train` says; a space is written U+2581."""
    if len(piece) == 1 and _WIDE_CHARACTER.match(piece):
        return True
    if not _JAPANESE.search(piece) or any(ord(character) < 0x20 for character in piece):
        return False
    return all(_LETTER.match(character) for character in piece if character.isalnum())


def is_japanese(text: str) -> bool:
    """Whether a text holds a character that a new piece may be made of, so that its ids may change by a merge."""
    return bool(_JAPANESE.search(text) or _WIDE_CHARACTER.search(text))


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
