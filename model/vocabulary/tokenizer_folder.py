"""The files beside `tokenizer.model`: tokens behind its pieces, a chat template; and `tokenizer.json` in its place."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from model.config import read_json
from model.vocabulary.proto import ModelProto, Piece, TrainerSpec
from model.vocabulary.scripts import SPACE
from model.vocabulary.template import FolderTemplate, is_ours

JSON_FILE = "tokenizer.json"
_SPECIALS = ("bos_token", "eos_token", "unk_token", "pad_token")


class AddedToken(NamedTuple):
    """A token that a folder's files declare beside the pieces of its model."""

    id: int
    content: str
    special: bool


def added_tokens(folder: Path, pieces: Sequence[str]) -> list[AddedToken]:
    """The added tokens that a folder declares, by id; some may be pieces already, others stand behind them.

    Raises: ValueError naming file and token where a token contradicts the pieces or another file, or leaves a gap.
    """
    found: dict[int, tuple[AddedToken, Path]] = {}
    for path, token in _declared(folder):
        known, where = found.setdefault(token.id, (token, path))
        if known.content != token.content:
            raise ValueError(
                f"{path}: added token {token.content!r} has id {token.id}, which is {known.content!r} in {where.name}: "
                "the files are of different tokenizers, fetch the folder again"
            )
        if token.id < len(pieces) and pieces[token.id] != token.content:
            raise ValueError(
                f"{path}: added token {token.content!r} has id {token.id}, which is the piece {pieces[token.id]!r} of the "
                "model: the files are of different tokenizers, fetch the folder again"
            )
    tokens = [found[id][0] for id in sorted(found)]
    names = {piece: id for id, piece in enumerate(pieces)}
    for number, token in enumerate((token for token in tokens if token.id >= len(pieces)), len(pieces)):
        path = found[token.id][1]
        if token.id != number:
            raise ValueError(f"{path}: added token {token.content!r} has id {token.id}, but no token has id {number}")
        if not token.content or names.setdefault(token.content, token.id) != token.id:
            raise ValueError(f"{path}: added token {token.content!r} of id {token.id} is empty, or has another id too")
    return tokens


def _declared(folder: Path) -> Iterator[tuple[Path, AddedToken]]:
    # `added_tokens.json` comes last: it says nothing of a token but its id.
    for name in (JSON_FILE, "tokenizer_config.json", "added_tokens.json"):
        path = folder / name
        if not path.is_file():
            continue
        table = read_json(path)
        try:
            if name == JSON_FILE:
                entries = [(entry["id"], entry["content"], entry.get("special", True)) for entry in table["added_tokens"]]
            elif name == "added_tokens.json":
                entries = [(id, content, True) for content, id in table.items()]
            else:
                decoder = table.get("added_tokens_decoder") or {}
                entries = [(int(id), entry["content"], entry.get("special", True)) for id, entry in decoder.items()]
            for id, content, special in entries:
                if type(id) is not int or not isinstance(content, str):
                    raise TypeError
                yield path, AddedToken(id, content, bool(special))
        except (KeyError, TypeError, ValueError, AttributeError):
            raise ValueError(f"{path}: an added token lacks its id or content; fetch the folder again") from None


def with_pieces(model_bytes: bytes, tokens: Sequence[AddedToken]) -> bytes:
    """A SentencePiece model with tokens behind its pieces: special tokens as control pieces, others as user-defined ones."""
    proto = ModelProto.FromString(model_bytes)
    for token in tokens:
        kind = Piece.CONTROL if token.special else Piece.USER_DEFINED
        proto.pieces.add(piece=token.content, score=0.0, type=kind)
    proto.trainer_spec.vocab_size = len(proto.pieces)
    proto.DiscardUnknownFields()  # self-tests: stored sample encodings, which a user-defined piece may change
    return proto.SerializeToString(deterministic=True)


def folder_template(folder: Path, specials: Mapping[str, int]) -> FolderTemplate | None:
    """A folder's own chat template; None where it has none, or ours.

    Args: specials: the model's own `<s>`, `</s>` and `<unk>` lead it, in this order, for a folder that does not name them.
    Raises: ValueError naming the file, for a template that is no text.
    """
    path = folder / "tokenizer_config.json"
    config = read_json(path) if path.is_file() else {}
    file = folder / "chat_template.jinja"
    source = file.read_text(encoding="utf-8") if file.is_file() else config.get("chat_template")
    if isinstance(source, list):
        # Several templates by name: transformers takes the default.
        named = {entry.get("name"): entry.get("template") for entry in source if isinstance(entry, dict)}
        source = named.get("default")
        if source is None:
            raise ValueError(f"{path}: chat_template names {', '.join(map(str, named))}, and none is the default")
    if source is None:
        return None
    if not isinstance(source, str):
        raise ValueError(f"{path}: chat_template is {type(source).__name__}, not text")
    if is_ours(source):
        return None
    spelled = dict(zip(_SPECIALS, specials, strict=False))
    for name in _SPECIALS:
        token = config.get(name)
        token = token.get("content") if isinstance(token, dict) else token
        if isinstance(token, str):
            spelled[name] = token
    return FolderTemplate(source, spelled)


def model_of_json(path: Path) -> bytes:
    """The SentencePiece model of a `tokenizer.json` that was made from one: BPE with byte fallback.

    Raises: ValueError naming the file where it is of another family.
    """
    table = read_json(path)
    try:
        return _model_of(table, path)
    except (KeyError, TypeError, AttributeError, StopIteration):
        raise ValueError(f"{path}: a part of the tokenizer is missing or of another form; fetch it again") from None


def _model_of(table: dict[str, Any], path: Path) -> bytes:
    model = table["model"]
    if model.get("type") != "BPE" or not model.get("byte_fallback"):
        raise _foreign(path, f"its model is {model.get('type')}, byte_fallback {model.get('byte_fallback')}")
    parts = json.dumps([table.get("normalizer"), table.get("pre_tokenizer")], ensure_ascii=False)
    if "ByteLevel" in parts or "Precompiled" in parts or "NFK" in parts or SPACE not in parts:
        raise _foreign(path, "it changes text in other ways than by writing spaces as U+2581")
    vocab: dict[str, int] = model["vocab"]
    pieces = sorted(vocab, key=vocab.__getitem__)
    if [vocab[piece] for piece in pieces] != list(range(len(pieces))):
        raise _foreign(path, "the ids of its pieces have gaps")
    special = {token["content"] for token in table["added_tokens"] if token.get("special", True)}
    defined = {token["content"] for token in table["added_tokens"]} - special
    scores = _scores(model["merges"], path)
    proto = ModelProto()
    unknown = model.get("unk_token") or "<unk>"
    unmade = {piece for piece in pieces if len(piece) > 1 and not _is_byte(piece)} - scores.keys()
    for piece in pieces:
        kind = Piece.NORMAL
        if piece == unknown:
            kind = Piece.UNKNOWN
        elif piece in special or piece in unmade:
            # No text encodes to a piece of several characters that no merge makes.
            kind = Piece.CONTROL
        elif piece in defined:
            kind = Piece.USER_DEFINED
        elif _is_byte(piece):
            kind = Piece.BYTE
        normal = kind == Piece.NORMAL
        proto.pieces.add(piece=piece, score=scores.get(piece, -float(len(scores) + 1)) if normal else 0.0, type=kind)
    proto.trainer_spec.model_type = TrainerSpec.BPE
    proto.trainer_spec.vocab_size = len(pieces)
    proto.trainer_spec.byte_fallback = True
    for name, spelling in (("unk", unknown), ("bos", "<s>"), ("eos", "</s>")):
        setattr(proto.trainer_spec, f"{name}_id", vocab.get(spelling, -1))
        setattr(proto.trainer_spec, f"{name}_piece", spelling)
    proto.trainer_spec.pad_id = -1
    proto.normalizer_spec.name = "identity"
    proto.normalizer_spec.add_dummy_prefix = '"Prepend"' in parts or '"prepend_scheme": "' in parts.replace("never", "")
    proto.normalizer_spec.remove_extra_whitespaces = False
    proto.normalizer_spec.escape_whitespaces = True
    return proto.SerializeToString(deterministic=True)


def _scores(merges: Sequence[str | Sequence[str]], path: Path) -> dict[str, float]:
    """The score of each joined piece. SentencePiece ranks pieces, a merge list pairs: a piece's pairs must rank together."""
    order: list[str] = []
    for merge in merges:
        left, right = merge.split(" ") if isinstance(merge, str) else merge
        if not order or order[-1] != left + right:
            order.append(left + right)
    if len(set(order)) < len(order):
        raise _foreign(path, "pairs that join to one piece rank apart")
    return {piece: -float(rank) for rank, piece in enumerate(order)}


def _is_byte(piece: str) -> bool:
    return len(piece) == 6 and piece.startswith("<0x") and piece.endswith(">")


def _foreign(path: Path, reason: str) -> ValueError:
    return ValueError(
        f"{path}: cannot be read as a SentencePiece BPE: {reason}; add the tokenizer.model that the model was trained with"
    )
