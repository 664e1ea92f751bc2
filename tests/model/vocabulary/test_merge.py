"""Merging: the base is kept, every new piece can be produced, order and errors."""

import argparse
import gzip
import itertools
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st
from sentencepiece import sentencepiece_model_pb2

from model.vocabulary.merge import check_base, extend, merge, split_pieces, unreachable
from model.vocabulary.scripts import Scripts
from model.vocabulary.tokenizer import Tokenizer
from model.vocabulary.train import train

JAPANESE = Scripts()


@cache
def scores_of(model_bytes: bytes) -> dict[str, float]:
    proto = sentencepiece_model_pb2.ModelProto.FromString(model_bytes)
    return {piece.piece: piece.score for piece in proto.pieces if piece.type == piece.NORMAL}


def encode_as_defined(scores: dict[str, float], text: str) -> list[str]:
    """BPE as sentencepiece defines it, written anew: join the pair of the highest score, the leftmost among equals."""
    symbols = list("\u2581" + text.replace(" ", "\u2581"))
    while True:
        joined = [(scores.get(left + right), -place) for place, (left, right) in enumerate(itertools.pairwise(symbols))]
        best = max((entry for entry in joined if entry[0] is not None), default=None)
        if best is None:
            break
        place = -best[1]
        symbols[place : place + 2] = [symbols[place] + symbols[place + 1]]
    spelled = ([symbol] if symbol in scores else [f"<0x{byte:02X}>" for byte in symbol.encode()] for symbol in symbols)
    return list(itertools.chain(*spelled))


def test_the_new_pieces_are_appended(extended, mistral):
    merged, pieces = extended.merged, extended.tokenizer.pieces()
    assert pieces[:32000] == mistral.pieces()
    assert pieces[32000:] == merged.pieces
    assert len(pieces) == len(set(pieces)) == extended.tokenizer.vocab_size
    assert merged.base_size == 32000
    assert all(JAPANESE.allow(piece) for piece in merged.pieces)


def test_no_piece_is_unreachable(extended):
    assert unreachable(extended.tokenizer.model_bytes) == []
    processor = sentencepiece.SentencePieceProcessor(model_proto=extended.merged.model_bytes)
    # The same in the middle of a text, where no dummy space is put before it. A newline joins with nothing.
    for id, piece in enumerate(extended.merged.pieces, 32000):
        assert processor.encode("\n" + piece.replace("\u2581", " "), out_type=int)[-1] == id


def test_scores_fall_with_the_id_below_all_of_the_base(extended):
    proto = sentencepiece_model_pb2.ModelProto.FromString(extended.merged.model_bytes)
    scores = [piece.score for piece in proto.pieces]
    assert np.all(np.diff(np.float32(scores[31999:])[1:]) < 0)
    assert max(scores[32000:]) < min(scores[:32000])
    assert proto.trainer_spec.vocab_size == len(proto.pieces)


@settings(deadline=None, derandomize=True)
@given(text=st.text(st.characters(exclude_categories=["Cs"])))
def test_text_without_japanese_keeps_its_ids(extended, mistral, text):
    if not JAPANESE.occur_in(text):
        assert extended.tokenizer.encode(text) == mistral.encode(text)


SENTENCES = [
    "Größe und Übermut: naïve Fächer aus Köln, ça va déjà, señor.",
    "Привет, мир! Съешь ещё этих мягких булок.",
    "مرحبا بالعالم، كيف حالكم اليوم؟",
    "नमस्ते दुनिया, आप कैसे हैं?",
    "สวัสดีชาวโลก วันนี้อากาศดี",
    "שלום עולם, מה שלומכם?",
    "Γειά σου Κόσμε, τι κάνεις;",
    "안녕하세요, 오늘 날씨가 좋네요.",
    "გამარჯობა მსოფლიო",
    "Բարեւ աշխարհ",
    "வணக்கம் உலகம்",
    "Xin chào thế giới, tiếng Việt rất đẹp.",
]


@pytest.fixture(scope="module")
def unrelated(mistral):
    """A million characters of the standard library and sentences in twelve languages, with the base's ids."""
    texts, characters = list(SENTENCES), 0
    for path in sorted(Path(argparse.__file__).parent.rglob("*.py")):
        texts.append(path.read_text(encoding="utf-8", errors="ignore"))
        characters += len(texts[-1])
        if characters > 1_100_000:
            break
    plain = [text for text in texts if not JAPANESE.occur_in(text)]
    assert set(SENTENCES) <= set(plain)
    assert sum(map(len, plain)) > 1_000_000
    return plain, mistral.encode_batch(plain)


def test_code_and_other_scripts_keep_their_ids(extended, unrelated):
    texts, ids = unrelated
    assert extended.tokenizer.encode_batch(texts) == ids


def test_english_keeps_its_ids(extended, mistral, shared_data):
    for path in sorted((shared_data / "text").glob("en_*.txt.gz")):
        lines = gzip.decompress(path.read_bytes()).decode().split("\n")
        plain = [line for line in lines[:: len(lines) // 800] if not JAPANESE.occur_in(line)]
        assert extended.tokenizer.encode_batch(plain) == mistral.encode_batch(plain)


@pytest.mark.parametrize(
    ("script", "text"),
    [
        ("hang", "학교에서 공부하는 학생들이 도서관에서 책을 읽습니다. "),
        ("thai", "นักเรียนอ่านหนังสือในห้องสมุดของโรงเรียน "),
        ("deva", "छात्र पुस्तकालय में किताबें पढ़ते हैं। "),
        ("cyrl", "Ученики читают книги в школьной библиотеке. "),
    ],
)
def test_another_language_can_be_added(mistral, script, text):
    scripts = Scripts([script])
    merged, _ = extend(
        mistral.model_bytes, [text * 20 + f"{number} 日本語 English" for number in range(20)], 12, scripts=scripts
    )
    assert unreachable(merged.model_bytes) == []
    assert all(scripts.allow(piece) for piece in merged.pieces)
    tokenizer = Tokenizer(merged.model_bytes)
    assert len(tokenizer.encode(text)) < len(mistral.encode(text))
    assert tokenizer.decode(tokenizer.encode(text)) == text
    others = [sentence for sentence in [*SENTENCES, "日本語"] if not scripts.occur_in(sentence)]
    assert len(others) >= len(SENTENCES)
    assert tokenizer.encode_batch(others) == mistral.encode_batch(others)


@settings(deadline=None, derandomize=True, max_examples=25)
@given(data=st.data())
def test_encoding_is_bpe_by_score(extended, data):
    pieces = st.sampled_from(extended.merged.pieces).map(lambda piece: piece.replace("\u2581", " "))
    text = "".join(data.draw(st.lists(st.one_of(pieces, st.sampled_from(["a", " ", "の", "The", "   ", "\n"])), max_size=6)))
    ids = extended.tokenizer.encode(text)
    names = extended.tokenizer.pieces()
    assert [names[id] for id in ids] == (encode_as_defined(scores_of(extended.merged.model_bytes), text) if text else [])


def test_japanese_becomes_shorter(extended, mistral):
    before, after = (sum(map(len, tokenizer.encode_batch(extended.texts))) for tokenizer in (mistral, extended.tokenizer))
    assert after < 0.6 * before


def test_a_larger_merge_begins_with_a_smaller_one(mistral, written_texts):
    candidates = train(written_texts, 260).pieces
    small, large = (merge(mistral.model_bytes, candidates, size) for size in (200, 260))
    assert large.pieces[: len(small.pieces)] == small.pieces


def test_merging_repeats_and_prunes(mistral):
    # Nothing builds 火水木金.
    candidates = ["日月", "日月火", "火水木金", "日月火", "の", "土日"]
    merged = merge(mistral.model_bytes, candidates, 3)
    assert merged.pieces == ["日月", "日月火", "土日"]
    assert merged.dropped["unreachable"] == 1
    assert merged.dropped["in the base already"] == 2  # the one repeated, and の
    assert merged.model_bytes == merge(mistral.model_bytes, candidates, 3).model_bytes


def test_a_piece_reachable_only_through_one_beyond_the_size_is_dropped(mistral):
    candidates = ["日月火水", "木金", "日月", "火水", "土日"]
    assert merge(mistral.model_bytes, candidates, 4).pieces == ["日月火水", "木金", "日月", "火水"]
    assert merge(mistral.model_bytes, candidates, 3).pieces == ["木金", "日月", "火水"]


def test_a_piece_needs_all_its_characters(mistral):
    rare = "鱟"
    assert len(mistral.encode(rare)) > 2
    merged = merge(mistral.model_bytes, ["日" + rare, "土日"], 1)
    assert merged.pieces == ["土日"]
    assert merged.dropped["has a character that is no piece"] == 1
    assert merge(mistral.model_bytes, [rare, "日" + rare], 2).pieces == [rare, "日" + rare]


def test_characters_leave_room_for_merges(mistral):
    characters = [chr(0x9F00 + n) for n in range(40)]
    merged = merge(mistral.model_bytes, [*characters, "日月", "土日", "火水", "木金"], 6)
    assert merged.pieces == [*characters[:3], "日月", "土日", "火水"]
    assert len(merge(mistral.model_bytes, [*characters, "日月"], 20).pieces) == 20


def test_split_pieces_spells_each_new_piece(extended, mistral):
    names = mistral.pieces()
    for piece, ids in zip(extended.merged.pieces, split_pieces(mistral, extended.tokenizer), strict=True):
        assert len(ids) > 1
        spelled = b"".join(bytes.fromhex(names[id][3:-1]) if id < 259 else names[id].encode() for id in ids)
        assert spelled.decode() == piece


def test_split_pieces_needs_the_same_base(extended, mistral, train_model):
    with pytest.raises(ValueError, match="does not begin with the base tokenizer's pieces"):
        split_pieces(Tokenizer(train_model()), extended.tokenizer)


def test_bases_that_cannot_be_extended_are_refused(mistral, train_model):
    with pytest.raises(ValueError, match=r"base\.model is a SentencePiece model of type unigram: .* BPE only"):
        check_base(train_model(model_type="unigram"), "base.model")
    with pytest.raises(ValueError, match="of type word"):
        check_base(train_model(model_type="word", byte_fallback=False))
    with pytest.raises(ValueError, match="no byte fallback"):
        check_base(train_model(byte_fallback=False))
    for damaged in (b"", b"\x00\x01", mistral.model_bytes[:5000]):
        with pytest.raises(ValueError, match=r"is .*not a SentencePiece model"):
            check_base(damaged)


def test_another_base_that_holds_japanese_already(mistral, written_texts):
    once, _ = extend(mistral.model_bytes, written_texts, 100)
    twice, _ = extend(once.model_bytes, written_texts, 100)
    assert twice.base_size == 32100
    assert not set(once.pieces) & set(twice.pieces)
    assert unreachable(twice.model_bytes) == []


def test_asking_for_too_many_pieces_is_refused(mistral, written_texts):
    with pytest.raises(ValueError, match=r"50,000 new pieces asked for, but the text gives \d+") as error:
        extend(mistral.model_bytes, written_texts[:20], 50_000)
    assert type(error.value) is ValueError
    with pytest.raises(ValueError, match="at least 1, not 0"):
        merge(mistral.model_bytes, ["日月"], 0)
