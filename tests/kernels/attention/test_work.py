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
def test_ranges_are_as_short_and_as_few_as_possible(row):
    """The first and last place of a range are seen; the ranges of a tile rise, and no two could be one."""
    for tiles, by_query in zip(listed(row), (True, False), strict=True):
        for _, _, seen in pairs(row, tiles, by_query=by_query):
            assert seen[:, 0].any()
            assert seen[:, -1].any()
        for _, ranges in tiles:
            for (_, stop, shift), (begin, _, other) in pairwise(ranges):
                assert stop <= begin
                assert (stop, shift) != (begin, other)


@pytest.mark.parametrize("row", [*ROWS.values(), *map(drawn, range(60))], ids=str)
def test_tiles_cover_segments_and_padding_heaviest_first(row):
    bounds = [*row.bounds, row.tokens]
    expected = [(first, min(first + row.tile, end)) for start, end in pairwise(bounds) for first in range(start, end, row.tile)]
    for tiles in listed(row):
        assert len(tiles) % 64 == 0
        assert sorted(tile for tile, _ in tiles if tile[0] < tile[1]) == expected
        loads = [sum(stop - begin for begin, stop, _ in ranges) for _, ranges in tiles]
        assert loads == sorted(loads, reverse=True)
        assert all(not ranges for (start, _), ranges in tiles if start >= bounds[-2])


def test_lists_of_different_batches_have_one_shape():
    shapes = {attention_work([0, cut, 4096], 512).work.shape for cut in range(1, 4096, 97)}
    assert len(shapes) == 1
    assert all(size % 64 == 0 for size, _ in shapes)


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
    assert work.numbers == (64, 64, 64, 16)
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
