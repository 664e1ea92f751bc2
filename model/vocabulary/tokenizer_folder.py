"""The files beside `tokenizer.model`: tokens behind its pieces, the beginning of texts, a chat template."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from model.config import read_json
from model.vocabulary.proto import ModelProto, Piece
from model.vocabulary.scripts import SPACE
from model.vocabulary.template import SPECIALS, FolderTemplate, own_template
from model.vocabulary.tokenizer_json import JSON_FILE, Prefix

CONFIG_FILE = "tokenizer_config.json"
_FLAGS = ("lstrip", "rstrip", "single_word", "normalized")


class AddedToken(NamedTuple):
    """A token that a folder's files declare beside the pieces of its model."""

    id: int
    content: str
    special: bool
    flags: tuple[str, ...] = ()  # ways in which the token, or text beside it, differs from its spelling


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
    for name in (JSON_FILE, CONFIG_FILE, "added_tokens.json"):
        path = folder / name
        if not path.is_file():
            continue
        table = read_json(path)
        try:
            if name == JSON_FILE:
                entries = [(entry["id"], entry) for entry in table["added_tokens"]]
            elif name == CONFIG_FILE:
                entries = [(int(id), entry) for id, entry in (table.get("added_tokens_decoder") or {}).items()]
            else:
                entries = [(id, {"content": content}) for content, id in table.items()]
            for id, entry in entries:
                if type(id) is not int or not isinstance(entry["content"], str):
                    raise TypeError
                flags = tuple(flag for flag in _FLAGS if entry.get(flag))
                yield path, AddedToken(id, entry["content"], bool(entry.get("special", True)), flags)
        except (KeyError, TypeError, ValueError, AttributeError):
            raise ValueError(f"{path}: an added token lacks its id or content; fetch the folder again") from None


def config_prefix(folder: Path) -> Prefix | None:
    """Where a folder without tokenizer.json puts a space before text, by its tokenizer_config.json; None: as the model says."""
    config = read_json(folder / CONFIG_FILE) if (folder / CONFIG_FILE).is_file() else {}
    if config.get("add_prefix_space") is False:
        return Prefix.NEVER
    return Prefix.FIRST if config.get("legacy") is False else None


def check_flags(folder: Path, tokens: Sequence[AddedToken], prefix: Prefix, template: FolderTemplate | None) -> None:
    """Check that added tokens which texts or the chat template can give are found exactly as they are spelled.

    Raises: ValueError naming the token and its flags.
    """
    for token in tokens:
        # Normalizing changes a token's spelling only where a space is put before each section.
        flags = [flag for flag in token.flags if flag != "normalized" or prefix is Prefix.EACH]
        if SPACE in token.content and not token.special:
            raise ValueError(
                f"{folder}: added token {token.content!r} holds U+2581, which is a space in pieces alone, so texts with a "
                "space there get other ids: write the token without it"
            )
        written = template is not None and (token.content in template.source or token.content in template.specials.values())
        if flags and (written or not token.special):
            raise ValueError(
                f"{folder}: added token {token.content!r} has the flag {flags[0]}, by which texts with it get other ids than "
                f"they spell: set the flag to false in {JSON_FILE} and {CONFIG_FILE} if the model was trained without it"
            )


def with_prefix(model_bytes: bytes, prefix: Prefix) -> bytes:
    """A SentencePiece model that puts a space before a text, or none."""
    proto = ModelProto.FromString(model_bytes)
    wanted = prefix is not Prefix.NEVER
    if proto.normalizer_spec.add_dummy_prefix == wanted:
        return model_bytes
    proto.normalizer_spec.add_dummy_prefix = wanted
    proto.DiscardUnknownFields()  # self-tests: stored sample encodings, which this changes
    return proto.SerializeToString(deterministic=True)


def with_pieces(model_bytes: bytes, tokens: Sequence[AddedToken]) -> bytes:
    """A SentencePiece model with tokens behind its pieces: special tokens as control pieces, others as user-defined ones."""
    proto = ModelProto.FromString(model_bytes)
    for token in tokens:
        kind = Piece.CONTROL if token.special else Piece.USER_DEFINED
        proto.pieces.add(piece=token.content, score=0.0, type=kind)
    proto.trainer_spec.vocab_size = len(proto.pieces)
    proto.DiscardUnknownFields()  # self-tests: stored sample encodings, which a user-defined piece may change
    return proto.SerializeToString(deterministic=True)


def named_specials(folder: Path) -> dict[str, str]:
    """The special tokens that a folder's tokenizer_config.json names, such as bos_token, by name."""
    config = read_json(folder / CONFIG_FILE) if (folder / CONFIG_FILE).is_file() else {}
    tokens = {name: config.get(name) for name in SPECIALS}
    tokens = {name: token.get("content") if isinstance(token, dict) else token for name, token in tokens.items()}
    return {name: token for name, token in tokens.items() if isinstance(token, str)}


def folder_template(folder: Path, specials: Mapping[str, int]) -> FolderTemplate | None:
    """A folder's own chat template; None where it has none, or ours.

    Args: specials: the model's own `<s>`, `</s>` and `<unk>` lead it, in this order, for a folder that does not name them.
    Raises: ValueError naming the file, for a template that is no text.
    """
    path = folder / CONFIG_FILE
    file = folder / "chat_template.jinja"
    config = read_json(path) if path.is_file() else {}
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
    return own_template(source, list(specials), named_specials(folder))
