"""What a sampler does to leakage: foreseen from probabilities over reference answers, and measured by generating.

The hazard is exact: at each token of a reference answer, the probability that the sampler gives to pieces of a foreign script.
One pass over the references serves all samplers. The hazard ranks samplers, but understates free running: after one foreign
token the next ones are likelier.

Shapes: T tokens of an answer, V pieces, S samplers.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import product

import torch
from torch import Tensor

from engine.inference.generation import Prompt, answers
from model.cache import KeyValueCache
from model.generate import filter_logits
from model.mistral import Mistral
from model.sampling import Sampling
from model.vocabulary.chat import Message, encode_chat, encode_prompt, ends_of
from model.vocabulary.tokenizer import Tokenizer
from recipes.evaluation.leakage.languages import LATIN, SCRIPTS, foreign_letters

# Tokens whose scores are held at once, for each sampler in turn.
_CHUNK = 64
_BYTE = re.compile(r"<0x([0-9A-F]{2})>")
# First bytes in UTF-8 of the letters of most scripts but Latin: Cyrillic to Arabic, Indic to Georgian, kana, kanji and Hangul.
_FIRST_BYTES = frozenset((*range(0xCE, 0xE0), 0xE0, 0xE1, *range(0xE3, 0xEE)))
# Of them, those of kana and kanji: no foreign ones in an answer in Japanese or Chinese.
_HAN_BYTES = frozenset(range(0xE3, 0xEA))


@dataclass(frozen=True)
class Reference:
    """An answer without leaks. language: its own."""

    messages: list[Message]
    response: str
    language: str


@dataclass(frozen=True)
class Foreseen:
    """A sampler on one reference answer of `tokens` tokens.

    hazard: sum over the tokens of the foreign mass. leak: probability of at least one foreign token along the reference.
    kept: tokens of the reference that the sampler could choose.
    """

    tokens: int
    hazard: float
    leak: float
    kept: int


def grid(
    temperatures: Sequence[float],
    min_ps: Sequence[float],
    top_ps: Sequence[float],
    repetition_penalties: Sequence[float],
    max_new_tokens: int,
) -> list[Sampling]:
    """All combinations, each once. Greedy choice (temperature 0) ignores min-p and top-p."""
    found = [
        Sampling(
            temperature=temperature,
            min_p=min_p if temperature else 0.0,
            top_p=top_p if temperature else 1.0,
            repetition_penalty=penalty,
            max_new_tokens=max_new_tokens,
        )
        for temperature, min_p, top_p, penalty in product(temperatures, min_ps, top_ps, repetition_penalties)
    ]
    return list(dict.fromkeys(found))


def foreign_pieces(tokenizer: Tokenizer, language: str) -> Tensor:
    """The pieces that hold a letter of a script that answers in a language are not in, Latin aside: boolean [V].

    A byte piece counts where it can only begin such a letter.
    """
    pattern = foreign_letters(tuple(sorted(SCRIPTS[language])))
    own_bytes = _HAN_BYTES if "han" in SCRIPTS[language] else frozenset()
    first = frozenset() if LATIN not in SCRIPTS[language] and not own_bytes else _FIRST_BYTES - own_bytes
    foreign = []
    for piece in tokenizer.pieces():
        byte = _BYTE.fullmatch(piece)
        foreign.append(int(byte[1], 16) in first if byte else bool(pattern.search(piece)))
    return torch.tensor(foreign)


@torch.inference_mode()
def foresee(
    model: Mistral, tokenizer: Tokenizer, reference: Reference, samplers: Sequence[Sampling], foreign_V: Tensor
) -> list[Foreseen]:
    """What each sampler does along a reference answer. Tokens of the reference that are foreign themselves are left out.

    Raises: ValueError for a conversation longer than the model's positions.
    """
    chat = encode_chat(tokenizer, [*reference.messages, Message(role="assistant", content=reference.response)])
    if len(chat.ids) > model.config.max_position_embeddings:
        raise ValueError(
            f"a reference of {len(chat.ids)} tokens: the model has {model.config.max_position_embeddings} positions"
        )
    device = model.lm_head.weight.device
    ids_T = torch.tensor(chat.ids, device=device)
    foreign_V = foreign_V.to(device)
    cache = KeyValueCache(model.config, dtype=model.lm_head.weight.dtype, device=device)
    hidden_TD = model(ids_T, torch.arange(len(ids_T), device=device), cache.attend)
    places = [place for place, trained in enumerate(chat.trained) if trained and place and not foreign_V[chat.ids[place]]]
    sums = [[0.0, 0.0, 0] for _ in samplers]  # hazard, log of no leak, kept
    for begin in range(0, len(places), _CHUNK):
        chunk = places[begin : begin + _CHUNK]
        logits_TV = model.logits(hidden_TD[[place - 1 for place in chunk]]).float()
        seen_TV = torch.zeros_like(logits_TV, dtype=torch.bool)
        for row, place in enumerate(chunk):
            seen_TV[row, ids_T[:place]] = True
        target_T1 = ids_T[chunk][:, None]
        for sampler, totals in zip(samplers, sums, strict=True):
            kept_TV = filter_logits(logits_TV, seen_TV, sampler)
            if sampler.temperature == 0:
                best_T1 = kept_TV.argmax(dim=-1, keepdim=True)
                mass_T = foreign_V[best_T1[:, 0]].double()
                kept = int((best_T1 == target_T1).sum())
            else:
                mass_T = kept_TV.double().softmax(dim=-1)[:, foreign_V].sum(dim=-1)
                kept = int(kept_TV.gather(1, target_T1).isfinite().sum())
            totals[0] += float(mass_T.sum())
            totals[1] += float(torch.log1p(-mass_T.clamp(max=1 - 1e-12)).sum())
            totals[2] += kept
    return [
        Foreseen(len(places), hazard, 1 - float(torch.tensor(stay, dtype=torch.float64).exp()), int(kept))
        for hazard, stay, kept in sums
    ]


def generated(
    model: Mistral,
    tokenizer: Tokenizer,
    conversations: Sequence[Sequence[Message]],
    samplers: Sequence[Sampling],
    wanted: Sequence[tuple[int, int, int]],  # (sampler, conversation, sample)
    *,
    seed: int,
    rows: int,
) -> Iterator[tuple[tuple[int, int, int], list[int], str]]:
    """The answers that are wanted, each as it ends: (which, token ids without the end, text).

    An answer depends on the seed, its sampler, conversation and sample alone. Raises: ValueError for a prompt that is too long.
    """
    ends = ends_of(tokenizer, model.config)
    prompts = [encode_prompt(tokenizer, list(messages)) for messages in conversations]

    def asked() -> Iterator[Prompt]:
        for sampler, conversation, sample in wanted:
            # Far apart, so that no two answers share their draws.
            own = ((seed * 1_000_003 + conversation) * 10_007 + sample) * 10_007 + sampler
            yield Prompt(prompts[conversation], replace(samplers[sampler], seed=own % 2**63), ends)

    for answer in answers(model, asked(), rows=rows):
        ids = [token for token in answer.ids if token not in ends]
        yield wanted[answer.number], ids, tokenizer.decode(ids).strip()


def distinct(texts: Sequence[Sequence[int]], length: int) -> float:
    """The share of different n-grams among all n-grams of some texts (Li et al. 2016, https://arxiv.org/abs/1510.03055)."""
    grams = [tuple(text[place : place + length]) for text in texts for place in range(len(text) - length + 1)]
    return len(set(grams)) / len(grams) if grams else 0.0
