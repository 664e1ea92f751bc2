"""Text generation, token by token: seeded sampling over a rolling key/value cache.

The filters follow Hugging Face `transformers` (its `logits_process` module) in definition and order: repetition penalty on the
raw scores, then temperature, top-k, top-p, min-p.

Shapes: T tokens, B texts, V vocabulary (the pieces that exist). Filters take scores of one text or of many, [..., V].
"""

import math
from collections.abc import Collection, Iterator, Sequence

import torch
from torch import Tensor

from model.cache import KeyValueCache
from model.config import MistralConfig
from model.mistral import Mistral
from model.sampling import Sampling

_PREFILL_CHUNK = 4096
NOT_FINITE = (
    "the model gives scores that are not finite: its weights are damaged or too large for its dtype; "
    "fetch them again or load them in float32"
)


def penalize_repetition(logits_V: Tensor, seen_V: Tensor, penalty: float) -> Tensor:
    """Divide positive scores of the tokens marked in the boolean seen_V by the penalty, and multiply negative scores by it."""
    return torch.where(seen_V, torch.where(logits_V < 0, logits_V * penalty, logits_V / penalty), logits_V)


def keep_top_k(logits_V: Tensor, top_k: int) -> Tensor:
    """Set scores below the k-th highest to -inf; scores equal to it stay."""
    lowest_kept = logits_V.topk(min(top_k, logits_V.shape[-1])).values[..., -1:]
    return logits_V.masked_fill(logits_V < lowest_kept, -math.inf)


def keep_top_p(logits_V: Tensor, top_p: float) -> Tensor:
    """Set the least likely tokens, of total probability at most 1 - top_p, to -inf; the most likely token stays.

    Equal scores go in the order of an ascending sort.
    """
    sorted_V, order_V = logits_V.sort()
    dropped_V = sorted_V.softmax(dim=-1).cumsum(dim=-1) <= 1 - top_p
    dropped_V[..., -1:].fill_(False)  # assignment by index would make the host wait for the GPU
    return logits_V.masked_fill(torch.empty_like(dropped_V).scatter_(-1, order_V, dropped_V), -math.inf)


def keep_min_p(logits_V: Tensor, min_p: float) -> Tensor:
    """Set tokens less than min_p times as likely as the most likely token to -inf."""
    probability_V = logits_V.softmax(dim=-1)
    return logits_V.masked_fill(probability_V < min_p * probability_V.amax(dim=-1, keepdim=True), -math.inf)


def filter_logits(logits_V: Tensor, seen_V: Tensor, sampling: Sampling) -> Tensor:
    """The scores to sample from or, at temperature 0, to take the maximum of.

    Args: logits_V: float32; seen_V: boolean, the tokens of the prompt and of the answer so far.
    Returns: float32, in the shape given; -inf for dropped tokens.
    """
    if sampling.repetition_penalty != 1:
        logits_V = penalize_repetition(logits_V, seen_V, sampling.repetition_penalty)
    if sampling.temperature not in (0, 1):
        logits_V = logits_V / sampling.temperature
    if sampling.top_k:
        logits_V = keep_top_k(logits_V, sampling.top_k)
    if sampling.top_p < 1:
        logits_V = keep_top_p(logits_V, sampling.top_p)
    if sampling.min_p:
        logits_V = keep_min_p(logits_V, sampling.min_p)
    return logits_V


def choose(
    logits_BV: Tensor,  # float32
    seen_BV: Tensor,  # boolean: the tokens of each text so far
    sampling: Sampling,  # its seed is not used
    generators: Sequence[torch.Generator],  # one a text; its numbers depend on no other text
) -> Tensor:
    """The next token of each text: int64 [B]."""
    logits_BV = filter_logits(logits_BV, seen_BV, sampling)
    if sampling.temperature == 0:
        return logits_BV.argmax(dim=-1)
    # The draws of torch.multinomial, without its check of the probabilities, which makes the host wait.
    race_BV = torch.empty_like(logits_BV)
    for race_V, generator in zip(race_BV, generators, strict=True):
        race_V.exponential_(generator=generator)
    return (logits_BV.softmax(dim=-1) / race_BV).argmax(dim=-1)


def room_for_answer(config: MistralConfig, prompt_ids: Sequence[int]) -> int:
    """Tokens that may follow a prompt, at least 1.

    Raises: ValueError for an empty prompt, an id outside the vocabulary, or a prompt that leaves no position for an answer.
    """
    if not prompt_ids:
        raise ValueError("the prompt is empty: there must be at least one token to continue, such as beginning-of-sequence")
    wrong = [token for token in prompt_ids if not 0 <= token < config.unpadded_vocab_size]
    if wrong:
        raise ValueError(f"prompt token {wrong[0]}: the vocabulary has {config.unpadded_vocab_size} pieces")
    room = config.max_position_embeddings - len(prompt_ids)
    if room < 1:
        raise ValueError(
            f"prompt of {len(prompt_ids)} tokens: the model's max_position_embeddings = {config.max_position_embeddings} "
            "leaves no room for an answer; shorten it"
        )
    return room


class Past:
    """The text that a model has read, with its cache. `generate` reads only the new part of a prompt, and updates both."""

    def __init__(self, model: Mistral) -> None:
        weight = model.lm_head.weight
        self.cache = KeyValueCache(model.config, dtype=weight.dtype, device=weight.device)
        self.ids: list[int] = []

    def keep(self, prompt_ids: Sequence[int]) -> int:
        """Forget everything after the common beginning with a prompt. Returns the number of prompt tokens that need no reading;
        the prompt's last token is always read."""
        common = 0
        for known, wanted in zip(self.ids, prompt_ids[:-1], strict=False):
            if known != wanted:
                break
            common += 1
        common = self.cache.keep(common)
        del self.ids[common:]
        return common


def generate(
    model: Mistral,
    prompt_ids: Sequence[int],
    sampling: Sampling,
    *,
    stop_ids: Collection[int] = (),
    past: Past | None = None,
) -> Iterator[int]:
    """Continue a prompt: yield each token as it is chosen.

    The answer ends after a stop token, which is yielded too, after max_new_tokens, or at the model's max_position_embeddings.
    The same model, prompt and sampling on the same device give the same tokens; global random state is neither read nor
    changed. A past only saves time: its scores equal the scores of a text that is read anew, up to rounding.

    Raises: ValueError, before any computation, for an empty prompt, an id outside the vocabulary, or a prompt that leaves no
        position for an answer; while generating, for scores that are not finite.
    """
    room = room_for_answer(model.config, prompt_ids)
    return _continue(model, prompt_ids, sampling, frozenset(stop_ids), min(room, sampling.max_new_tokens), past or Past(model))


@torch.inference_mode()
def _continue(
    model: Mistral,
    prompt_ids: Sequence[int],
    sampling: Sampling,
    stop_ids: frozenset[int],
    max_new_tokens: int,
    past: Past,
) -> Iterator[int]:
    device = model.lm_head.weight.device
    generator = torch.Generator(device).manual_seed(sampling.seed)
    tokens_T = torch.tensor(prompt_ids, dtype=torch.int64, device=device)
    seen_V = torch.zeros(model.config.unpadded_vocab_size, dtype=torch.bool, device=device).index_fill_(0, tokens_T, True)
    unread = list(prompt_ids[past.keep(prompt_ids) :])
    tokens_T = tokens_T[-len(unread) :]
    for _ in range(max_new_tokens):
        logits_V = _next_logits(model, past.cache, tokens_T)
        past.ids += unread
        finite = logits_V.isfinite().all(dim=-1, keepdim=True)
        tokens_T = choose(logits_V[None], seen_V[None], sampling, [generator])
        # The host waits for the device here, once a token.
        token, is_finite = torch.cat((tokens_T, finite)).tolist()
        if not is_finite:
            raise ValueError(NOT_FINITE)
        yield token
        if token in stop_ids:
            return
        seen_V.index_fill_(0, tokens_T, True)
        unread = [token]


def _next_logits(model: Mistral, cache: KeyValueCache, tokens_T: Tensor) -> Tensor:
    """Scores of the token after tokens_T, float32 [V]. Reading in chunks bounds the memory of a long prompt."""
    for chunk_T in tokens_T.split(_PREFILL_CHUNK):
        positions_T = torch.arange(len(cache), len(cache) + len(chunk_T), device=chunk_T.device)
        hidden_TD = model(chunk_T, positions_T, cache.attend)
    return model.logits(hidden_TD[-1:])[0]
