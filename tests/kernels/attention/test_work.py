"""The work lists against the definition of attention, place by place."""

import dataclasses
import random
from itertools import pairwise

import pytest
import torch

from kernels.attention.work import attention_work
from tests.kernels.attention_rows import ROWS, Row


def drawn(seed):
    """A random row; two of three rows have shared prefixes."""
    rng = random.Random(seed)
    lengths = tuple(rng.choice((0, 1, 2, 3, 5, 8, 13)) for _ in range(rng.randint(0, 7)))
    prefixes = [-1] * len(lengths)
    for segment in range(1, len(lengths)):
        roots = [root for root in range(segment) if prefixes[root] < 0]
        if seed % 3 and rng.random() < 0.6:
            prefixes[segment] = rng.choice(roots)
    window = rng.choice((None, 1, 2, 3, 4, 7, 100))
    return Row(lengths, window, rng.choice((1, 3, 4, 8)), (1, 1), tuple(prefixes), padding=rng.choice((0, 0, 5)))


def listed(row):
    """[[((start, end), ranges) of each tile]] of the queries, then of the keys, as the kernels read them."""
    work = row.work()
    table = work.work.tolist()
    tiles = table[: work.query_tiles], table[work.query_tiles : work.query_tiles + work.key_tiles]
    ranges = table[work.query_tiles + work.key_tiles :]
    return [[((start, end), [found[:3] for found in ranges[first:last]]) for start, end, first, last in part] for part in tiles]


def pairs(row, tiles, *, by_query):
    """(tile, range, whether each pair is seen) of every range of every tile."""
    reach = 2**30 if row.window is None else row.window
    for (start, end), ranges in tiles:
        for begin, stop, shift in ranges:
            own, other = torch.arange(start, end)[:, None], torch.arange(begin, stop)
            distance = own - other - shift if by_query else other - own - shift
            yield (start, end), (begin, stop), (distance >= 0) & (distance < reach)


@pytest.mark.parametrize("row", [*ROWS.values(), *map(drawn, range(150))], ids=str)
def test_every_visible_pair_is_visited_once(row):
    expected = row.visible().int()
    for tiles, by_query in zip(listed(row), (True, False), strict=True):
        found = torch.zeros_like(expected)
        for (start, end), (begin, stop), seen in pairs(row, tiles, by_query=by_query):
            part = found[start:end, begin:stop] if by_query else found[begin:stop, start:end].T
            part += seen.int()
        assert torch.equal(found, expected)


@pytest.mark.parametrize("row", [*ROWS.values(), *map(drawn, range(150))], ids=str)
def test_ranges_are_as_few_as_possible_and_begin_and_end_with_their_tiles(row):
    """Ranges of keys are as short as possible, and no two could be one.

    Ranges of queries begin with a query that sees the tile, and end with their segments.
    """
    queries, keys = listed(row)
    for _, _, seen in pairs(row, queries, by_query=True):
        assert seen[:, 0].any()
        assert seen[:, -1].any()
    for _, (begin, stop), seen in pairs(row, keys, by_query=False):
        assert seen[:, 0].any()
        assert stop == min(end for end in row.bounds if end > begin)
    for tiles, once in ((queries, True), (keys, False)):
        for _, ranges in tiles:
            for (_, stop, shift), (begin, _, other) in pairwise(ranges):
                assert stop <= begin
                assert not once or (stop, shift) != (begin, other)


@pytest.mark.parametrize("row", [*ROWS.values(), *map(drawn, range(60))], ids=str)
def test_tiles_cover_segments_and_padding_heaviest_first(row):
    bounds = [*row.bounds, row.tokens]
    expected = [(first, min(first + row.tile, end)) for start, end in pairwise(bounds) for first in range(start, end, row.tile)]
    queries, keys = listed(row)
    for tiles in (queries, keys):
        assert sorted(tile for tile, _ in tiles) == expected
        assert all(not ranges for (start, _), ranges in tiles if start >= bounds[-2])
    loads = [sum(stop - begin for begin, stop, _ in ranges) for _, ranges in queries]
    assert loads == sorted(loads, reverse=True)


@pytest.mark.parametrize("row", [*ROWS.values(), *map(drawn, range(150))], ids=str)
def test_no_tile_of_keys_comes_before_an_earlier_tile_that_its_queries_see(row):
    """Else a program could wait for a program that has not started."""
    _, keys = listed(row)
    seen = row.visible()
    order = {start: number for number, ((start, _), _) in enumerate(keys)}
    for query in range(row.tokens):
        numbers = [order[start] for (start, end), _ in sorted(keys) if seen[query, start:end].any()]
        assert numbers == sorted(numbers)


def test_tiles_of_keys_with_much_work_come_first():
    """The longer document's tiles, from its start; then the shorter document's, which fewer queries see."""
    assert [tile for tile, _ in listed(Row((20, 40), None, 16))[1]] == [(20, 36), (36, 52), (0, 16), (52, 60), (16, 20)]
    # A prompt's tile has its own queries and the answers'.
    shared = Row((16, 3, 3, 20), None, 16, prefixes=(-1, 0, 0, -1))
    assert [tile for tile, _ in listed(shared)[1]] == [(0, 16), (22, 38), (38, 42), (16, 19), (19, 22)]


def test_a_range_of_queries_says_where_its_text_begins():
    """A prefix of 20 places ends at 24; its second follower, at 37 to 54, counts the prefix's places right before its own."""
    work = Row((4, 20, 13, 17), 64, 16, prefixes=(-1, -1, 1, 1)).work()
    table = work.work.tolist()
    ranges = table[work.query_tiles + work.key_tiles :]
    tiles = table[work.query_tiles : work.query_tiles + work.key_tiles]
    texts = {start: {text for *_, text in ranges[first:last]} for start, _, first, last in tiles}
    assert texts == {0: {0}, 4: {4}, 20: {4}, 24: {4}, 37: {17}, 53: {17}}


def test_lists_of_different_batches_have_few_shapes():
    """Kernels start one program a tile, and none for the rows that pad the lists."""
    works = [attention_work([0, cut, 4096], 512) for cut in range(1, 4096, 97)]
    assert {work.work.shape for work in works} == {(192, 4)}
    assert {work.query_tiles for work in works} == {33}


def test_queries_are_listed_in_the_order_of_the_row():
    work = ROWS["shared prompt"].work()
    assert [(start, ranges) for start, _, ranges in work.queries()] == [
        (0, [(0, 16, 0)]),
        (16, [(0, 20, 0)]),
        (20, [(0, 33, 0)]),
        (33, [(0, 20, 13), (33, 49, 0)]),
        (49, [(0, 20, 13), (33, 50, 0)]),
    ]


def test_backends_convert_the_lists_once_for_each_copy():
    work = ROWS["shared prompt"].work()
    device = torch.device("cpu")
    assert work.tiles(device) is work.tiles(device)
    assert work.to("cpu").tiles(device) is not work.tiles(device)
    assert work.numbers == (5, 5, 64, 16)
    assert {field.name for field in dataclasses.fields(work)} >= {"work", "segments"}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"window": 0}, "attention window 0: must be at least 1"),
        ({"cu_segments": []}, "must rise from 0"),
        ({"cu_segments": [1, 4]}, "must rise from 0"),
        ({"cu_segments": [0, 4, 3]}, "must rise from 0"),
        ({"tokens": 3}, "segments end at 4, but the row has 3 tokens"),
        ({"prefixes": [-1]}, "1 prefixes for 2 segments"),
        ({"prefixes": [-1, 1]}, "segment 1 has prefix 1: must be an earlier segment without a prefix, or -1"),
        ({"prefixes": [-2, -1]}, "segment 0 has prefix -2"),
        ({"cu_segments": [0, 2, 4, 6], "prefixes": [-1, 0, 1]}, "segment 2 has prefix 1"),
    ],
)
def test_errors_name_the_wrong_argument(given, message):
    with pytest.raises(ValueError, match=message):
        attention_work(**{"cu_segments": [0, 2, 4], "window": 4, **given})
