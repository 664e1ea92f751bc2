"""Log-likelihoods of many continuations, each of its context, in packs that compute common beginnings once.

A request is a context and its continuation, as token ids. Both, without the last token, are the text that the model reads. The
continuation's tokens are predicted at the places from the context's last one on. Equal texts are read once: the
letters A to D after one question are four labels at one place.

Shapes: T places of a pack, N places whose scores are needed, L labels, V pieces, D width.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from engine.inference.packs import Pack, pack_texts
from kernels.logit_budget import default_budget
from model.generate import NOT_FINITE
from model.mistral import Mistral, attention_by


@dataclass(frozen=True)
class Request:
    """A continuation whose probability after its context is asked for."""

    context: Sequence[int]  # token ids, at least one, such as beginning-of-sequence
    continuation: Sequence[int]

    @property
    def text(self) -> list[int]:
        """The tokens that the model reads."""
        return [*self.context, *self.continuation][:-1]


@dataclass(frozen=True)
class Score:
    """The result of a request."""

    log_likelihood: float  # log-probability of the continuation, nats
    greedy: bool  # each of its tokens is the likeliest at its place; of equally likely tokens, the first in the vocabulary


class Scoring:
    """The packs of a list of requests. They depend on the requests and `pack_tokens` alone, so a stopped run can go on.

    Attributes:
        packs: what is computed at once.
        places: places that all packs compute.
        places_alone: places that one request at a time would compute.
    """

    def __init__(self, requests: Sequence[Request], *, pack_tokens: int, longest: int) -> None:
        """Plan the packs.

        Args: pack_tokens: places of a pack; a longer text is a pack of its own. longest: the model's max_position_embeddings.
        Raises: ValueError for a request without context or continuation, or with more than `longest` tokens to read.
        """
        for number, request in enumerate(requests):
            if not request.context or not request.continuation:
                raise ValueError(
                    f"request {number} has no {'continuation' if request.context else 'context'}: give at least one token "
                    "of each, such as beginning-of-sequence as context"
                )
            if len(request.context) + len(request.continuation) - 1 > longest:
                raise ValueError(
                    f"request {number} has {len(request.context) + len(request.continuation) - 1} tokens to read: the model's "
                    f"max_position_embeddings is {longest}; shorten its context (`shortened`)"
                )
        self.requests = requests
        self.packs: list[Pack] = pack_texts([request.text for request in requests], pack_tokens)
        self.places = sum(pack.places for pack in self.packs)
        self.places_alone = sum(len(request.context) + len(request.continuation) - 1 for request in requests)

    @torch.inference_mode()
    def score(self, model: Mistral, pack: Pack) -> dict[int, Score]:
        """The results of the requests in a pack, by their numbers.

        Raises: ValueError for scores that are not finite.
        """
        device = model.lm_head.weight.device
        attend = attention_by(pack.work(model.config.sliding_window).to(device), model.attention_backend)
        hidden_TD = model(pack.tokens_T.to(device), pack.positions_T.to(device), attend)
        places: list[int] = []
        labels: list[int] = []
        for part in pack.parts:
            request = self.requests[part.text]
            first = len(request.context) - 1
            places += part.places()[first:].tolist()
            labels += request.continuation
        log_prob_L, greedy_L = label_log_probs(model, hidden_TD, places, labels)
        results, done = {}, 0
        for part in pack.parts:
            count = len(self.requests[part.text].continuation)
            own = slice(done, done + count)
            results[part.text] = Score(sum(log_prob_L[own]), all(greedy_L[own]))
            done += count
        return results


def score(model: Mistral, requests: Sequence[Request], *, pack_tokens: int | None = None) -> Iterator[tuple[int, Score]]:
    """(number of the request, its result) of all requests, pack after pack.

    Args: pack_tokens: see `Scoring`; default: `default_pack_tokens`.
    Raises: ValueError as `Scoring` does, before any computation.
    """
    device = model.lm_head.weight.device
    pack_tokens = default_pack_tokens(device) if pack_tokens is None else pack_tokens
    plan = Scoring(requests, pack_tokens=pack_tokens, longest=model.config.max_position_embeddings)
    for pack in plan.packs:
        yield from plan.score(model, pack).items()


def default_pack_tokens(device: torch.device) -> int:
    """Places of a pack: enough to keep a GPU busy and to share long prefixes among many texts."""
    return 16_384 if device.type == "cuda" else 8_192


def shortened(request: Request, longest: int) -> Request:
    """The request with at most `longest` tokens to read: the context's first token stays, the tokens after it go.

    Raises: ValueError where even the context's first and last tokens do not fit beside the continuation.
    """
    excess = len(request.context) + len(request.continuation) - 1 - longest
    if excess <= 0:
        return request
    if excess > len(request.context) - 2:
        raise ValueError(
            f"a continuation of {len(request.continuation)} tokens does not fit the model's {longest} positions with a context"
        )
    return Request([request.context[0], *request.context[1 + excess :]], request.continuation)


def label_log_probs(
    model: Mistral,
    hidden_TD: Tensor,
    places: Sequence[int],  # [L] place of each label in the pack, any number of times each
    labels: Sequence[int],  # [L] the token that follows
) -> tuple[list[float], list[bool]]:
    """Log-probability of each label after its place, and whether it is the likeliest token there.

    Only places that are needed reach the head, each once, a portion at a time.
    Raises: ValueError for scores that are not finite.
    """
    device = hidden_TD.device
    place_N, row_L = torch.unique(torch.tensor(places, dtype=torch.int64), return_inverse=True)
    # Labels in the order of their rows, so that each portion of rows has consecutive labels.
    order_L = row_L.argsort(stable=True)
    label_L = torch.tensor(labels, dtype=torch.int64)[order_L].to(device)
    sorted_L = row_L[order_L]
    rows = max(1, default_budget(device) // (4 * model.config.vocab_size))
    log_probs, likeliest = [], []
    hidden_ND = hidden_TD[place_N.to(device)]
    for start in range(0, len(place_N), rows):
        first, last = torch.searchsorted(sorted_L, torch.tensor([start, start + rows])).tolist()
        logits_NV = model.logits(hidden_ND[start : start + rows])
        row_l, label_l = (sorted_L[first:last] - start).to(device), label_L[first:last]
        # On a CPU a maximum is three times as fast as its place; the place of the first maximum decides between equals.
        highest_N = logits_NV.amax(dim=-1)
        label_logit_l = logits_NV[row_l, label_l]
        equal_l = (label_logit_l == highest_N[row_l]).nonzero()[:, 0]
        greedy_l = torch.zeros_like(label_l, dtype=torch.bool)
        greedy_l[equal_l] = logits_NV[row_l[equal_l]].argmax(dim=-1) == label_l[equal_l]
        log_probs.append(label_logit_l - logits_NV.logsumexp(dim=-1)[row_l])
        likeliest.append(greedy_l)
    log_prob_L, greedy_L = (torch.cat(parts).cpu() for parts in (log_probs, likeliest))
    if not log_prob_L.isfinite().all():
        raise ValueError(NOT_FINITE)
    back_L = torch.empty_like(order_L)
    back_L[order_L] = torch.arange(len(order_L))
    return log_prob_L.double()[back_L].tolist(), greedy_L[back_L].tolist()
