"""The rolling cache against attention over the whole text, its memory, and what it forgets."""

import random

import pytest
import torch

from model.cache import KeyValueCache
from model.config import MistralConfig
from model.mistral import packed_attention

SHAPES = [(1, 4, 2), (2, 4, 2), (7, 4, 2), (300, 4, 2), (None, 4, 2), (7, 4, 1), (7, 4, 4)]


def through_cache(model, cache: KeyValueCache, tokens: torch.Tensor, chunks) -> torch.Tensor:
    parts = []
    for chunk in tokens.split(list(chunks)):
        positions = torch.arange(len(cache), len(cache) + len(chunk))
        parts.append(model(chunk, positions, cache.attend))
    return torch.cat(parts)


def split_at_random(total: int, seed: int) -> list[int]:
    """Chunks of one token for the most part, some of a few, some longer than the window; they add up to `total`."""
    chooser, chunks = random.Random(seed), []
    while sum(chunks) < total:
        chunks.append(min(total - sum(chunks), chooser.choice([1, 1, 1, 2, 5, 7, 8, 40, 310])))
    return chunks


@pytest.mark.parametrize(("window", "heads", "kv_heads"), SHAPES)
def test_any_split_into_chunks_gives_the_hidden_states_of_the_whole_text(small_model, window, heads, kv_heads):
    model = small_model(
        sliding_window=window, num_attention_heads=heads, num_key_value_heads=kv_heads, max_position_embeddings=700
    ).to(torch.float64)
    tokens = torch.randint(64, (700,), generator=torch.Generator().manual_seed(0))
    whole = model(tokens, torch.arange(700), packed_attention(torch.tensor([0, 700]), window))
    for seed in range(2):
        cache = KeyValueCache(model.config, dtype=torch.float64)
        chunked = through_cache(model, cache, tokens, split_at_random(700, seed))
        assert len(cache) == 700
        torch.testing.assert_close(chunked, whole, rtol=0, atol=1e-11)


@pytest.mark.parametrize("chunk", [1, 3, 50])
def test_memory_is_one_window_at_any_length(small_model, chunk):
    model = small_model(sliding_window=10)
    cache = KeyValueCache(model.config)
    through_cache(model, cache, torch.zeros(150, dtype=torch.int64), [chunk] * (150 // chunk))
    layers, key_and_value, places, heads, head_dim, float32 = 2, 2, 10, 2, 8, 4
    assert cache.nbytes == layers * key_and_value * places * heads * head_dim * float32


def test_memory_of_a_short_text_is_at_most_twice_what_it_needs():
    config = MistralConfig(num_hidden_layers=1, sliding_window=4096, num_key_value_heads=2, head_dim=8)
    cache = KeyValueCache(config, dtype=torch.bfloat16)
    token = torch.zeros(1, 2, 8, dtype=torch.bfloat16)
    for _ in range(600):
        cache.attend(0, token, token, token)
    bytes_of_a_token = 2 * 2 * 8 * 2
    assert 600 * bytes_of_a_token <= cache.nbytes <= 2 * 600 * bytes_of_a_token


def test_without_a_window_the_longest_text_fits_and_one_token_more_is_refused(small_model):
    model = small_model(sliding_window=None, max_position_embeddings=32)
    for chunks in ([32], [1] * 32, [30, 2]):
        cache = KeyValueCache(model.config)
        through_cache(model, cache, torch.zeros(32, dtype=torch.int64), chunks)
        with pytest.raises(ValueError, match=r"33 tokens.*max_position_embeddings is 32"):
            through_cache(model, cache, torch.zeros(1, dtype=torch.int64), [1])


@pytest.mark.parametrize("chunks", [[1] * 20, [20], [3, 1, 1, 9, 1, 5]])
def test_a_key_changes_the_outputs_of_its_window_and_no_other_bit(chunks):
    config = MistralConfig(num_hidden_layers=1, sliding_window=4, num_attention_heads=4, num_key_value_heads=2, head_dim=8)
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(20, heads, 8, generator=generator) for heads in (4, 2, 2))

    def attended(key, value):
        cache = KeyValueCache(config)
        pieces = zip(query.split(chunks), key.split(chunks), value.split(chunks), strict=True)
        return torch.cat([cache.attend(0, *piece) for piece in pieces])

    before = attended(key, value)
    for place in (0, 6, 19):
        other_key, other_value = key.clone(), value.clone()
        other_key[place] += 1
        other_value[place] -= 1
        differs = (attended(other_key, other_value) != before).flatten(1).any(dim=1)
        assert differs.tolist() == [place <= row < place + 4 for row in range(20)]


@pytest.mark.parametrize(
    ("window", "first", "kept", "left"),
    [(10, 9, 4, 4), (10, 10, 10, 10), (10, 30, 30, 30), (10, 30, 29, 0), (300, 290, 7, 7), (None, 60, 0, 0)],
)
def test_a_kept_beginning_continues_like_a_fresh_text(small_model, window, first, kept, left):
    """Nothing is kept if a part of the beginning is overwritten."""
    model = small_model(sliding_window=window, max_position_embeddings=700).to(torch.float64)
    tokens = torch.randint(64, (first + 40,), generator=torch.Generator().manual_seed(0))
    cache = KeyValueCache(model.config, dtype=torch.float64)
    through_cache(model, cache, tokens[:first], [first])
    assert cache.keep(kept) == left == len(cache)
    text = torch.cat([tokens[:left], tokens[first:]])
    whole = model(text, torch.arange(len(text)), packed_attention(torch.tensor([0, len(text)]), window))
    torch.testing.assert_close(through_cache(model, cache, tokens[first:], [7] * 5 + [5]), whole[left:], rtol=0, atol=1e-11)
