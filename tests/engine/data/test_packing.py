"""Best-fit packing against its definition and its bound, and dealing to ranks."""

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.data.packing import deal, pack_best_fit


def test_an_example_packed_by_hand():
    # By hand: 7 opens A, 6 opens B, 4 fills B, the first 3 fills A, the second 3 opens C, 2 joins C.
    assert pack_best_fit([3, 7, 4, 2, 6, 3], 10) == [[1, 0], [4, 2], [5, 3]]


def test_the_fullest_bin_with_room_is_chosen():
    # By decreasing length: 7 leaves room for 3, 6 leaves room for 4; then 4 and 3 fill both bins exactly.
    assert pack_best_fit([6, 7, 3, 4], 10) == [[1, 2], [0, 3]]


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(1, 50), max_size=60), st.integers(50, 120))
def test_every_item_is_packed_once_within_capacity_and_near_the_bound(lengths, capacity):
    packs = pack_best_fit(lengths, capacity)
    assert sorted(item for pack in packs for item in pack) == list(range(len(lengths)))
    assert all(0 < sum(lengths[item] for item in pack) <= capacity for pack in packs)
    # No two bins fit into one, so on average all bins but one are more than half full.
    assert len(packs) <= 2 * sum(lengths) / capacity + 1
    assert packs == pack_best_fit(lengths, capacity)


def brute_force_best_fit(lengths, capacity):
    bins, rooms = [], []
    for item in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        fitting = [b for b in range(len(bins)) if rooms[b] >= lengths[item]]
        if fitting:
            best = min(fitting, key=lambda b: (rooms[b], b))
        else:
            best = len(bins)
            bins.append([])
            rooms.append(capacity)
        bins[best].append(item)
        rooms[best] -= lengths[item]
    return bins


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(1, 30), max_size=50), st.integers(30, 60))
def test_packing_equals_its_quadratic_definition(lengths, capacity):
    assert pack_best_fit(lengths, capacity) == brute_force_best_fit(lengths, capacity)


def test_an_item_above_capacity_is_refused():
    with pytest.raises(ValueError, match="11 does not fit a pack of 10"):
        pack_best_fit([11], 10)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 30), min_size=1, max_size=40), st.integers(30, 90), st.integers(1, 5))
def test_ranks_get_the_same_number_of_packs_and_together_all_items(lengths, capacity, ranks):
    packs = pack_best_fit(lengths, capacity)
    dealt = deal(packs, lengths, ranks)
    assert len(dealt) == ranks
    assert len({len(packs_of_rank) for packs_of_rank in dealt}) == 1
    flat = [pack for packs_of_rank in dealt for pack in packs_of_rank]
    assert Counter(item for pack in flat for item in pack) == Counter(range(len(lengths)))
    assert all(sum(lengths[item] for item in pack) <= capacity for pack in flat)
    assert all(pack for pack in flat) or len(lengths) < len(flat)
    assert ranks > 1 or flat == packs
