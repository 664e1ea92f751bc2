"""New pieces merged into a SentencePiece BPE model; the base's own encoding stays as it was.

The method. New pieces are appended behind the base's, with scores below every score of the base, falling with the id.
SentencePiece joins the neighbours of the highest score first, so all merges of the base happen before any new one. Hence the
merged ids of a text are its base ids, some neighbours joined, and a text from which no new piece can be built keeps its ids.

A candidate is usable if it is not in the base, all of its characters are pieces, and it is reachable: its own text encodes to
it alone. An unreachable piece occurs in no text: the joins that would produce it inside a text would also produce it from its
own text. Leaving it out therefore changes no encoding.

`model.vocabulary.selection` chooses among the usable candidates.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import sentencepiece

from model.vocabulary.proto import ModelProto, Piece, TrainerSpec
from model.vocabulary.scripts import SPACE, Scripts
from model.vocabulary.selection import select
from model.vocabulary.tokenizer import Tokenizer, inside_text
from model.vocabulary.train import Trained, train


@dataclass(frozen=True)
class Merged:
    """A merged model."""

    model_bytes: bytes  # the new `tokenizer.model`
    base_size: int  # number of pieces of the base; smaller ids keep their meaning
    pieces: list[str]  # the new pieces, with ids from base_size on
    controls: list[str]  # control pieces, with the ids behind them; no text encodes to one
    dropped: dict[str, int]  # number of candidates left out, by reason


class _TooFewPieces(ValueError):
    """There are too few usable candidates; more training may give more."""


def check_base(model_bytes: bytes, source: str = "the base tokenizer") -> int:
    """Check that new pieces can be merged into a model. Returns its number of pieces.

    Raises:
        ValueError: the bytes are no SentencePiece model, it is not BPE (Unigram, word, character) or lacks byte fallback.
    """
    Tokenizer(model_bytes, source)
    proto = ModelProto.FromString(model_bytes)
    if proto.trainer_spec.model_type != TrainerSpec.BPE:
        kind = TrainerSpec.ModelType.Name(proto.trainer_spec.model_type).lower()
        raise ValueError(f"{source} is a SentencePiece model of type {kind}: new pieces can be merged into BPE only")
    if sum(piece.type == Piece.BYTE for piece in proto.pieces) != 256:
        raise ValueError(
            f"{source} has no byte fallback: characters without a piece would be lost; use one trained with byte_fallback=true"
        )
    return len(proto.pieces)


def extend(
    base: bytes,
    texts: Sequence[str],
    new_pieces: int,
    *,
    scripts: Scripts | None = None,
    coverage: float = 0.9998,
    controls: Sequence[str] = (),
    source: str = "the base tokenizer",
    finished: Callable[[str], None] = lambda stage: None,
) -> tuple[Merged, Trained]:
    """Train candidates on texts and merge the `new_pieces` candidates that the texts use most widely into the base.

    Calls `finished` with the name of each finished stage: "train", then the stages of `merge`.

    Raises:
        ValueError: see `train` and `merge`.
    """
    check_base(base, source)
    candidates = candidates_for(new_pieces)
    while True:
        trained = train(texts, candidates, scripts=scripts, coverage=coverage)
        finished("train")
        try:
            merged = merge(base, trained.pieces, new_pieces, texts=texts, controls=controls, source=source, finished=finished)
            return merged, trained
        except _TooFewPieces as error:
            if trained.exhausted:
                raise ValueError(str(error)) from None
            candidates *= 2  # the base has many of the trained pieces already


def candidates_for(new_pieces: int) -> int:
    """Number of candidates to train in order to select `new_pieces`. A factor of 1.6 selects no better than this 1.3."""
    return new_pieces * 13 // 10 + 1000


def merge(
    base: bytes,
    candidates: Sequence[str],
    new_pieces: int,
    *,
    texts: Sequence[str] | None = None,
    controls: Sequence[str] = (),
    source: str = "the base tokenizer",
    finished: Callable[[str], None] = lambda stage: None,
) -> Merged:
    """Append `new_pieces` usable candidates to the base: the first, or with `texts` the most widely used.

    Characters take at most half of the new places while there are merges for the rest.

    Args:
        base: the bytes of the base's `tokenizer.model`.
        candidates: pieces by falling priority, U+2581 for a space.
        new_pieces: number of pieces to append.
        texts: documents to select by (see `select`); None takes the first candidates.
        controls: control pieces to append too, such as ChatML's; pieces of the base are left out.
        source: names the base in messages.
        finished: called with the name of each finished stage: "merge" (twice: all candidates, then the selected), "prune",
            "select".

    Raises:
        ValueError: the base cannot be extended (see `check_base`), or there are too few usable candidates.
    """
    base_size = check_base(base, source)
    if new_pieces < 1:
        raise ValueError(f"the number of new pieces must be at least 1, not {new_pieces}")
    proto = ModelProto.FromString(base)
    known = {piece.piece for piece in proto.pieces}
    spelled, dropped = _spelled(candidates, known, new_pieces)
    if texts is None:
        pieces = _first_reachable(proto, spelled, new_pieces)
    else:
        with_candidates = _append(proto, spelled)
        finished("merge")
        lost = set(unreachable(with_candidates, first=base_size))
        # An unreachable piece changes no encoding: `with_candidates` encodes like a model without it.
        ids = [id for id in range(base_size, base_size + len(spelled)) if id not in lost]
        pieces = [spelled[id - base_size] for id in ids]
    finished("prune")
    dropped["unreachable"] = len(spelled) - len(pieces)
    if len(pieces) < new_pieces:
        raise _TooFewPieces(
            f"{new_pieces:,} new pieces asked for, but the text gives {len(pieces):,}: ask for no more than that, "
            "or give more text"
        )
    dropped["beyond the size" if texts is None else "used too little"] = len(pieces) - new_pieces
    if texts is None:
        pieces = pieces[:new_pieces]
    else:
        encode = sentencepiece.SentencePieceProcessor(model_proto=with_candidates).encode
        scores = {piece.piece: piece.score for piece in proto.pieces if piece.type == Piece.NORMAL}
        pieces = select(pieces, new_pieces, texts, encode, ids, scores)
        finished("select")
    new_controls = [control for control in controls if control not in known]
    merged = Merged(_append(proto, pieces, new_controls), base_size, pieces, new_controls, dropped)
    finished("merge")
    return merged


def _spelled(candidates: Sequence[str], known: set[str], new_pieces: int) -> tuple[list[str], dict[str, int]]:
    """The candidates that are new and whose characters are all pieces, characters first; and the others, counted by reason."""
    fresh = [piece for piece in dict.fromkeys(candidates) if piece not in known]
    merges = [piece for piece in fresh if len(piece) > 1]
    characters = [piece for piece in fresh if len(piece) == 1]
    kept_characters = characters[: max(new_pieces // 2, new_pieces - len(merges))]
    alphabet = known.union(kept_characters)
    spelled = [piece for piece in merges if alphabet.issuperset(piece)]
    dropped = {
        "in the base already": len(candidates) - len(fresh),
        "a rare character": len(characters) - len(kept_characters),
        "has a character that is no piece": len(merges) - len(spelled),
    }
    return kept_characters + spelled, dropped


def _first_reachable(proto: Any, pieces: list[str], new_pieces: int) -> list[str]:
    """`pieces` without the unreachable pieces among the first `new_pieces`.

    The check uses the first `new_pieces` alone: a piece may be reachable only through a later piece, which will be left out.
    """
    base_size = len(proto.pieces)
    while lost := set(unreachable(_append(proto, pieces[:new_pieces]), first=base_size)):
        pieces = [piece for id, piece in enumerate(pieces, base_size) if id not in lost]
    return pieces


def unreachable(model_bytes: bytes, first: int = 0) -> list[int]:
    """Ids, from `first` on, of the pieces whose own text does not encode to them alone; hence no text encodes to them."""
    proto = ModelProto.FromString(model_bytes)
    ids = [id for id in range(first, len(proto.pieces)) if proto.pieces[id].type == Piece.NORMAL]
    texts = [proto.pieces[id].piece.replace(SPACE, " ") for id in ids]
    return [id for id, encoded in zip(ids, inside_text(proto).encode(texts, out_type=int), strict=True) if encoded != [id]]


def split_pieces(base: Tokenizer, merged: Tokenizer) -> list[list[int]]:
    """The base's ids of each piece of `merged` beyond `base`.

    Raises:
        ValueError: the merged tokenizer does not begin with the base's pieces.
    """
    pieces, known = merged.pieces(), base.pieces()
    if pieces[: len(known)] != known:
        raise ValueError("the merged tokenizer does not begin with the base tokenizer's pieces: merge into the same base")
    inside = inside_text(ModelProto.FromString(base.model_bytes))
    return inside.encode([piece.replace(SPACE, " ") for piece in pieces[len(known) :]], out_type=int)


def _append(proto: Any, pieces: Sequence[str], controls: Sequence[str] = ()) -> bytes:
    """The base with pieces appended, then control pieces."""
    merged = ModelProto()
    merged.CopyFrom(proto)
    lowest = min(piece.score for piece in proto.pieces)
    for piece, score in zip(pieces, _scores_below(lowest, len(pieces)), strict=True):
        merged.pieces.add(piece=piece, score=score, type=Piece.NORMAL)
    for control in controls:
        merged.pieces.add(piece=control, score=0.0, type=Piece.CONTROL)
    merged.trainer_spec.vocab_size = len(merged.pieces)
    merged.DiscardUnknownFields()  # self-tests: stored sample encodings, which a new piece may shorten
    return merged.SerializeToString(deterministic=True)


def _scores_below(lowest: float, count: int) -> list[float]:
    """Falling scores, 1 apart, or as close as float32 tells them apart (64 at Mistral's lowest score, -1e9)."""
    below = np.float32(lowest)
    step = max(1.0, 2 * float(np.spacing(np.abs(below))))
    scores = (float(below) - step * np.arange(1, count + 1)).astype(np.float32)
    assert np.all(np.diff(scores, prepend=below) < 0)
    return scores.tolist()
