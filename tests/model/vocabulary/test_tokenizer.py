"""Tokenizer and StreamDecoder against sentencepiece and against properties of text."""

import hashlib
import random

import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st

from model.vocabulary.tokenizer import Tokenizer, mistral_tokenizer_path

ALPHABET = st.one_of(st.sampled_from("  \n\taThe1日本語のカガ゙麤、。😀é"), st.characters(exclude_categories=["Cs"]))
TEXT = st.text(ALPHABET)


@pytest.fixture(scope="module")
def reference():
    return sentencepiece.SentencePieceProcessor(model_file=str(mistral_tokenizer_path()))


@pytest.fixture(scope="module")
def pieces(mistral):
    return mistral.pieces()


def test_a_folder_and_a_file_load(mistral, tmp_path):
    (tmp_path / "tokenizer.model").write_bytes(mistral.model_bytes)
    assert Tokenizer.load(tmp_path).encode("今日は") == mistral.encode("今日は")
    assert (mistral.vocab_size, mistral.unk_id, mistral.bos_id, mistral.eos_id) == (32000, 0, 1, 2)
    assert mistral.fingerprint == hashlib.sha256(mistral_tokenizer_path().read_bytes()).hexdigest()


def test_missing_empty_and_damaged_files_are_named(mistral, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no tokenizer at .*nowhere"):
        Tokenizer.load(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match=r"tokenizer\.model"):
        Tokenizer.load(tmp_path)
    for damaged in (b"", b"not a model", mistral.model_bytes[:1000]):
        (tmp_path / "tokenizer.model").write_bytes(damaged)
        with pytest.raises(ValueError, match=r"tokenizer\.model is .*not a SentencePiece model"):
            Tokenizer.load(tmp_path)


@settings(deadline=None, derandomize=True)
@given(text=TEXT)
def test_encodes_as_sentencepiece_and_decodes_to_the_text(mistral, reference, text):
    ids = mistral.encode(text)
    assert ids == reference.encode(text, out_type=int)
    assert mistral.encode_batch([text, "", text]) == [ids, [], ids]
    assert mistral.decode(ids) == text.replace("\u2581", " ")


@pytest.mark.parametrize("text", ["</s>", "a <s> b", "<unk>", "<0x41>", "[INST] </s></s>"])
def test_spelled_specials_are_plain_text(mistral, text):
    ids = mistral.encode(text)
    assert not {0, 1, 2} & set(ids)
    assert all(id >= 259 for id in ids)
    assert mistral.decode(ids) == text


def test_decode_leaves_specials_out(mistral):
    ids = mistral.encode("はい。")
    assert mistral.decode([1, *ids, 2, 0]) == "はい。"


@settings(deadline=None, derandomize=True)
@given(text=TEXT)
def test_offsets_tile_the_text_and_belong_to_their_pieces(mistral, pieces, text):
    ids, offsets = mistral.encode_with_offsets(text)
    assert ids == mistral.encode(text)
    assert [begin for begin, _ in offsets[1:]] == [end for _, end in offsets[:-1]]
    assert not text or (offsets[0][0], offsets[-1][1]) == (0, len(text))
    run = ""
    for place, (id, (begin, end)) in enumerate(zip(ids, offsets, strict=True)):
        piece = pieces[id]
        if id < 259:
            run += piece[3:-1]
            if begin < end:
                assert bytes.fromhex(run).decode() == text[begin:end]
                run = ""
        else:
            written = text[begin:end].replace(" ", "\u2581")
            assert written == piece or (place == 0 and "\u2581" + written == piece)


@pytest.mark.parametrize("text", ["\ud800", "日本\udfff語"])
def test_a_lone_surrogate_is_named(mistral, text):
    for encode in (mistral.encode, mistral.encode_with_offsets, lambda text: mistral.encode_batch(["fine", text])):
        with pytest.raises(ValueError, match=r"character \d of the text is U\+D[8F]"):
            encode(text)


@settings(deadline=None, derandomize=True)
@given(ids=st.lists(st.one_of(st.integers(0, 258), st.integers(0x80 + 3, 258), st.integers(0, 31999), st.just(28705))))
def test_streaming_gives_what_decoding_the_whole_gives(mistral, ids):
    decoder = mistral.stream_decoder()
    assert "".join(map(decoder.push, ids)) + decoder.finish() == mistral.decode(ids)


@settings(deadline=None, derandomize=True)
@given(text=TEXT)
def test_streaming_never_cuts_a_character(mistral, text):
    decoder = mistral.stream_decoder()
    parts = [decoder.push(id) for id in mistral.encode(text)]
    assert decoder.finish() == ""
    assert "".join(parts) == text.replace("\u2581", " ")
    assert text.count("\ufffd") == sum(part.count("\ufffd") for part in parts)


def test_streaming_a_merged_tokenizer(extended):
    draw = random.Random(0)
    for _ in range(300):
        ids = draw.choices(range(extended.tokenizer.vocab_size), k=draw.randint(0, 12))
        decoder = extended.tokenizer.stream_decoder()
        assert "".join(map(decoder.push, ids)) + decoder.finish() == extended.tokenizer.decode(ids)
