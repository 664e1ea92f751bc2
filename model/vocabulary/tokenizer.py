"""The tokenizer: a SentencePiece BPE model, read from a folder's `tokenizer.model`.

That file decides, with three things of the folder's other files (see `model.vocabulary.tokenizer_folder`): tokens that were
added behind its pieces become pieces too, `tokenizer.json` says where a text begins with a space, and a chat template of the
folder's own forms conversations. All else is derived (see `model.vocabulary.export`).
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import sentencepiece
from sentencepiece import sentencepiece_pb2

from model.config import read_json
from model.vocabulary.proto import ModelProto
from model.vocabulary.scripts import SPACE
from model.vocabulary.template import CHAT_TEMPLATE, FolderTemplate, own_template
from model.vocabulary.tokenizer_folder import (
    added_tokens,
    check_flags,
    config_prefix,
    folder_template,
    named_specials,
    with_pieces,
    with_prefix,
)
from model.vocabulary.tokenizer_json import JSON_FILE, Prefix, check_form, check_ids, model_of_json, read_form

MODEL_FILE = "tokenizer.model"
CHATML = ("<|im_start|>", "<|im_end|>")

_protobuf: Any = sentencepiece_pb2  # its classes are made at import time, hidden from a type checker
_EncodedText = _protobuf.SentencePieceText
_UNENCODABLE = (RuntimeError, TypeError, UnicodeEncodeError)  # versions of sentencepiece differ on invalid Unicode


class Tokenizer:
    """A SentencePiece model with `<s>`, `</s>` and `<unk>`.

    Attributes:
        vocab_size: number of pieces; an embedding may have padding rows beyond.
        bos_id, eos_id, unk_id: ids of `<s>`, `</s>`, `<unk>`. No text encodes to them.
        fingerprint: SHA-256 in hexadecimal of the model file, and of `prefix` and `spelled` where they are not its own rules.
        model_bytes: the model file itself.
        added: control pieces that files for other readers declare as special tokens, `<s>`, `</s>` and `<unk>` left out.
        special_ids: ids by spelling of the special tokens that a chat template may write.
        spelled: ids by spelling of added tokens that are not special: any text that spells one gets its id.
        prefix: where a space is put before text.
        template: the folder's own chat template; None for ours.
    """

    def __init__(
        self,
        model_bytes: bytes,
        source: str | Path = "the given model",
        *,
        added: Sequence[str] = (),
        spelled: Sequence[str] = (),
        prefix: Prefix | None = None,
        template: FolderTemplate | None = None,
    ):
        """Build from the bytes of a `tokenizer.model`; `source` names it in messages.

        Args:
            added: control pieces that the folder declares as special tokens; ChatML's always are.
            spelled, template: see the class.
            prefix: see the class; None for the model's own rule.

        Raises:
            ValueError: the bytes are no SentencePiece model, or the model lacks `<s>`, `</s>` or `<unk>`.
        """
        if not model_bytes:
            raise ValueError(f"{source} is empty, not a SentencePiece model: fetch it again")
        try:
            self._processor = sentencepiece.SentencePieceProcessor(model_proto=model_bytes)
        except RuntimeError as error:
            raise ValueError(f"{source} is not a SentencePiece model: damaged or of another format; fetch it again") from error
        self.model_bytes = model_bytes
        proto = ModelProto.FromString(model_bytes)
        own_prefix = Prefix.EACH if proto.normalizer_spec.add_dummy_prefix else Prefix.NEVER
        self.prefix = prefix or own_prefix
        rules = [] if self.prefix is own_prefix and not spelled else [self.prefix.value, *spelled]
        self.fingerprint = hashlib.sha256(model_bytes + "\0".join(rules).encode()).hexdigest()
        self.vocab_size: int = self._processor.get_piece_size()
        self.bos_id: int = self._processor.bos_id()
        self.eos_id: int = self._processor.eos_id()
        self.unk_id: int = self._processor.unk_id()
        if min(self.bos_id, self.eos_id, self.unk_id) < 0:
            raise ValueError(f"{source} lacks a beginning, end or unknown piece: train it with bos_id, eos_id and unk_id")
        self.template = template
        declared = (*CHATML, *added)
        if template is None:
            # In our template, which writes [INST] as text, the control pieces of that name stay unused.
            declared = tuple(piece for piece in declared if piece not in CHAT_TEMPLATE)
        else:
            controls = (piece for id, piece in enumerate(self.pieces()) if self._processor.is_control(id))
            declared += tuple(piece for piece in controls if piece in template.source)
        ids = {piece: self._processor.piece_to_id(piece) for piece in dict.fromkeys(declared)}
        main = (self.bos_id, self.eos_id, self.unk_id)
        ids = {piece: id for piece, id in ids.items() if self._processor.is_control(id) and id not in main}
        self.added = tuple(ids)
        self.special_ids = {self._processor.id_to_piece(id): id for id in main} | ids
        self._specials = frozenset(self.special_ids.values())
        self.spelled = {piece: self._processor.piece_to_id(piece) for piece in spelled}
        self._spelled_pattern = (
            re.compile("|".join(map(re.escape, sorted(spelled, key=len, reverse=True)))) if spelled else None
        )
        # Encodes sections that begin with no space of their own.
        self._inside = None if self.prefix is own_prefix else inside_text(proto)

    def extended(self, model_bytes: bytes) -> Tokenizer:
        """The tokenizer of a model that extends this one's, with the same added tokens, rules and chat template."""
        return self._anew(model_bytes, self.template)

    def with_template(self, source: str) -> Tokenizer:
        """The same tokenizer with this chat template, in Jinja."""
        named = {} if self.template is None else self.template.specials
        specials = [self._processor.id_to_piece(id) for id in (self.bos_id, self.eos_id, self.unk_id)]
        return self._anew(self.model_bytes, own_template(source, specials, named))

    def _anew(self, model_bytes: bytes, template: FolderTemplate | None) -> Tokenizer:
        return Tokenizer(model_bytes, added=self.added, spelled=tuple(self.spelled), prefix=self.prefix, template=template)

    @classmethod
    def load(cls, folder: str | Path) -> Tokenizer:
        """Load from a folder that holds `tokenizer.model`, or `tokenizer.json` alone, or from the path of a `*.model` file.

        Raises:
            FileNotFoundError: there is no such folder or file.
            ValueError: the file is no SentencePiece model, or the folder's other files contradict it.
        """
        path = Path(folder).expanduser()
        if path.is_file() and path.suffix == ".json":
            raise ValueError(f"{path}: a tokenizer.json counts with the files beside it: name its folder")
        if path.is_file():
            return cls(path.read_bytes(), path)
        model = path / MODEL_FILE
        if not model.is_file() and not (path / JSON_FILE).is_file():
            file = model if path.is_dir() else path
            raise FileNotFoundError(f"no tokenizer at {file}: give a folder with {MODEL_FILE} in it, or a *.model file")
        return cls.beside(path, model if model.is_file() else None)

    @classmethod
    def beside(cls, folder: Path, model: Path | None) -> Tokenizer:
        """A model file with the other files of a folder; None: the folder has `tokenizer.json` alone. Raises: as `load`."""
        file = folder / JSON_FILE
        table = read_json(file) if file.is_file() else None
        if model is not None:
            model_bytes, source = model.read_bytes(), model
        else:
            assert table is not None
            specials = named_specials(folder)
            model_bytes, source = model_of_json(table, file, specials.get("bos_token"), specials.get("eos_token")), file
        base = cls(model_bytes, source)
        tokens = added_tokens(folder, base.pieces())
        behind = [token for token in tokens if token.id >= base.vocab_size]
        model_bytes = with_pieces(model_bytes, behind) if behind else model_bytes
        if table is None:
            prefix = config_prefix(folder) or base.prefix
        else:
            form = read_form(table, file)
            prefix = form.prefix
            if model is not None:
                check_form(form, table, model_bytes, file)
        template = folder_template(folder, base.special_ids)
        check_flags(folder, tokens, prefix, template)
        tokenizer = cls(
            with_prefix(model_bytes, prefix),
            source,
            added=[token.content for token in tokens if token.special],
            spelled=[token.content for token in tokens if not token.special],
            prefix=prefix,
            template=template,
        )
        if model is None:
            check_ids(file, tokenizer.pieces(), tokenizer.encode_batch, tokenizer.decode)
        return tokenizer

    def encode(self, text: str) -> list[int]:
        """Ids of the text's pieces. A special token spelled in the text is plain text, so no id of one appears.

        Raises:
            ValueError: the text holds a lone surrogate, which is not valid Unicode.
        """
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """`encode` for each text, on all cores."""
        try:
            if self._spelled_pattern is None and self._inside is None:
                return self._processor.encode(list(texts), out_type=int)
            return self._encode_sections(texts)
        except _UNENCODABLE as error:
            raise _explained(error, texts) from error

    def _encode_sections(self, texts: Sequence[str]) -> list[list[int]]:
        """`encode_batch` where texts have sections: all sections of one kind are encoded together."""
        sections = [(number, *section) for number, text in enumerate(texts) for section in self._sections(text, True)]
        ids: list[list[int]] = [[id] if processor is None else [] for _, _, processor, id in sections]
        for engine in (self._processor, self._inside):
            places = [place for place, (_, _, processor, _) in enumerate(sections) if processor is engine]
            if engine is not None and places:
                found = engine.encode([sections[place][1] for place in places], out_type=int)
                for place, encoded in zip(places, found, strict=True):
                    ids[place] = encoded
        joined: list[list[int]] = [[] for _ in texts]
        for (number, *_), encoded in zip(sections, ids, strict=True):
            joined[number] += encoded
        return joined

    def _sections(self, text: str, first: bool) -> Iterator[tuple[str, Any, int]]:
        """The added tokens in a text and the texts between them: (text, processor or None, id of an added token)."""
        done = 0
        ends = [] if self._spelled_pattern is None else self._spelled_pattern.finditer(text)
        for found in [*ends, None]:
            section = text[done : None if found is None else found.start()]
            if section:
                prefixed = self.prefix is Prefix.MISSING or (first and done == 0)
                inside = self._inside is not None and (not prefixed or section.startswith((" ", SPACE)))
                yield section, self._inside if inside else self._processor, 0
            if found is not None:
                yield found[0], None, self.spelled[found[0]]
                done = found.end()

    def encode_with_offsets(self, text: str, *, first: bool = True) -> tuple[list[int], list[tuple[int, int]]]:
        """Ids, and for each its characters in `text` as [begin, end).

        The offsets are consecutive from 0 to len(text). Where several byte pieces spell one character, the last has the
        character and the others are empty. The space that SentencePiece puts before a text is empty where it is a piece alone.

        Args: first: whether the text is the beginning of a conversation, and not a section behind a special token.
        """
        ids: list[int] = []
        offsets: list[tuple[int, int]] = []
        begin = 0
        for section, processor, spelled_id in self._sections(text, first):
            if processor is None:
                pieces = [(spelled_id, len(section))]
            else:
                try:
                    encoded = _EncodedText.FromString(processor.encode(section, out_type="serialized_proto"))
                except _UNENCODABLE as error:
                    raise _explained(error, [text]) from error
                pieces = [(piece.id, len(piece.surface)) for piece in encoded.pieces]
            for id, length in pieces:
                ids.append(id)
                offsets.append((begin, begin + length))
                begin += length
        return ids, offsets

    def decode(self, ids: Sequence[int]) -> str:
        """The text of the ids, special tokens left out; invalid UTF-8 becomes U+FFFD.

        Raises:
            IndexError: an id is outside the vocabulary.
        """
        return self._processor.decode([id for id in ids if id not in self._specials])

    def spell(self, ids: Sequence[int]) -> str:
        """The text of the ids with every space and special token; invalid UTF-8 becomes U+FFFD."""
        raw = bytearray()
        for id in ids:
            byte = self._byte(id)
            raw += self._processor.id_to_piece(id).replace(SPACE, " ").encode() if byte is None else bytes([byte])
        return raw.decode(errors="replace")

    def pieces(self) -> list[str]:
        """The pieces by id, as the model spells them: U+2581 for a space."""
        return [self._processor.id_to_piece(id) for id in range(self.vocab_size)]

    def stream_decoder(self) -> StreamDecoder:
        """A decoder that takes ids one at a time."""
        return StreamDecoder(self)

    def _is_control(self, id: int) -> bool:
        return bool(self._processor.is_control(id))

    def _byte(self, id: int) -> int | None:
        """The byte of a byte piece, None for any other piece."""
        return int(self._processor.id_to_piece(id)[3:-1], 16) if self._processor.is_byte(id) else None


class StreamDecoder:
    """Decodes a growing sequence of ids. The returned texts, joined, equal `Tokenizer.decode` of the sequence."""

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        # Ids from the last piece that is no byte on: with them, later ids decode as in the full sequence.
        self._ids: list[int] = []
        self._bytes: list[int] = []
        self._given = ""

    def push(self, id: int) -> str:
        """The text that the id adds; empty for a special token and for a byte of an incomplete character."""
        if id in self._tokenizer._specials:
            return ""
        if self._tokenizer._is_control(id):
            # It has no text, but the next piece is no longer the first, whose leading space decoding drops.
            self._ids.append(id)
            self._bytes = []
            return self._advance(self._tokenizer.decode(self._ids))
        byte = self._tokenizer._byte(id)
        self._bytes = [] if byte is None else [*self._bytes, byte]
        self._ids.append(id)
        whole = len(self._ids) - _incomplete(self._bytes)
        new = self._advance(self._tokenizer.decode(self._ids[:whole]))
        if byte is None:
            self._ids = [id]
            self._given = self._tokenizer.decode(self._ids)
        return new

    def finish(self) -> str:
        """The rest: U+FFFD for each byte of a character that stayed incomplete."""
        return self._advance(self._tokenizer.decode(self._ids))

    def _advance(self, text: str) -> str:
        new = text[len(self._given) :]
        self._given = text
        return new


def mistral_tokenizer_path() -> Path:
    """Mistral 7B v0.1's `tokenizer.model`, from the package mistral-common; no network.

    Raises: FileNotFoundError where the package is not installed.
    """
    try:
        import mistral_common
    except ImportError:
        raise FileNotFoundError(
            "Mistral 7B's own tokenizer comes with mistral-common, which is not installed: "
            "pip install mistral-common, or name a tokenizer folder"
        ) from None

    return Path(mistral_common.__file__).parent / "data" / "tokenizer.model.v1"


def inside_text(proto: Any) -> sentencepiece.SentencePieceProcessor:
    """An encoder for text inside a longer text: it adds and removes no spaces at the ends."""
    inside = type(proto)()
    inside.CopyFrom(proto)
    inside.normalizer_spec.add_dummy_prefix = False
    inside.normalizer_spec.remove_extra_whitespaces = False
    return sentencepiece.SentencePieceProcessor(model_proto=inside.SerializeToString())


def _incomplete(run: list[int]) -> int:
    """Number of bytes at the end of the run that begin an incomplete UTF-8 character."""
    for held in range(1, min(3, len(run)) + 1):
        lead = run[-held]
        if lead >= 0xC0:
            length = 2 if lead < 0xE0 else 3 if lead < 0xF0 else 4
            return held if held < length else 0
        if lead < 0x80:
            return 0
    return 0


def _explained(error: Exception, texts: Sequence[str]) -> Exception:
    """An error that names the lone surrogate in the texts; the error itself if there is none."""
    for text in texts:
        for place, character in enumerate(text):
            if "\ud800" <= character <= "\udfff":
                return ValueError(
                    f"character {place} of the text is U+{ord(character):04X}, half of a surrogate pair: not valid Unicode; "
                    "repair or drop the text"
                )
    return error
