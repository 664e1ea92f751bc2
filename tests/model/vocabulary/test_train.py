"""Training: determinism, what the pieces are, sampling, errors."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from model.vocabulary.scripts import Scripts
from model.vocabulary.train import MAX_PIECE, distinct, sample, train


def test_training_repeats_and_does_not_depend_on_line_ends(written_texts):
    first = train(written_texts, 100)
    assert first.pieces == train(list(written_texts), 100).pieces
    assert first.pieces == train(["\n".join(written_texts)], 100).pieces
    assert first.characters == sum(map(len, written_texts))


def test_fewer_pieces_are_the_beginning_of_more(written_texts):
    few, many = train(written_texts, 60).pieces, train(written_texts, 120).pieces
    assert many[: len(few)] == few


def test_gives_the_number_of_pieces_until_the_text_is_exhausted(written_texts):
    trained = train(written_texts, 150)
    assert sum(len(piece) > 1 for piece in trained.pieces) == 150
    assert not trained.exhausted
    everything = train(written_texts[:20], 100_000)
    assert everything.exhausted
    assert 20 < len(everything.pieces) < 100_000


def test_every_piece_is_allowed_and_occurs_in_the_text(written_texts):
    text = "\n".join(written_texts).replace(" ", "\u2581")
    for piece in train(written_texts, 200).pieces:
        assert Scripts().allow(piece)
        assert piece in text
        assert len(piece) <= MAX_PIECE
        assert "\n" not in piece


def test_the_most_frequent_sequence_comes_first():
    pieces = train(["山川" * 3 + "、空"] * 5 + ["空山"], 10).pieces
    assert [piece for piece in pieces if len(piece) == 1][:2] in (["山", "川"], ["川", "山"])
    assert next(piece for piece in pieces if len(piece) > 1) == "山川"


def test_rare_characters_stay_bytes():
    texts = ["日本語です。"] * 2000 + ["麤"]
    assert "麤" not in train(texts, 10, coverage=0.9995).pieces
    assert "麤" in train(texts, 10, coverage=1.0).pieces


def test_long_lines_are_trained_on():
    line = "花鳥風月" * 40_000 + "山川草木" * 100
    assert {"花鳥", "風月", "山川", "草木"} <= set(train([line], 20).pieces)


@pytest.mark.parametrize("texts", [[], [""], ["Hello, world.", "12 ÄÖ한국어 😀"]])
def test_text_without_the_scripts_is_refused(texts):
    with pytest.raises(ValueError, match=r"nothing in the text \(\d+ characters\) is of the scripts hira,kata,han"):
        train(texts, 10)


@pytest.mark.parametrize("options", [{"pieces": 0}, {"pieces": 5, "coverage": 0.0}, {"pieces": 5, "coverage": 1.1}])
def test_arguments_out_of_range_are_refused(options):
    with pytest.raises(ValueError, match="must be"):
        train(["日本"], **options)


@settings(deadline=None, derandomize=True)
@given(texts=st.lists(st.text(max_size=20)), characters=st.integers(1, 200), seed=st.integers(0, 3))
def test_a_sample_is_bounded_ordered_and_repeats(texts, characters, seed):
    chosen = sample(iter(texts), characters, seed)
    assert chosen == sample(texts, characters, seed)
    rest = iter(texts)
    assert all(text in rest for text in chosen)
    if sum(map(len, texts)) <= characters:
        assert chosen == texts
    else:
        total = sum(map(len, chosen))
        assert characters <= total < characters + 20


def test_a_sample_is_random():
    texts = [f"{n:03}" for n in range(200)]
    samples = {tuple(sample(texts, 60, seed)) for seed in range(20)}
    assert len(samples) == 20
    assert len({text for chosen in samples for text in chosen}) > 150


def test_distinct_texts_are_kept_once_in_order():
    assert list(distinct(iter(["b", "a", "b", "", "a", ""]))) == ["b", "a", ""]
