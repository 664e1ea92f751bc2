"""A foreign `tokenizer.json`: how it begins a text, and the SentencePiece model that it was made from.

Every part that changes ids is either expressed here or refused by name. A model made from a `tokenizer.json` alone is also
compared with the package `tokenizers`, on each piece and on random rows of pieces.
"""

from __future__ import annotations

import random
import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from enum import Enum
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

from model.vocabulary.proto import ModelProto, Piece, TrainerSpec
from model.vocabulary.scripts import SPACE

JSON_FILE = "tokenizer.json"


class Prefix(Enum):
    """Where a space is put before text. Special tokens cut a text into sections."""

    EACH = "each"  # before every section: SentencePiece's own rule
    MISSING = "missing"  # before every section that begins with no space: Metaspace, `always`
    FIRST = "first"  # before the whole text, if it begins with no space: Metaspace, `first`
    NEVER = "never"


class Form(NamedTuple):
    """What a `tokenizer.json` does to text before it joins pieces."""

    prefix: Prefix
    tidies: bool  # removes spaces at the ends and repeated ones
    charsmap: bool  # normalizes characters by a table of SentencePiece's
    splits: bool  # splits at patterns


def read_form(table: Mapping[str, Any], path: Path) -> Form:
    """What a `tokenizer.json` does to text. Raises: ValueError naming the part that no SentencePiece model can express."""
    try:
        return _form(table, path)
    except (KeyError, TypeError, AttributeError):
        raise _damaged(path) from None


def _form(table: Mapping[str, Any], path: Path) -> Form:
    prepends = replaces = tidies = charsmap = splits = False
    for part in _parts(table.get("normalizer"), "normalizers"):
        match part:
            case {"type": "Prepend", "prepend": "\u2581"}:
                prepends = True
            case {"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"}:
                replaces = True
            case {"type": "Strip"} | {"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": " "}:
                tidies = True
            case {"type": "NFKC" | "Precompiled"}:
                charsmap = True
            case _:
                raise foreign(path, f"its normalizer holds {part}")
    prefix = Prefix.EACH if prepends else Prefix.NEVER
    for part in _parts(table.get("pre_tokenizer"), "pretokenizers"):
        match part:
            case {"type": "Metaspace", "replacement": "\u2581"}:
                # After a normalizer that prepends, no section begins without a space.
                prefix = prefix if prepends else _metaspace(part, path)
                replaces = True
                if part.get("split", True) and any(SPACE in piece[1:] for piece in table["model"]["vocab"]):
                    raise foreign(path, "its pre_tokenizer splits at spaces (Metaspace, split), which some pieces hold")
            case {"type": "Split", "pattern": {"Regex": _}, "behavior": "Isolated", "invert": False}:
                splits = True
            case _:
                raise foreign(path, f"its pre_tokenizer holds {part}")
    if not replaces:
        raise foreign(path, "it does not write spaces as U+2581")
    return Form(prefix, tidies, charsmap, splits)


def _parts(value: Any, inner: str) -> Iterator[Mapping[str, Any]]:
    if value is not None and value["type"] == "Sequence":
        for part in value[inner]:
            yield from _parts(part, inner)
    elif value is not None:
        yield value


def _metaspace(part: Mapping[str, Any], path: Path) -> Prefix:
    scheme = part.get("prepend_scheme", "always" if part.get("add_prefix_space", True) else "never")
    known = {"always": Prefix.MISSING, "first": Prefix.FIRST, "never": Prefix.NEVER}
    if scheme not in known:
        raise foreign(path, f"its pre_tokenizer has the prepend_scheme {scheme!r}")
    return known[scheme]


def check_form(form: Form, table: Mapping[str, Any], model_bytes: bytes, path: Path) -> None:
    """Check that a `tokenizer.json` agrees with the `tokenizer.model` beside it. Raises: ValueError naming the difference."""
    proto = ModelProto.FromString(model_bytes)
    for name, here, there in (
        ("repeated spaces are removed", form.tidies, proto.normalizer_spec.remove_extra_whitespaces),
        ("characters are normalized", form.charsmap, bool(proto.normalizer_spec.precompiled_charsmap)),
    ):
        if here != there:
            files = (path.name, "tokenizer.model") if here else ("tokenizer.model", path.name)
            raise _contradiction(path, f"by {files[0]} {name}, by {files[1]} not")
    if form.splits and all(piece.type != Piece.USER_DEFINED for piece in proto.pieces):
        raise _contradiction(path, "its pre_tokenizer splits text at patterns, which tokenizer.model does not")
    for piece, id in table["model"]["vocab"].items():
        there = proto.pieces[id].piece if id < len(proto.pieces) else None
        if there != piece:
            raise _contradiction(path, f"id {id} is {piece!r} here, {'no piece' if there is None else repr(there)} there")
    scores = {piece.piece: piece.score for piece in proto.pieces}
    joined = _joined(table["model"]["merges"])
    early = next((right for left, right in pairwise(joined) if scores[left] < scores[right]), None)
    if early is not None:
        warnings.warn(
            f"{path} joins pieces in another order than the tokenizer.model beside it ({early!r} later), so their "
            "readers get different ids for some texts, such as texts with several spaces; tokenizer.model counts here. Remove "
            "tokenizer.model if the model was trained with tokenizer.json",
            stacklevel=3,
        )


def model_of_json(table: Mapping[str, Any], path: Path, bos: str | None = None, eos: str | None = None) -> bytes:
    """The SentencePiece model of a `tokenizer.json` that was made from one: BPE with byte fallback.

    Args: bos, eos: spellings of the beginning and the end where `<s>` and `</s>` are no pieces; None: there are none.
    Raises: ValueError naming the file and its part where it is of another family.
    """
    try:
        return _model_of(table, path, bos, eos)
    except (KeyError, TypeError, AttributeError):
        raise _damaged(path) from None


def _model_of(table: Mapping[str, Any], path: Path, bos: str | None, eos: str | None) -> bytes:
    model = table["model"]
    if model.get("type") != "BPE" or not model.get("byte_fallback"):
        raise foreign(path, f"its model is {model.get('type')}, byte_fallback {model.get('byte_fallback')}")
    for name in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(name):
            raise foreign(path, f"its model has {name} {model[name]!r}")
    form = read_form(table, path)
    if form.charsmap or form.splits:
        raise foreign(path, f"it {'normalizes characters' if form.charsmap else 'splits text at patterns'}")
    added = {token["content"]: token for token in table["added_tokens"]}
    ids: dict[str, int] = model["vocab"] | {content: token["id"] for content, token in added.items()}
    pieces = sorted(ids, key=ids.__getitem__)
    if [ids[piece] for piece in pieces] != list(range(len(pieces))):
        raise foreign(path, "the ids of its pieces have gaps")
    unknown = model.get("unk_token") or "<unk>"
    if unknown not in ids or sum(map(_is_byte, pieces)) != 256:
        raise foreign(path, f"it lacks the unknown piece {unknown!r} or a byte")
    scores = _scores(model["merges"])
    proto = ModelProto()
    for piece in pieces:
        if piece == unknown:
            kind = Piece.UNKNOWN
        elif piece in added:
            kind = Piece.CONTROL if added[piece].get("special", True) else Piece.USER_DEFINED
        elif _is_byte(piece):
            kind = Piece.BYTE
        else:
            # No text encodes to a piece of several characters that no merge makes.
            kind = Piece.NORMAL if len(piece) == 1 or piece in scores else Piece.CONTROL
        normal = kind == Piece.NORMAL
        proto.pieces.add(piece=piece, score=scores.get(piece, -float(len(scores) + 1)) if normal else 0.0, type=kind)
    proto.trainer_spec.model_type = TrainerSpec.BPE
    proto.trainer_spec.vocab_size = len(pieces)
    proto.trainer_spec.byte_fallback = True
    for name, usual, named in (("unk", unknown, None), ("bos", "<s>", bos), ("eos", "</s>", eos)):
        spelling = usual if usual in ids or named is None else named
        setattr(proto.trainer_spec, f"{name}_id", ids.get(spelling, -1))
        setattr(proto.trainer_spec, f"{name}_piece", spelling)
    proto.trainer_spec.pad_id = -1
    proto.normalizer_spec.name = "identity"
    proto.normalizer_spec.add_dummy_prefix = form.prefix is not Prefix.NEVER
    proto.normalizer_spec.remove_extra_whitespaces = form.tidies
    proto.normalizer_spec.escape_whitespaces = True
    return proto.SerializeToString(deterministic=True)


def _scores(merges: Sequence[str | Sequence[str]]) -> dict[str, float]:
    """The score of each joined piece.

    A merge list ranks pairs, SentencePiece ranks pieces and among equal scores takes the leftmost. Pieces whose pairs rank
    between one another's, as runs of spaces do, therefore share a score.
    """
    joined = _joined(merges)
    last = {piece: rank for rank, piece in enumerate(joined)}
    scores: dict[str, float] = {}
    group, end = 0, -1
    for rank, piece in enumerate(joined):
        if rank > end:
            group = rank
        scores.setdefault(piece, -float(group))
        end = max(end, last[piece])
    return scores


def check_ids(
    path: Path,
    pieces: Sequence[str],
    encode: Callable[[Sequence[str]], list[list[int]]],
    decode: Callable[[Sequence[int]], str],
) -> None:
    """Compare ids with the package `tokenizers`: of each piece, of random rows of pieces, and of repeated characters.

    Raises: ValueError naming the first text that has other ids.
    """
    import tokenizers

    try:
        reference = tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the package raises nothing more specific
        raise ValueError(f"{path}: the package tokenizers cannot read it: {error}") from None
    reference.no_truncation()
    reference.no_padding()
    special = {token.content for token in reference.get_added_tokens_decoder().values() if token.special}
    plain = [piece.replace(SPACE, " ") for piece in pieces if not _is_byte(piece) and piece not in special]
    draw = random.Random(0)
    rows = ["".join(draw.choices(plain, k=draw.randint(2, 8))) for _ in range(2000)]
    rows += [character * count for character in (" ", "=", "-", "a") for count in range(2, 70)]
    spells = re.compile("|".join(map(re.escape, special)) or r"\Z.")
    texts = [text for text in rows + plain if not spells.search(text)]
    theirs = [found.ids for found in reference.encode_batch(texts, add_special_tokens=False)]
    for number, (text, expected, found) in enumerate(zip(texts, theirs, encode(texts), strict=True)):
        if found != expected:
            raise foreign(path, f"the text {text[:40]!r} would get the ids {found[:8]} instead of {expected[:8]}")
        if number < len(rows) and decode(found) != reference.decode(found):
            raise foreign(path, f"the ids of {text[:40]!r} would be decoded as {decode(found)[:40]!r}")


def _joined(merges: Sequence[str | Sequence[str]]) -> list[str]:
    """The pieces that a merge list makes; it holds pairs, or in older files texts with a space between two pieces."""
    return ["".join(merge.split(" ")) if isinstance(merge, str) else "".join(merge) for merge in merges]


def _is_byte(piece: str) -> bool:
    return len(piece) == 6 and piece.startswith("<0x") and piece.endswith(">")


def foreign(path: Path, reason: str) -> ValueError:
    return ValueError(
        f"{path}: cannot be read as a SentencePiece BPE: {reason}; add the tokenizer.model that the model was trained with"
    )


def _contradiction(path: Path, reason: str) -> ValueError:
    return ValueError(
        f"{path}: contradicts the tokenizer.model beside it: {reason}; remove the file that is not the model's own"
    )


def _damaged(path: Path) -> ValueError:
    return ValueError(f"{path}: a part of the tokenizer is missing or of another form; fetch it again")
