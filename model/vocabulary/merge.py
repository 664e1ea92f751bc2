"""New pieces merged into a SentencePiece BPE model without a change to what it did before.

New pieces are appended, with scores that fall with the id below every score of the base. SentencePiece joins, of all
neighbours whose text is a piece, those with the highest score first: all merges of the base come before any new one,
so base pieces are found as before, and a text from which no new piece can be built keeps its ids exactly.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import sentencepiece
from sentencepiece import sentencepiece_model_pb2

from model.vocabulary.scripts import SPACE, Scripts
from model.vocabulary.selection import select
from model.vocabulary.tokenizer import Tokenizer
from model.vocabulary.train import Trained, train

_protobuf: Any = sentencepiece_model_pb2  # its classes are made at import time, out of a type checker's sight
_Piece = _protobuf.ModelProto.SentencePiece
_TrainerSpec = _protobuf.TrainerSpec


@dataclass(frozen=True)
class Merged:
    """A merged model.

    Attributes:
        model_bytes: the new `tokenizer.model`.
        base_size: number of pieces of the base; ids below it mean what they meant.
        pieces: the new pieces, by id from `base_size` on.
        controls: control pieces, which no text encodes to, by id behind them.
        dropped: how many candidates were left out, by reason.
    """

    model_bytes: bytes
    base_size: int
    pieces: list[str]
    controls: list[str]
    dropped: dict[str, int]


class _TooFewPieces(ValueError):
    """The candidates do not suffice; more training may still give more of them."""


def check_base(model_bytes: bytes, source: str = "the base tokenizer") -> int:
    """Check that new pieces can be merged into a model; its number of pieces.

    Raises:
        ValueError: it is no SentencePiece model, not BPE (Unigram, word, character), or has no byte fallback.
    """
    Tokenizer(model_bytes, source)
    proto = _protobuf.ModelProto.FromString(model_bytes)
    if proto.trainer_spec.model_type != _TrainerSpec.BPE:
        kind = _TrainerSpec.ModelType.Name(proto.trainer_spec.model_type).lower()
        raise ValueError(f"{source} is a SentencePiece model of type {kind}: new pieces can be merged into BPE only")
    if sum(piece.type == _Piece.BYTE for piece in proto.pieces) != 256:
        raise ValueError(
            f"{source} has no byte fallback: characters that are no piece would be lost; "
            "use one trained with byte_fallback=true"
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
    lap: Callable[[str], None] = lambda stage: None,
) -> tuple[Merged, Trained]:
    """Train pieces on texts and merge `new_pieces` of them into the base, those that are used most widely in the texts.

    Calls `lap` after each stage with its name: "train", and those of `merge`.

    Raises:
        ValueError: see `train` and `merge`.
    """
    check_base(base, source)
    asked = candidates_for(new_pieces)
    while True:
        trained = train(texts, asked, scripts=scripts, coverage=coverage)
        lap("train")
        try:
            merged = merge(base, trained.pieces, new_pieces, texts=texts, controls=controls, source=source, lap=lap)
            return merged, trained
        except _TooFewPieces as error:
            if trained.exhausted:
                raise ValueError(str(error)) from None
            asked *= 2  # a base that has many of the pieces already


def candidates_for(new_pieces: int) -> int:
    """How many pieces to train for so many to be selected from; 1.6 times as many give no better selection than 1.3."""
    return new_pieces * 13 // 10 + 1000


def merge(
    base: bytes,
    candidates: Sequence[str],
    new_pieces: int,
    *,
    texts: Sequence[str] | None = None,
    controls: Sequence[str] = (),
    source: str = "the base tokenizer",
    lap: Callable[[str], None] = lambda stage: None,
) -> Merged:
    """Append `new_pieces` of the usable candidates to the base: the first, or those that texts use most widely.

    A candidate is usable if it is not in the base, all of its characters are pieces, and it is reachable: its text encodes to
    it alone. A piece that does not encode to itself is produced from no text at all, since whatever builds it in a text
    lies within its own span, where the same merges happen when it stands alone; so dropping it changes no encoding.
    Characters take at most half of the new places while there are merges for the rest.

    Args:
        base: the bytes of the base's `tokenizer.model`.
        candidates: pieces by falling priority, U+2581 for a space.
        new_pieces: how many to append.
        texts: documents to select by (see `select`). Without them the first candidates are taken.
        controls: further pieces that no text encodes to, such as ChatML's; those that the base has are left out.
        source: names the base in messages.
        lap: called after each stage with its name: "merge" (twice, for the candidates and for those that stay), "prune",
            "select".

    Raises:
        ValueError: the base cannot be extended (see `check_base`), or there are not enough usable candidates.
    """
    base_size = check_base(base, source)
    if new_pieces < 1:
        raise ValueError(f"the number of new pieces must be at least 1, not {new_pieces}")
    proto = _protobuf.ModelProto.FromString(base)
    known = {piece.piece for piece in proto.pieces}
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
    pieces = kept_characters + spelled
    if texts is None:
        # Cut before looking: a piece may be reachable only through one that the size leaves out.
        while lost := set(unreachable(_append(proto, pieces[:new_pieces]), first=base_size)):
            pieces = [piece for id, piece in enumerate(pieces, base_size) if id not in lost]
    else:
        with_candidates = _append(proto, pieces)
        lap("merge")
        lost = set(unreachable(with_candidates, first=base_size))
        # What nothing produces is in no other's way: the rest is reachable and writes texts as it would without it.
        ids = [id for id in range(base_size, base_size + len(pieces)) if id not in lost]
        pieces = [pieces[id - base_size] for id in ids]
    lap("prune")
    dropped["unreachable"] = len(kept_characters) + len(spelled) - len(pieces)
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
        scores = {piece.piece: piece.score for piece in proto.pieces if piece.type == _Piece.NORMAL}
        pieces = select(pieces, new_pieces, texts, encode, ids, scores)
        lap("select")
    new_controls = [control for control in controls if control not in known]
    merged = Merged(_append(proto, pieces, new_controls), base_size, pieces, new_controls, dropped)
    lap("merge")
    return merged


def unreachable(model_bytes: bytes, first: int = 0) -> list[int]:
    """Ids, from `first` on, of the pieces whose own text does not encode to them alone, so that no text can."""
    proto = _protobuf.ModelProto.FromString(model_bytes)
    ids = [id for id in range(first, len(proto.pieces)) if proto.pieces[id].type == _Piece.NORMAL]
    texts = [proto.pieces[id].piece.replace(SPACE, " ") for id in ids]
    return [id for id, encoded in zip(ids, _inside(proto).encode(texts, out_type=int), strict=True) if encoded != [id]]


def split_pieces(base: Tokenizer, merged: Tokenizer) -> list[list[int]]:
    """For each piece that `merged` has beyond `base`, the base's ids for its text.

    Raises:
        ValueError: the merged tokenizer does not begin with the base's pieces.
    """
    pieces, known = merged.pieces(), base.pieces()
    if pieces[: len(known)] != known:
        raise ValueError("the merged tokenizer does not begin with the base tokenizer's pieces: merge into the same base")
    inside = _inside(_protobuf.ModelProto.FromString(base.model_bytes))
    return inside.encode([piece.replace(SPACE, " ") for piece in pieces[len(known) :]], out_type=int)


def _inside(proto: Any) -> sentencepiece.SentencePieceProcessor:
    """An encoder of text as it stands inside a longer one: without what is done at the ends of a whole text."""
    inside = _protobuf.ModelProto()
    inside.CopyFrom(proto)
    inside.normalizer_spec.add_dummy_prefix = False
    inside.normalizer_spec.remove_extra_whitespaces = False
    return sentencepiece.SentencePieceProcessor(model_proto=inside.SerializeToString())


def _append(proto: Any, pieces: Sequence[str], controls: Sequence[str] = ()) -> bytes:
    """The base with pieces appended, and control pieces behind them."""
    merged = _protobuf.ModelProto()
    merged.CopyFrom(proto)
    lowest = min(piece.score for piece in proto.pieces)
    for piece, score in zip(pieces, _scores_below(lowest, len(pieces)), strict=True):
        merged.pieces.add(piece=piece, score=score, type=_Piece.NORMAL)
    for control in controls:
        merged.pieces.add(piece=control, score=0.0, type=_Piece.CONTROL)
    merged.trainer_spec.vocab_size = len(merged.pieces)
    merged.DiscardUnknownFields()  # self tests: samples of encodings that a new piece may shorten
    return merged.SerializeToString(deterministic=True)


def _scores_below(lowest: float, count: int) -> list[float]:
    """Falling scores, 1 apart, or as far as float32 has them apart (at Mistral's lowest, -1e9, that is 64)."""
    below = np.float32(lowest)
    step = max(1.0, 2 * float(np.spacing(np.abs(below))))
    scores = (float(below) - step * np.arange(1, count + 1)).astype(np.float32)
    assert np.all(np.diff(scores, prepend=below) < 0)
    return scores.tolist()
