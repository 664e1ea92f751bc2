"""The cache of many texts against the cache of one text, its memory, and rows that move."""

from itertools import pairwise

import pytest
import torch

from kernels.attention.work import attention_work
from model.cache import KeyValueCache
from model.config import MistralConfig
from model.row_cache import RowCache


@pytest.fixture(autouse=True)
def _short_first_rings(monkeypatch):
    """Rings that grow several times before they are a window long."""
    monkeypatch.setattr("model.row_cache._FIRST_SLOTS", 4)


def read(model, cache: RowCache, texts: list[list[int]]) -> torch.Tensor:
    """Let texts enter, packed into one row of tokens; the hidden state of each text's last token."""
    bounds = [0, *torch.tensor([len(text) for text in texts]).cumsum(0).tolist()]
    work = attention_work(bounds, model.config.sliding_window)
    places = [torch.arange(start, end) for start, end in pairwise(bounds)]
    tokens = torch.tensor([token for text in texts for token in text])
    hidden = model(tokens, torch.cat([torch.arange(len(text)) for text in texts]), cache.reading(work, places))
    return hidden[[end - 1 for end in bounds[1:]]]


def write(model, cache: RowCache, tokens: list[int]) -> torch.Tensor:
    positions = torch.tensor(cache.lengths)
    return model(torch.tensor(tokens), positions, cache.writing())


def alone(model, text: list[int]) -> torch.Tensor:
    cache = KeyValueCache(model.config, dtype=torch.float64)
    return model(torch.tensor(text), torch.arange(len(text)), cache.attend)[-1]


@pytest.mark.parametrize("window", [1, 7, 12, None])
def test_texts_that_enter_grow_and_leave_have_the_hidden_states_of_texts_alone(small_model, window):
    model = small_model(sliding_window=window).to(torch.float64)
    chooser = torch.Generator().manual_seed(0)

    def tokens(count: int) -> list[int]:
        return torch.randint(64, (count,), generator=chooser).tolist()

    cache, texts = RowCache(model.config, 4, dtype=torch.float64), [tokens(3), tokens(20)]
    last = read(model, cache, texts)
    for step in range(30):
        for hidden, text in zip(last, texts, strict=True):
            torch.testing.assert_close(hidden, alone(model, text), rtol=0, atol=1e-11)
        if step == 10:
            entering = [tokens(1), tokens(9)]
            torch.testing.assert_close(read(model, cache, entering)[0], alone(model, entering[0]), rtol=0, atol=1e-11)
            texts += entering
        if step in (15, 20):
            # The last row moves into the place of the row that ends.
            cache.remove(1)
            texts[1] = texts[-1]
            texts.pop()
        new = tokens(len(texts))
        last = write(model, cache, new)
        texts = [[*text, token] for text, token in zip(texts, new, strict=True)]
        assert cache.lengths == [len(text) for text in texts]


def test_padding_behind_the_rows_changes_nothing(small_model):
    model = small_model().to(torch.float64)
    caches = [RowCache(model.config, 2, dtype=torch.float64) for _ in range(2)]
    for cache in caches:
        read(model, cache, [[1, 2, 3], [4, 5]])
    plain = write(model, caches[0], [6, 7])
    padded = model(torch.tensor([6, 7, 0, 0]), torch.tensor([3, 2, 0, 0]), caches[1].writing())
    torch.testing.assert_close(padded[:2], plain, rtol=0, atol=1e-12)


def test_memory_is_one_window_a_row_at_any_length(small_model):
    model = small_model(sliding_window=10)
    cache = RowCache(model.config, 3)
    read(model, cache, [[1] * 30, [2] * 5])
    for _ in range(50):
        write(model, cache, [1, 2])
    layers, key_and_value, rows, slots, heads, head_dim, float32 = 2, 2, 3, 10, 2, 8, 4
    assert cache.nbytes == layers * key_and_value * rows * slots * heads * head_dim * float32


def test_without_a_window_a_text_that_outgrows_the_positions_is_refused():
    config = MistralConfig(
        num_hidden_layers=1, sliding_window=None, max_position_embeddings=8, num_key_value_heads=2, head_dim=8
    )
    cache = RowCache(config, 1)
    cache.lengths = [8]
    with pytest.raises(ValueError, match=r"text of 9 tokens: the model's max_position_embeddings is 8"):
        cache.writing()
