"""Selection: against a plain search, what it prefers, and that it leaves every piece reachable."""

import gzip
import itertools
import random

import pytest

from model.vocabulary.merge import merge, unreachable
from model.vocabulary.selection import CAP, select
from model.vocabulary.tokenizer import Tokenizer
from model.vocabulary.train import train


def pieces_of(mistral, candidates, new_pieces, texts):
    return merge(mistral.model_bytes, candidates, new_pieces, texts=texts).pieces


def test_many_documents_count_more_than_many_uses(mistral):
    texts = ["火水" * 500, *(f"木{character}土日" for character in "abcdefghij")]
    assert pieces_of(mistral, ["火水", "土日"], 1, texts) == ["土日"]
    assert merge(mistral.model_bytes, ["火水", "土日"], 1).pieces == ["火水"]


def test_the_end_of_a_long_document_does_not_count(mistral):
    texts = ["火水" + "木" * CAP + "土日" * 9, "火水", "土日", "火水"]
    assert pieces_of(mistral, ["土日", "火水"], 1, texts) == ["火水"]


def test_the_parts_of_a_piece_stay_with_it(mistral):
    # 日月 alone stands nowhere, but 日月火 is joined from it.
    candidates, texts = ["日月", "日月火", "土木", "水金"], ["日月火"] * 3 + ["土木"] * 2 + ["水金"]
    documents = [f"{text}{number}" for number, text in enumerate(texts)]
    assert pieces_of(mistral, candidates, 2, documents) == ["日月", "日月火"]
    assert pieces_of(mistral, candidates, 3, documents) == ["日月", "日月火", "土木"]


def test_characters_always_stay(mistral):
    rare = "鱟"
    texts = ["日月", "日月1", "土日", "土日1", "土日2"]
    assert pieces_of(mistral, [rare, "日月", "土日"], 2, texts) == [rare, "土日"]


@pytest.mark.parametrize("new_pieces", [60, 150, 230])
def test_every_piece_is_reachable_and_of_the_candidates_in_order(mistral, written_texts, new_pieces):
    candidates = train(written_texts, 300).pieces
    merged = merge(mistral.model_bytes, candidates, new_pieces, texts=written_texts)
    assert len(merged.pieces) == new_pieces
    assert unreachable(merged.model_bytes) == []
    order = [candidates.index(piece) for piece in merged.pieces]
    characters = sum(len(piece) == 1 for piece in merged.pieces)
    assert order[:characters] == sorted(order[:characters])
    assert order[characters:] == sorted(order[characters:])
    assert sum(merged.dropped.values()) == len(candidates) - new_pieces


def test_selection_equals_a_plain_search():
    """Against a search that counts everything anew after each piece that goes, where no piece is built from another."""
    draw = random.Random(0)
    letters = "日月火水木金土山川"
    pairs = [left + right for left, right in itertools.product(letters[:4], letters[4:])]
    documents = ["x".join(draw.choices(pairs, k=draw.randint(1, 12))) for _ in range(40)]
    scores = {character: -float(place) for place, character in enumerate(letters + "x")}

    def encode(texts):
        return [[len(scores) + pairs.index(word) for word in text.split("x")] for text in texts]

    def worth(pair):
        return sum(text.split("x").count(pair) ** 0.25 for text in documents)

    expected = sorted(sorted(pairs, key=worth, reverse=True)[:7], key=pairs.index)
    ids = range(len(scores), len(scores) + len(pairs))
    assert select(pairs, 7, documents, encode, ids, scores) == expected


def test_selection_shortens_unseen_text_of_another_kind(mistral, shared_data):
    """Selected on conversations and documentation of one kind, measured on all other kinds of text."""
    dialogue, documentation, *unseen = (
        gzip.decompress((shared_data / "text" / "heldout" / f"ja_{name}.txt.gz").read_bytes()).decode().strip().split("\n\n")
        for name in ("dialogue", "vsdocs", "wiki", "aozora", "webdocs", "law", "pydocs")
    )
    texts = dialogue + documentation
    candidates = train(texts, 5200).pieces
    selected, first = (
        Tokenizer(merge(mistral.model_bytes, candidates, 4000, texts=chosen).model_bytes) for chosen in (texts, None)
    )
    documents = list(itertools.chain(*unseen))
    assert sum(map(len, selected.encode_batch(documents))) < sum(map(len, first.encode_batch(documents)))
