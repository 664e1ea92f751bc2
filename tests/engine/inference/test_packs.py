"""Packs hold every text once, compute common beginnings once, and save as many places as one level of prefixes can."""

import random
from itertools import pairwise

import pytest

from engine.inference.packs import Pack, pack_texts


def read_back(pack: Pack) -> dict[int, list[int]]:
    """Each text of a pack, by its number, as attention sees it."""
    return {part.text: pack.tokens_T[part.places()].tolist() for part in pack.parts}


def check(texts: list[list[int]], pack_tokens: int) -> list[Pack]:
    packs = pack_texts(texts, pack_tokens)
    found: dict[int, list[int]] = {}
    for pack in packs:
        assert not found.keys() & read_back(pack).keys()
        found |= read_back(pack)
        for part in pack.parts:
            assert pack.positions_T[part.places()].tolist() == list(range(part.length))
            assert [part.place(index) for index in range(part.length)] == part.places().tolist()
        assert all(start < end for start, end in pairwise(pack.bounds)), "a segment without places"
        assert pack.places <= max(pack_tokens, max(part.length for part in pack.parts))
        # The lists accept the segments, and see the prefix's places before a text's own.
        pack.work(None)
    assert found == dict(enumerate(texts))
    return packs


def tree(seed: int, count: int, depth: int = 3) -> list[list[int]]:
    """Random texts, many of which begin alike; some are equal, some the beginning of another."""
    chooser = random.Random(seed)
    texts = [[1]]
    while len(texts) < count:
        begin = chooser.choice(texts)
        kept = begin[: chooser.randint(1, len(begin))]
        texts.append(kept + [chooser.randrange(5) for _ in range(chooser.choice([0, 1, 2, depth, 3 * depth]))])
    return texts


@pytest.mark.parametrize("pack_tokens", [1, 7, 40, 10_000])
@pytest.mark.parametrize("seed", range(8))
def test_every_text_is_there_once_with_its_own_positions(seed, pack_tokens):
    texts = tree(seed, 40)
    check(texts, pack_tokens)
    assert [read_back(pack) for pack in pack_texts(texts, pack_tokens)] == [
        read_back(pack) for pack in pack_texts(texts, pack_tokens)
    ]


def partitions(items: list[int]):
    if not items:
        yield []
        return
    for rest in partitions(items[1:]):
        yield [[items[0]], *rest]
        for at in range(len(rest)):
            yield [*rest[:at], [items[0], *rest[at]], *rest[at + 1 :]]


def cost(texts: list[tuple[int, ...]], group: list[int]) -> int:
    """Places of a group: its common beginning once."""
    chosen = [texts[number] for number in group]
    shared = 0
    while all(len(text) > shared and text[shared] == chosen[0][shared] for text in chosen):
        shared += 1
    return sum(len(text) - shared for text in chosen) + shared


@pytest.mark.parametrize("seed", range(25))
def test_no_other_groups_would_compute_fewer_places(seed):
    texts = sorted({tuple(text) for text in tree(seed, 9)})
    # What begins another text is read with it.
    texts = [one for one, two in zip(texts, [*texts[1:], ()], strict=True) if two[: len(one)] != one]
    best = min(sum(cost(texts, group) for group in groups) for groups in partitions(list(range(len(texts)))))
    assert sum(pack.places for pack in pack_texts(texts, 10_000)) == best


def test_few_shot_questions_share_their_examples_and_answers_of_a_context_share_the_context():
    examples, random_examples = list(range(100)), random.Random(0)
    questions = [[*examples, 200 + number, 7, 7] for number in range(50)]
    (pack,) = check(questions, 10_000)
    assert pack.places == 100 + 50 * 3
    contexts = [[0, *random_examples.sample(range(300), 100)] for _ in range(10)]
    answers = [[*context, ending, ending] for context in contexts for ending in range(4)]
    assert sum(pack.places for pack in check(answers, 10_000)) == 10 * (101 + 4 * 2)


def test_a_group_larger_than_a_pack_repeats_its_prefix_in_each():
    questions = [[*range(100), 200 + number, *range(9)] for number in range(50)]
    packs = check(questions, 300)
    # 20 questions of 10 places beside the prefix in each.
    assert [pack.places for pack in packs] == [300, 300, 200]


def test_equal_texts_are_computed_once_and_a_text_that_begins_another_has_no_place_of_its_own():
    (pack,) = check([[1, 2, 3], [1, 2, 3], [1, 2, 3, 4], [1, 2], [1, 2, 3, 5, 6]], 100)
    assert pack.places == 6


def test_a_text_longer_than_a_pack_has_one_of_its_own():
    packs = check([list(range(50)), [1, 2], [3]], 10)
    assert [pack.places for pack in packs] == [50, 3]


def test_wrong_texts_are_refused():
    assert pack_texts([], 10) == []
    with pytest.raises(ValueError, match="without tokens"):
        pack_texts([[1], []], 10)
    with pytest.raises(ValueError, match="pack_tokens = 0"):
        pack_texts([[1]], 0)
