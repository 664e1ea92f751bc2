"""Foreign tokenizer.json of every form, alone and beside tokenizer.model: the ids of `tokenizers`, or a refusal by name."""

import json
import random

import pytest
import tokenizers
from transformers import PreTrainedTokenizerFast

from model.vocabulary.chat import Message, encode_chat, encode_prompt
from model.vocabulary.export import write_tokenizer_folder
from model.vocabulary.merge import merge
from model.vocabulary.proto import ModelProto, Piece
from model.vocabulary.template import CHAT_TEMPLATE
from model.vocabulary.tokenizer import Tokenizer
from model.vocabulary.tokenizer_json import Prefix

PREPEND = {"type": "Prepend", "prepend": "▁"}
REPLACE = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
DECODERS = [{"type": "Replace", "pattern": {"String": "▁"}, "content": " "}, {"type": "ByteFallback"}, {"type": "Fuse"}]
STRIP = {"type": "Strip", "content": " ", "start": 1, "stop": 0}
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{{'<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>'}}"
    "{{ 'x  y' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
CHAT = [
    Message(role=role, content=text) for role, text in (("user", " the  model"), ("assistant", "a <call> 犬"), ("user", "b"))
]


def normalizer(*parts):
    return {"type": "Sequence", "normalizers": list(parts)}


def metaspace(scheme, **changes):
    return {"type": "Metaspace", "replacement": "▁", "prepend_scheme": scheme, "split": False, **changes}


FORMS = {
    "prepend": (normalizer(PREPEND, REPLACE), None, Prefix.EACH),
    "replace first": (normalizer(REPLACE, PREPEND), None, Prefix.EACH),
    "prepend and metaspace": (normalizer(PREPEND, REPLACE), metaspace("first"), Prefix.EACH),
    "always": (None, metaspace("always"), Prefix.MISSING),
    "first": (None, metaspace("first"), Prefix.FIRST),
    "first behind replace": (REPLACE, metaspace("first"), Prefix.FIRST),
    "never": (None, metaspace("never"), Prefix.NEVER),
    "replace alone": (REPLACE, None, Prefix.NEVER),
}


def token(id, content, *, special=True, **flags):
    return (
        {"id": id, "content": content, "special": special}
        | dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
        | flags
    )


def merges(proto, by_score):
    """Merges as transformers derives them from a SentencePiece model: by the pieces' scores, or in older versions by ids."""
    ids = {piece.piece: id for id, piece in enumerate(proto.pieces)}
    found = [
        (piece.score if by_score else id, text[:cut], text[cut:])
        for id, piece in enumerate(proto.pieces)
        for text in [piece.piece]
        for cut in range(1, len(text))
        if text[:cut] in ids and text[cut:] in ids
    ]
    found.sort(key=lambda merge: (ids[merge[1]], ids[merge[2]]))
    found.sort(key=lambda merge: (merge[0], len(merge[1]), len(merge[2])), reverse=by_score)
    return [f"{left} {right}" for _, left, right in found]


@pytest.fixture(scope="module")
def source(train_model):
    """A model of 700 pieces with runs of spaces, all of one score as in Mistral's."""
    proto = ModelProto.FromString(train_model(allow_whitespace_only_pieces=True))
    runs = [f"{'▁' * length}" for length in (2, 4, 8, 3, 5, 16, 6, 7)]
    known = {piece.piece for piece in proto.pieces}
    for run in runs:
        if run not in known:
            proto.pieces.add(piece=run, type=Piece.NORMAL)
    lowest = min(piece.score for piece in proto.pieces) - 1
    for piece in proto.pieces:
        if set(piece.piece) == {"▁"}:
            piece.score = lowest
    proto.trainer_spec.vocab_size = len(proto.pieces)
    return proto.SerializeToString()


@pytest.fixture
def write(source, size, tmp_path):
    """write(normalizer, pre_tokenizer, *added tokens, ...) -> a folder as other tools write it."""
    proto = ModelProto.FromString(source)

    def build(normal, pre, *more, strip=True, by_score=True, alone=True, template=TEMPLATE, model=(), **changes):
        special = more or (token(size, "<|im_start|>"), token(size + 1, "<|im_end|>"))
        table = {
            "version": "1.0",
            "truncation": {"direction": "Right", "max_length": 9, "strategy": "LongestFirst", "stride": 0},
            "padding": None,
            "added_tokens": [*(token(id, name) for id, name in enumerate(("<unk>", "<s>", "</s>"))), *special],
            "normalizer": normal,
            "pre_tokenizer": pre,
            "post_processor": None,
            "decoder": {"type": "Sequence", "decoders": [*DECODERS, STRIP] if strip else DECODERS},
            "model": {
                "type": "BPE",
                "unk_token": "<unk>",
                "fuse_unk": True,
                "byte_fallback": True,
                "vocab": {piece.piece: id for id, piece in enumerate(proto.pieces)},
                "merges": merges(proto, by_score),
                **dict(model),
            },
            **changes,
        }
        (tmp_path / "tokenizer.json").write_text(json.dumps(table))
        config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "<|im_end|>"}
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(config | {"chat_template": template}))
        if not alone:
            (tmp_path / "tokenizer.model").write_bytes(source)
        return tmp_path

    return build


@pytest.fixture
def size(source):
    return len(ModelProto.FromString(source).pieces)


def check_equal(folder, tokenizer, extra=()):
    """Ids, offsets, decoding and conversations of a folder's tokenizer.json."""
    theirs, chat = (
        tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json")),
        PreTrainedTokenizerFast.from_pretrained(folder),
    )
    theirs.no_truncation()
    draw = random.Random(0)
    words = [piece.replace("▁", " ") for piece in tokenizer.pieces()[259:] if "<" not in piece] + ["犬", "▁", "\n", *extra]
    texts = ["".join(draw.choices(words, k=draw.randint(1, 9))) for _ in range(300)] + [" " * count for count in range(40)]
    texts += [*extra, *(f"{a}{word}{b}" for word in extra for a in ("a", " ") for b in ("b", " "))]
    for text, ids in zip(texts, tokenizer.encode_batch(texts), strict=True):
        assert ids == tokenizer.encode(text) == theirs.encode(text, add_special_tokens=False).ids, text
        found, offsets = tokenizer.encode_with_offsets(text)
        assert found == ids
        assert [begin for begin, _ in offsets[1:]] + [len(text)] == [end for _, end in offsets] or not text
        assert tokenizer.decode(ids) == theirs.decode(ids)
    assert encode_chat(tokenizer, CHAT).ids == chat.apply_chat_template(CHAT, return_dict=False)
    assert encode_prompt(tokenizer, CHAT) == chat.apply_chat_template(CHAT, return_dict=False, add_generation_prompt=True)


@pytest.mark.parametrize("alone", [True, False], ids=["alone", "beside a model"])
@pytest.mark.parametrize("form", FORMS)
def test_every_form_gives_the_ids_of_tokenizers_also_when_written_again(write, tmp_path, form, alone):
    normal, pre, prefix = FORMS[form]
    folder = write(normal, pre, strip=prefix is not Prefix.NEVER, alone=alone)
    tokenizer = Tokenizer.load(folder)
    assert tokenizer.prefix is prefix
    check_equal(folder, tokenizer)
    write_tokenizer_folder(tmp_path / "again", tokenizer)
    again = Tokenizer.load(tmp_path / "again")
    assert (again.prefix, again.fingerprint, again.added) == (prefix, tokenizer.fingerprint, tokenizer.added)
    check_equal(tmp_path / "again", again)


@pytest.mark.parametrize("form", ["prepend", "always", "first", "never"])
def test_our_own_template_gives_the_ids_and_the_mask_of_transformers_in_every_form(write, tmp_path, form):
    normal, pre, prefix = FORMS[form]
    base = Tokenizer.load(write(normal, pre, strip=prefix is not Prefix.NEVER, template=CHAT_TEMPLATE))
    assert (base.prefix, base.template) == (prefix, None)
    write_tokenizer_folder(tmp_path / "ours", base)
    tokenizer, theirs = Tokenizer.load(tmp_path / "ours"), PreTrainedTokenizerFast.from_pretrained(tmp_path / "ours")
    for messages in (CHAT, CHAT[:2], [Message(role="system", content=" s "), *CHAT[:2]]):
        encoded = encode_chat(tokenizer, messages)
        found = theirs.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
        assert (encoded.ids, encoded.trained) == (found["input_ids"], [bool(mask) for mask in found["assistant_masks"]])


def test_an_extended_tokenizer_keeps_the_rules_of_its_base(write, size):
    base = Tokenizer.load(write(*FORMS["first"][:2], token(size, "<call>", special=False), template=None))
    extended = base.extended(merge(base.model_bytes, ["日", "月", "日月"], 3).model_bytes)
    assert (extended.prefix, extended.spelled) == (Prefix.FIRST, {"<call>": size})
    assert extended.encode("<call>日月") == [size, size + 3]
    stream = extended.stream_decoder()
    ids = extended.encode(" a<call> 日月 b")
    assert "".join(map(stream.push, ids)) + stream.finish() == extended.decode(ids)


def test_the_path_of_a_tokenizer_json_is_refused_with_the_remedy(write):
    with pytest.raises(ValueError, match=r"tokenizer\.json counts with the files beside it: name its folder"):
        Tokenizer.load(write(*FORMS["first"][:2]) / "tokenizer.json")


def test_merges_by_id_are_read_alone_and_named_beside_a_model(write):
    """Older converters order merges by id, so runs of spaces join before words do."""
    folder = write(*FORMS["prepend"][:2], by_score=False)
    alone = Tokenizer.load(folder)
    check_equal(folder, alone)
    folder = write(*FORMS["prepend"][:2], by_score=False, alone=False)
    with pytest.warns(UserWarning, match=r"joins pieces in another order than the tokenizer\.model beside it"):
        beside = Tokenizer.load(folder)
    assert beside.encode(" the") != alone.encode(" the")


@pytest.mark.parametrize("form", ["prepend", "always", "first"])
@pytest.mark.parametrize("alone", [True, False], ids=["alone", "beside a model"])
def test_added_tokens_that_are_not_special_are_found_in_any_text(write, size, tmp_path, form, alone):
    added = (token(size, "<|im_start|>"), token(size + 1, "<|im_end|>"), token(size + 2, "<call>", special=False))
    folder = write(*FORMS[form][:2], *added, alone=alone)
    tokenizer = Tokenizer.load(folder)
    check_equal(folder, tokenizer, ["<call>"])
    assert tokenizer.fingerprint != Tokenizer(tokenizer.model_bytes, prefix=tokenizer.prefix).fingerprint
    write_tokenizer_folder(tmp_path / "again", tokenizer)
    check_equal(tmp_path / "again", Tokenizer.load(tmp_path / "again"), ["<call>"])


def test_ids_in_any_order_and_special_tokens_outside_the_vocabulary_are_read(write):
    """As mergekit writes a union of vocabularies."""
    folder = write(*FORMS["first"][:2])
    table = json.loads((folder / "tokenizer.json").read_text())
    pieces = [piece for piece in table["model"]["vocab"] if piece not in ("<unk>", "<s>", "</s>")]
    random.Random(0).shuffle(pieces)
    table["model"]["vocab"] = {piece: id for id, piece in enumerate([*pieces, "unreachable piece"])}
    for id, entry in enumerate(table["added_tokens"], len(pieces) + 1):
        entry["id"] = id
    table["model"]["unk_token"] = None
    (folder / "tokenizer.json").write_text(json.dumps(table))
    tokenizer = Tokenizer.load(folder)
    assert (tokenizer.unk_id, tokenizer.bos_id, tokenizer.eos_id) == tuple(len(pieces) + 1 + place for place in range(3))
    check_equal(folder, tokenizer)


@pytest.mark.parametrize("alone", [True, False], ids=["alone", "beside a model"])
@pytest.mark.parametrize(
    ("normal", "pre", "message"),
    [
        (None, None, r"does not write spaces as U\+2581"),
        (normalizer({"type": "NFC"}, PREPEND, REPLACE), None, "normalizer holds .*NFC"),
        (normalizer({"type": "Lowercase"}, REPLACE), None, "normalizer holds .*Lowercase"),
        (normalizer({"type": "Prepend", "prepend": "_"}, REPLACE), None, "normalizer holds .*Prepend"),
        (normalizer(PREPEND, REPLACE), {"type": "Digits", "individual_digits": True}, "pre_tokenizer holds .*Digits"),
        (None, {"type": "ByteLevel"}, "pre_tokenizer holds .*ByteLevel"),
        (None, {"type": "Metaspace", "replacement": "▁", "add_prefix_space": True}, "splits at spaces"),
        (None, metaspace("second"), "prepend_scheme 'second'"),
        (
            REPLACE,
            {"type": "Split", "pattern": {"Regex": "a"}, "behavior": "Isolated", "invert": False},
            "splits? text at patt",
        ),
        (normalizer({"type": "Strip", "strip_left": True, "strip_right": True}, REPLACE), None, "removed|instead of"),
        ("Prepend", None, "missing or of another form"),
    ],
)
def test_forms_that_change_text_in_other_ways_are_refused_by_name(write, normal, pre, message, alone):
    with pytest.raises(ValueError, match=rf"tokenizer\.json: .*({message})"):
        Tokenizer.load(write(normal, pre, alone=alone))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dropout": 0.1}, "dropout 0.1"),
        ({"type": "Unigram"}, "its model is Unigram"),
        ({"byte_fallback": False}, "byte_fallback False"),
        ({"end_of_word_suffix": "</w>"}, "end_of_word_suffix '</w>'"),
        ({"vocab": {"<unk>": 0, "<s>": 1, "</s>": 2, "a": 3}}, "have gaps"),
        ({"merges": ["a 犬"]}, "cannot read it: .*out of vocabulary"),
        ({"merges": None}, "missing or of another form"),
    ],
)
def test_models_of_another_kind_are_refused_by_name(write, changes, message):
    with pytest.raises(ValueError, match=rf"tokenizer\.json: .*{message}"):
        Tokenizer.load(write(*FORMS["prepend"][:2], model=changes))


@pytest.mark.parametrize(
    ("form", "flags", "refused"),
    [
        ("prepend", {"normalized": True}, "normalized"),
        ("first", {"normalized": True}, None),
        ("first", {"lstrip": True}, "lstrip"),
        ("first", {"special": False, "rstrip": True}, "rstrip"),
        ("first", {"special": False, "single_word": True}, "single_word"),
        ("first", {"special": False, "content": "▁x"}, "U.2581"),
    ],
)
def test_flags_that_change_ids_beside_an_added_token_are_refused(write, size, form, flags, refused):
    start = token(size, "<|im_start|>")
    folder = write(*FORMS[form][:2], start | flags, token(size + 1, "<|im_end|>"), alone=False)
    if refused is None:
        check_equal(folder, Tokenizer.load(folder))
        return
    with pytest.raises(ValueError, match=f"added token .*{refused}"):
        Tokenizer.load(folder)


def test_a_tokenizer_json_of_another_tokenizer_than_the_model_is_refused(write, train_model):
    folder = write(*FORMS["prepend"][:2], token(690, "<|im_start|>"))
    (folder / "tokenizer.model").write_bytes(train_model(vocab_size=690))
    with pytest.raises(ValueError, match=r"tokenizer\.json: contradicts the tokenizer\.model beside it: id \d+ is"):
        Tokenizer.load(folder)


@pytest.mark.parametrize(
    ("config", "prefix"),
    [
        ({"legacy": False}, Prefix.FIRST),
        ({"legacy": True}, Prefix.EACH),
        ({}, Prefix.EACH),
        ({"add_prefix_space": False}, Prefix.NEVER),
    ],
)
def test_without_tokenizer_json_the_configuration_says_where_text_begins_with_a_space(source, tmp_path, config, prefix):
    (tmp_path / "tokenizer.model").write_bytes(source)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = Tokenizer.load(tmp_path)
    assert tokenizer.prefix is prefix
    own = Tokenizer(source)
    assert (tokenizer.encode("the") == own.encode("the")) is (prefix is not Prefix.NEVER)
    assert (tokenizer.encode(" the") == own.encode("the")) is (prefix is not Prefix.EACH)


@pytest.mark.parametrize("by_score", [pytest.param(True, marks=pytest.mark.slow), False], ids=["by score", "by id"])
def test_mistrals_own_tokenizer_alone_gives_the_ids_of_its_converters(mistral, tmp_path, by_score):
    write_tokenizer_folder(tmp_path, mistral)
    (tmp_path / "tokenizer.model").unlink()
    table = json.loads((tmp_path / "tokenizer.json").read_text())
    table["model"]["merges"] = merges(ModelProto.FromString(mistral.model_bytes), by_score)
    (tmp_path / "tokenizer.json").write_text(json.dumps(table))
    alone = Tokenizer.load(tmp_path)  # compares every piece and random rows of pieces with the package
    assert alone.pieces() == mistral.pieces()
    assert (alone.encode(" the") == mistral.encode(" the")) is by_score
