"""Batched generation: many texts grow side by side, a token of each in one pass over the weights.

Each text has its own prompt, sampler settings, seed and ends. It takes a row of the cache when one is free, and leaves it when
it ends; then the next text enters. New prompts are read in packs (`engine.inference.packs`): what several of them begin with is
computed once; equal prompts, as of several choices, once in all.

A text's tokens do not depend on the texts beside it: random numbers come from its own seed, attention reads its own row, and
matrix products have a multiple of 16 rows, with which a CPU's products gave each row the same bits, however many rows there
were. On a GPU, products of another number of rows may round differently.

Shapes: B texts, V pieces, D width, T tokens of a pack.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from engine.inference.packs import pack_texts
from model.generate import NOT_FINITE, choose, room_for_answer
from model.mistral import Mistral
from model.row_cache import RowCache
from model.sampling import Sampling

ROWS = 32
# Rows of a matrix product are a multiple of this.
_MULTIPLE = 16
# New texts enter together where this share of the rows is free: a pass over the weights for one prompt is dear.
_ENTERING = 8

End = Literal["stop", "length"]


@dataclass(frozen=True)
class Prompt:
    """A text to continue."""

    ids: Sequence[int]
    sampling: Sampling
    stop_ids: frozenset[int] = frozenset()
    """The text ends after any of these tokens."""
    ends: Callable[[int], bool] | None = None
    """Asked after each token that is no stop token, in order: whether the text ends here, as at a stop string."""


@dataclass(frozen=True)
class Token:
    """A new token of a text."""

    number: int  # of the prompt, from 0
    token: int  # a stop token too
    end: End | None  # why the text ends here, or that it goes on


@dataclass(frozen=True)
class Answer:
    """A whole continuation."""

    number: int  # of the prompt, from 0
    ids: list[int]  # the last is the stop token, if `end` is "stop" and one ended it
    end: End


@dataclass
class _Text:
    """A text in a row."""

    number: int
    prompt: Prompt
    room: int  # tokens that may still follow
    generator: torch.Generator
    last: int = 0  # its newest token


@dataclass(eq=False)
class _Rows:
    """The texts in the rows of a cache, in their order, and what the samplers know of each."""

    model: Mistral
    cache: RowCache
    seen_RV: Tensor  # boolean: tokens of each text so far
    texts: list[_Text] = field(default_factory=list)


def generate_many(
    model: Mistral,
    prompts: Iterable[Prompt],  # read as rows become free: it may be endless
    *,
    rows: int = ROWS,  # texts at once
    pack_tokens: int = 4096,  # prompt tokens that are read at once; a longer prompt is read alone
) -> Iterator[Token]:
    """Continue the prompts: yield each token as it is chosen, the texts' tokens interleaved.

    A text ends after a stop token, where `ends` says so, after max_new_tokens, or at the model's max_position_embeddings.
    Global random state is neither read nor changed.

    Raises: ValueError for `rows` or `pack_tokens` below 1; for a prompt that `model.generate.room_for_answer` refuses, naming
        its number, when its turn comes; for scores that are not finite.
    """
    if rows < 1 or pack_tokens < 1:
        raise ValueError(f"rows = {rows}, pack_tokens = {pack_tokens}: must be at least 1")
    return _generate(model, prompts, rows, pack_tokens)


def answers(model: Mistral, prompts: Iterable[Prompt], *, rows: int = ROWS, pack_tokens: int = 4096) -> Iterator[Answer]:
    """The whole continuations, each as it ends. Raises: ValueError as `generate_many` does."""
    growing: dict[int, list[int]] = {}
    for token in generate_many(model, prompts, rows=rows, pack_tokens=pack_tokens):
        growing.setdefault(token.number, []).append(token.token)
        if token.end:
            yield Answer(token.number, growing.pop(token.number), token.end)


def _generate(model: Mistral, prompts: Iterable[Prompt], rows: int, pack_tokens: int) -> Iterator[Token]:
    weight = model.lm_head.weight
    cache = RowCache(model.config, rows, dtype=weight.dtype, device=weight.device)
    seen_RV = torch.zeros((rows, model.config.unpadded_vocab_size), dtype=torch.bool, device=weight.device)
    state = _Rows(model, cache, seen_RV)
    waiting = enumerate(prompts)
    while True:
        free = rows - len(state.texts)
        if not state.texts or free >= max(1, rows // _ENTERING):
            entering = [_entered(model, number, prompt) for number, prompt in islice(waiting, free)]
            if not entering and not state.texts:
                return
            for logits_BV, first in _read(state, entering, pack_tokens):
                yield from _advance(state, logits_BV, first)
            _leave(state)
        if state.texts:
            yield from _advance(state, _step(state), 0)
            _leave(state)


def _entered(model: Mistral, number: int, prompt: Prompt) -> _Text:
    try:
        room = room_for_answer(model.config, prompt.ids)
    except ValueError as error:
        raise ValueError(f"prompt {number}: {error}") from None
    generator = torch.Generator(model.lm_head.weight.device).manual_seed(prompt.sampling.seed)
    return _Text(number, prompt, min(room, prompt.sampling.max_new_tokens), generator)


@torch.inference_mode()
def _read(state: _Rows, entering: list[_Text], pack_tokens: int) -> Iterator[tuple[Tensor, int]]:
    """Read new texts' prompts into the cache. Yields (scores after some of them, the row of the first of these)."""
    model, device = state.model, state.seen_RV.device
    for pack in pack_texts([text.prompt.ids for text in entering], pack_tokens):
        first = len(state.texts)
        places = [torch.from_numpy(part.places()) for part in pack.parts]
        padding = -pack.places % _MULTIPLE
        work = pack.work(state.cache.window, tokens=pack.places + padding).to(device)
        tokens_T, positions_T = (F.pad(ids_T, (0, padding)).to(device) for ids_T in (pack.tokens_T, pack.positions_T))
        hidden_TD = model(tokens_T, positions_T, state.cache.reading(work, places, model.attention_backend))
        for row, part in enumerate(pack.parts, first):
            text = entering[part.text]
            state.texts.append(text)
            state.seen_RV[row] = False
            state.seen_RV[row, torch.tensor(text.prompt.ids, device=device)] = True
        last_B = torch.tensor([int(own[-1]) for own in places], device=device)
        yield _logits(model, hidden_TD[last_B]), first


@torch.inference_mode()
def _step(state: _Rows) -> Tensor:
    """Scores of the next token of each text in a row: [B, V]."""
    device, count = state.seen_RV.device, len(state.texts)
    padding = [0] * (-count % _MULTIPLE)
    tokens_T = torch.tensor([text.last for text in state.texts] + padding, device=device)
    positions_T = torch.tensor(state.cache.lengths + padding, dtype=torch.int32, device=device)
    return _logits(state.model, state.model(tokens_T, positions_T, state.cache.writing())[:count])


def _logits(model: Mistral, hidden_BD: Tensor) -> Tensor:
    padding = hidden_BD.new_zeros((-len(hidden_BD) % _MULTIPLE, hidden_BD.shape[1]))
    return model.logits(torch.cat((hidden_BD, padding)))[: len(hidden_BD)]


def _advance(state: _Rows, logits_BV: Tensor, first: int) -> list[Token]:
    """Choose the next token of the texts from row `first` on, in one wait for the device."""
    texts = state.texts[first : first + len(logits_BV)]
    token_B = _chosen(logits_BV, state.seen_RV[first : first + len(texts)], texts)
    finite = logits_BV.isfinite().all()
    *tokens, is_finite = torch.cat((token_B, finite[None])).tolist()
    if not is_finite:
        raise ValueError(NOT_FINITE)
    state.seen_RV[torch.arange(first, first + len(texts), device=token_B.device), token_B] = True
    found = []
    for text, token in zip(texts, tokens, strict=True):
        text.last, text.room = token, text.room - 1
        stopped = token in text.prompt.stop_ids or (text.prompt.ends is not None and text.prompt.ends(token))
        end: End | None = "stop" if stopped else "length" if text.room == 0 else None
        text.room = 0 if end else text.room
        found.append(Token(text.number, token, end))
    return found


@torch.inference_mode()
def _chosen(logits_BV: Tensor, seen_BV: Tensor, texts: Sequence[_Text]) -> Tensor:
    """The next token of each text, those with the same sampler settings at once: int64 [B]."""
    alike: dict[Sampling, list[int]] = {}
    for row, text in enumerate(texts):
        alike.setdefault(replace(text.prompt.sampling, seed=0, max_new_tokens=1), []).append(row)
    if len(alike) == 1:
        return choose(logits_BV, seen_BV, next(iter(alike)), [text.generator for text in texts])
    token_B = torch.empty(len(texts), dtype=torch.int64, device=logits_BV.device)
    for sampling, rows in alike.items():
        row_B = torch.tensor(rows, device=logits_BV.device)
        token_B[row_B] = choose(logits_BV[row_B], seen_BV[row_B], sampling, [texts[row].generator for row in rows])
    return token_B


@torch.inference_mode()
def _leave(state: _Rows) -> None:
    """Free the rows of texts that ended."""
    for row in reversed(range(len(state.texts))):
        if state.texts[row].room == 0:
            state.cache.remove(row)
            last = state.texts.pop()
            if row < len(state.texts):
                state.texts[row] = last
                state.seen_RV[row] = state.seen_RV[len(state.texts)]
