"""The tokenizer: a SentencePiece BPE model, read from a folder's `tokenizer.model`.

That file decides, with two things of the folder's other files (see `model.vocabulary.tokenizer_folder`): tokens that were added
behind its pieces become pieces too, and a chat template of the folder's own forms conversations. All else is
derived (see `model.vocabulary.export`).
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import sentencepiece
from sentencepiece import sentencepiece_pb2

from model.vocabulary.template import CHAT_TEMPLATE, FolderTemplate
from model.vocabulary.tokenizer_folder import JSON_FILE, added_tokens, folder_template, model_of_json, with_pieces

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
        fingerprint: SHA-256 of the model file, in hexadecimal.
        model_bytes: the model file itself.
        added: control pieces that files for other readers declare as special tokens, `<s>`, `</s>` and `<unk>` left out.
        special_ids: ids by spelling of the special tokens that a chat template may write.
        template: the folder's own chat template; None for ours.
    """

    def __init__(
        self,
        model_bytes: bytes,
        source: str | Path = "the given model",
        *,
        added: Sequence[str] = (),
        template: FolderTemplate | None = None,
    ):
        """Build from the bytes of a `tokenizer.model`; `source` names it in messages.

        Args: added: control pieces that the folder declares as special tokens; ChatML's always are. template: see the class.

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
        self.fingerprint = hashlib.sha256(model_bytes).hexdigest()
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
            spelled = (piece for id, piece in enumerate(self.pieces()) if self._processor.is_control(id))
            declared += tuple(piece for piece in spelled if piece in template.source)
        ids = {piece: self._processor.piece_to_id(piece) for piece in dict.fromkeys(declared)}
        main = (self.bos_id, self.eos_id, self.unk_id)
        ids = {piece: id for piece, id in ids.items() if self._processor.is_control(id) and id not in main}
        self.added = tuple(ids)
        self.special_ids = {self._processor.id_to_piece(id): id for id in main} | ids
        self._specials = frozenset(self.special_ids.values())

    def extended(self, model_bytes: bytes) -> Tokenizer:
        """The tokenizer of a model that extends this one's, with the same special tokens and chat template."""
        return Tokenizer(model_bytes, added=self.added, template=self.template)

    @classmethod
    def load(cls, folder: str | Path) -> Tokenizer:
        """Load from a folder that holds `tokenizer.model`, or `tokenizer.json` alone, or from the path of a `*.model` file.

        Raises:
            FileNotFoundError: there is no such folder or file.
            ValueError: the file is no SentencePiece model, or the folder's other files contradict it.
        """
        path = Path(folder).expanduser()
        if path.is_file():
            return cls(path.read_bytes(), path)
        model = path / MODEL_FILE
        if not model.is_file() and (path / JSON_FILE).is_file():
            return cls.beside(path, model_of_json(path / JSON_FILE), path / JSON_FILE)
        if not model.is_file():
            file = model if path.is_dir() else path
            raise FileNotFoundError(f"no tokenizer at {file}: give a folder with {MODEL_FILE} in it, or a *.model file")
        return cls.beside(path, model.read_bytes(), model)

    @classmethod
    def beside(cls, folder: Path, model_bytes: bytes, source: str | Path) -> Tokenizer:
        """A model with the added tokens and the chat template of a folder. Raises: ValueError as `load` does."""
        base = cls(model_bytes, source)
        tokens = added_tokens(folder, base.pieces())
        behind = [token for token in tokens if token.id >= base.vocab_size]
        model_bytes = with_pieces(model_bytes, behind) if behind else model_bytes
        declared = [token.content for token in tokens if token.special]
        return cls(model_bytes, source, added=declared, template=folder_template(folder, base.special_ids))

    def encode(self, text: str) -> list[int]:
        """Ids of the text's pieces. A special token spelled in the text is plain text, so no id of one appears.

        Raises:
            ValueError: the text holds a lone surrogate, which is not valid Unicode.
        """
        try:
            return self._processor.encode(text, out_type=int)
        except _UNENCODABLE as error:
            raise _explained(error, [text]) from error

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """`encode` for each text, on all cores."""
        try:
            return self._processor.encode(list(texts), out_type=int)
        except _UNENCODABLE as error:
            raise _explained(error, texts) from error

    def encode_with_offsets(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """Ids, and for each its characters in `text` as [begin, end).

        The offsets are consecutive from 0 to len(text). Where several byte pieces spell one character, the last has the
        character and the others are empty. The space that SentencePiece puts before a text is empty where it is a piece alone.
        """
        try:
            encoded = _EncodedText.FromString(self._processor.encode(text, out_type="serialized_proto"))
        except _UNENCODABLE as error:
            raise _explained(error, [text]) from error
        ids: list[int] = []
        offsets: list[tuple[int, int]] = []
        begin = 0
        for piece in encoded.pieces:
            end = begin + len(piece.surface)
            ids.append(piece.id)
            offsets.append((begin, end))
            begin = end
        return ids, offsets

    def decode(self, ids: Sequence[int]) -> str:
        """The text of the ids, special tokens left out; invalid UTF-8 becomes U+FFFD.

        Raises:
            IndexError: an id is outside the vocabulary.
        """
        return self._processor.decode([id for id in ids if id not in self._specials])

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
