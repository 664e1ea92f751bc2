"""The files of a tokenizer folder, made from its SentencePiece model.

Why write `tokenizer.json` here: readers that convert a SentencePiece model themselves order the merges by id, while
SentencePiece orders them by score. Their ids differ, even for Mistral's own model, whose runs of spaces have low ids and the
lowest scores. Why name no Llama class: its loader would replace the normalizer.
"""

from __future__ import annotations

import base64
import json
import re
from pathlib import Path
from typing import Any

from model.folder import write_file
from model.vocabulary.proto import ModelProto, Piece, TrainerSpec
from model.vocabulary.scripts import SPACE
from model.vocabulary.template import CHAT_TEMPLATE
from model.vocabulary.tokenizer import MODEL_FILE, Tokenizer, inside_text
from model.vocabulary.tokenizer_json import Prefix

_NO_LIMIT = 10**30  # transformers' number for a tokenizer without a maximum length


def write_tokenizer_folder(folder: str | Path, tokenizer: Tokenizer | bytes) -> None:
    """Write `tokenizer.model` and, derived from it, tokenizer.json, tokenizer_config.json (with the chat template),
    special_tokens_map.json and chat_template.jinja.

    `AutoTokenizer` gives the same ids as sentencepiece, with two exceptions. A text that spells `<s>`, `</s>`, `<unk>` or
    another special token of the tokenizer, such as ChatML's, gives special tokens there. And a model that normalizes text may
    differ where several combining marks follow one another.

    Args: tokenizer: the tokenizer, or the bytes of a `tokenizer.model` without added tokens and with our chat template.

    The bytes depend on the tokenizer alone. `tokenizer.model` is written last: a folder that has it has all files.

    Raises:
        ValueError: the model is not BPE, or writes spaces in a way that tokenizer.json cannot express.
    """
    tokenizer = tokenizer if isinstance(tokenizer, Tokenizer) else Tokenizer(tokenizer)
    proto = ModelProto.FromString(tokenizer.model_bytes)
    pieces = tokenizer.pieces()
    own = {
        "bos_token": pieces[tokenizer.bos_id],
        "eos_token": pieces[tokenizer.eos_id],
        "unk_token": pieces[tokenizer.unk_id],
    }
    template = tokenizer.template
    specials = own | ({} if template is None else dict(template.specials))
    # Chat templates spell these tokens. Other control pieces stay ordinary entries, as no text may encode to them.
    spelled = set(tokenizer.spelled.values())
    added = [
        {"id": id, "content": pieces[id], "special": id not in spelled}
        | dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
        for id in sorted({*tokenizer.special_ids.values(), *spelled})
    ]
    source = CHAT_TEMPLATE if template is None else template.source
    config = {
        "add_bos_token": True,
        "add_eos_token": False,
        "added_tokens_decoder": {
            str(token["id"]): {key: value for key, value in token.items() if key != "id"} for token in added
        },
        **specials,
        "chat_template": source,
        "clean_up_tokenization_spaces": False,
        "model_max_length": _NO_LIMIT,
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    write_file(folder / "tokenizer.json", _json(_tokenizer_json(proto, tokenizer.prefix, added, own), indent=None))
    write_file(folder / "tokenizer_config.json", _json(config))
    write_file(folder / "special_tokens_map.json", _json(specials))
    write_file(folder / "chat_template.jinja", source)
    write_file(folder / MODEL_FILE, tokenizer.model_bytes)


def _tokenizer_json(proto: Any, prefix: Prefix, added: list[dict[str, Any]], specials: dict[str, str]) -> dict[str, Any]:
    """The content of `tokenizer.json`, in the form of the package `tokenizers`."""
    spec = proto.normalizer_spec
    if proto.trainer_spec.model_type != TrainerSpec.BPE:
        raise ValueError("only a SentencePiece model of type BPE can be written as a tokenizer folder")
    if proto.trainer_spec.treat_whitespace_as_suffix or not spec.escape_whitespaces:
        raise ValueError(
            "this SentencePiece model writes spaces at the end of words, or as they are: use one with "
            "treat_whitespace_as_suffix=false and escape_whitespaces=true"
        )
    normalizers: list[dict[str, Any]] = []
    if spec.precompiled_charsmap:
        if "nfkc" in spec.name:
            # The table alone misses composites of more than five bytes, such as half-width kana with a voicing mark.
            normalizers.append({"type": "NFKC"})
        charsmap = base64.b64encode(spec.precompiled_charsmap).decode()
        normalizers.append({"type": "Precompiled", "precompiled_charsmap": charsmap})
    if spec.remove_extra_whitespaces:
        normalizers.append({"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": " "})
        normalizers.append({"type": "Strip", "strip_left": True, "strip_right": True})
    if prefix is Prefix.EACH:
        normalizers.append({"type": "Prepend", "prepend": SPACE})
    normalizers.append({"type": "Replace", "pattern": {"String": " "}, "content": SPACE})
    pre_tokenizers: list[dict[str, Any]] = []
    if prefix in (Prefix.FIRST, Prefix.MISSING):
        scheme = "first" if prefix is Prefix.FIRST else "always"
        pre_tokenizers.append({"type": "Metaspace", "replacement": SPACE, "prepend_scheme": scheme, "split": False})
    decoders: list[dict[str, Any]] = [
        {"type": "Replace", "pattern": {"String": SPACE}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
    ]
    if spec.add_dummy_prefix:
        decoders.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    # User-defined pieces match before any merge: split off first, then taken whole. As added tokens, each would begin a new
    # text, with a space before it.
    own_ids = {token["id"] for token in added}
    defined = [piece.piece for id, piece in enumerate(proto.pieces) if piece.type == Piece.USER_DEFINED and id not in own_ids]
    pattern = "|".join(map(re.escape, sorted(defined, key=len, reverse=True)))
    splits = [pattern, _whole(proto)] if defined else []
    pre_tokenizers += [
        {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
        for pattern in filter(None, splits)
    ]
    bos = specials["bos_token"]
    bos_id = next(token["id"] for token in added if token["content"] == bos)
    first, second = ({"Sequence": {"id": name, "type_id": type_id}} for name, type_id in (("A", 0), ("B", 1)))
    start, restart = ({"SpecialToken": {"id": bos, "type_id": type_id}} for type_id in (0, 1))
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": {"type": "Sequence", "normalizers": normalizers},
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": pre_tokenizers} if pre_tokenizers else None,
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [start, first],
            "pair": [start, first, restart, second],
            "special_tokens": {bos: {"id": bos, "ids": [bos_id], "tokens": [bos]}},
        },
        "decoder": {"type": "Sequence", "decoders": decoders},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": specials["unk_token"],
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": True,
            "byte_fallback": bool(proto.trainer_spec.byte_fallback),
            "ignore_merges": bool(defined),
            "vocab": {piece.piece: id for id, piece in enumerate(proto.pieces)},
            "merges": _merges(proto),
        },
    }


def _whole(proto: Any) -> str:
    """A pattern of the first piece of a text that spells, as a whole, a piece which text never encodes to.

    Between user-defined pieces, a text that is an entry is taken whole; split after its first piece, it is encoded as ever.
    """
    inside = inside_text(proto)
    entries = {piece.piece: id for id, piece in enumerate(proto.pieces)}
    starts = []
    for text, id in entries.items():
        if proto.pieces[id].type not in (Piece.NORMAL, Piece.CONTROL, Piece.UNUSED):
            continue
        found = inside.encode(text.replace(SPACE, " "), out_type=str)
        if len(found) > 1:
            first = found[0]
            starts.append(f"{re.escape(first)}(?={re.escape(text[len(first) :])}\\z)")
    return f"\\A(?:{'|'.join(starts)})" if starts else ""


def _merges(proto: Any) -> list[str]:
    """Every pair of pieces that joins to a piece, in SentencePiece's order of joining, as text that all versions read.

    SentencePiece joins the pair whose piece has the highest score, the leftmost among equals; a merge list joins the pair that
    comes first in it. Among equal scores (runs of spaces) longer pieces come first: a run then grows from its left end to the
    longest piece, as under the leftmost rule. For the same reason a piece's longer left half comes first.
    """
    scores = {piece.piece: piece.score for piece in proto.pieces if piece.type == Piece.NORMAL}
    order = sorted(scores, key=lambda piece: (-scores[piece], -len(piece)))
    return [
        f"{piece[:cut]} {piece[cut:]}"
        for piece in order
        for cut in range(len(piece) - 1, 0, -1)
        if piece[:cut] in scores and piece[cut:] in scores
    ]


def _json(value: Any, indent: int | None = 2) -> str:
    return json.dumps(value, ensure_ascii=False, indent=indent) + "\n"
