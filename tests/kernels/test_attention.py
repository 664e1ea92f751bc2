"""Windowed, packed, grouped attention against the plain formula in float64."""

import itertools

import pytest
import torch

from kernels.attention import attention_tiles, sliding_window_attention


def _naive(query, key, value, bounds, window):
    """Place by place, head by head."""
    out = torch.zeros_like(query)
    group = query.shape[1] // key.shape[1]
    for start, end in itertools.pairwise(bounds):
        for place in range(start, end):
            first = start if window is None else max(start, place - window + 1)
            for head in range(query.shape[1]):
                scores = key[first : place + 1, head // group] @ query[place, head] / query.shape[2] ** 0.5
                out[place, head] = scores.softmax(0) @ value[first : place + 1, head // group]
    return out


@pytest.mark.parametrize("window", [1, 2, 7, 8, 9, 100, None])
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 2), (3, 1), (2, 2)])
@pytest.mark.parametrize("bounds", [[0, 33], [0, 1, 9, 9, 17, 33], [0, 32, 33]])
def test_equals_the_formula(window, heads, kv_heads, bounds):
    generator = torch.Generator().manual_seed(0)
    query, key, value, grad = (
        torch.randn(33, count, 8, generator=generator, dtype=torch.float64).requires_grad_()
        for count in (heads, kv_heads, kv_heads, heads)
    )
    # Tiles of 8 queries: windows and documents begin and end inside, at and beyond a tile.
    tiles = attention_tiles(torch.tensor(bounds, dtype=torch.int32), window, tile=8)
    out = sliding_window_attention(query, key, value, tiles)
    expected = _naive(query, key, value, bounds, window)
    torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)
    ours = torch.autograd.grad(out, (query, key, value), grad)
    theirs = torch.autograd.grad(expected, (query, key, value), grad)
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)


def test_what_is_not_seen_changes_no_bit():
    generator = torch.Generator().manual_seed(1)
    query, key, value = (torch.randn(64, count, 16, generator=generator) for count in (4, 2, 2))
    tiles = attention_tiles(torch.tensor([0, 20, 64]), 8, tile=16)
    before = sliding_window_attention(query, key, value, tiles)
    place = 40
    unseen = torch.ones(64, dtype=torch.bool)
    unseen[place - 7 : place + 1] = False
    key[unseen], value[unseen] = 1e4, -1e4
    after = sliding_window_attention(query, key, value, tiles)
    assert torch.equal(before[place], after[place])
    key[place - 7] += 1
    assert not torch.equal(before[place], sliding_window_attention(query, key, value, tiles)[place])


def test_no_tile_reaches_beyond_its_window_or_document():
    tiles = attention_tiles(torch.tensor([0, 1000, 1010, 3000]), 100, tile=64)
    assert [tile.query_start for tile in tiles] == list(range(0, 3000, 64))
    for tile in tiles:
        assert tile.mask_QJ.shape == (tile.query_end - tile.query_start, tile.query_end - tile.key_start)
        # The first key column is seen by the first query: nothing is computed in vain on the left.
        assert tile.mask_QJ[0, 0]


def test_wrong_window_is_refused():
    with pytest.raises(ValueError, match="window 0"):
        attention_tiles(torch.tensor([0, 4]), 0)
