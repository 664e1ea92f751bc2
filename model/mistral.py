"""Mistral, from scratch.

The model knows nothing of packing, caching or parallelism: it is given tokens, their positions and a function `attend` that
says who sees whom. Training passes `attention_by` the lists of a batch, generation the `attend` of a key/value cache.

Query, key and value are one matrix and gate and up another, stacked in that order, so that export is slicing.

Between blocks the residual stream travels as two tensors whose sum it is: what a block adds is added where it is normed next,
in one pass.

Shapes: T tokens, D width, H query heads, K key/value heads, E head size, S = H + 2K packed heads, F feed-forward size,
V vocabulary.
"""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from kernels.attention.backends import Backend
from kernels.attention.sliding_window import sliding_window_attention
from kernels.attention.work import AttentionWork, attention_work
from kernels.embedding import EmbeddingNoise, embedding
from kernels.feed_forward import feed_forward
from kernels.linear_log_prob import linear_log_prob, linear_nll, wide_product
from kernels.norm_qkv import norm_qkv
from kernels.recompute import Recompute
from kernels.rms_norm import add_rms_norm
from kernels.rotary import RotaryTable, rotary_table
from model.config import MistralConfig

# (layer, query_THE, key_TKE, value_TKE) -> out_THE; queries and keys come rotated.
Attend = Callable[[int, Tensor, Tensor, Tensor], Tensor]


def packed_attention(cu_docs: Tensor, window: int | None) -> Attend:
    """Attention within each document of one packed row, for training and for scoring.

    Args: cu_docs integer [documents + 1], boundaries from 0 to T; window in places, None for unbounded.
    """
    return attention_by(attention_work(cu_docs.tolist(), window).to(cu_docs.device))


def attention_by(work: AttentionWork, backend: Backend = "auto") -> Attend:
    """Attention of those to those that the lists of a batch say, on the device that they are on, computed by a backend."""

    def attend(layer: int, query_THE: Tensor, key_TKE: Tensor, value_TKE: Tensor) -> Tensor:
        return sliding_window_attention(query_THE, key_TKE, value_TKE, work=work, backend=backend)

    return attend


class Attention(nn.Module):
    def __init__(self, config: MistralConfig, layer: int) -> None:
        super().__init__()
        self.heads, self.kv_heads = config.num_attention_heads, config.num_key_value_heads
        self.layer = layer
        packed = (self.heads + 2 * self.kv_heads) * config.head_dim
        self.qkv_proj = nn.Linear(config.hidden_size, packed, bias=False)
        self.o_proj = nn.Linear(self.heads * config.head_dim, config.hidden_size, bias=False)

    def forward(
        self, residual_TD: Tensor, delta_TD: Tensor | None, norm: "RMSNorm", table: RotaryTable, attend: Attend, *, keep: bool
    ) -> tuple[Tensor, Tensor]:
        """(residual + delta, what attention to its norm adds to it)."""
        heads = (self.heads, self.kv_heads)
        residual_TD, query_THE, key_TKE, value_TKE = norm_qkv(
            residual_TD, delta_TD, norm.weight, self.qkv_proj.weight, table, heads, norm.eps, keep_normed=keep
        )
        return residual_TD, self.o_proj(attend(self.layer, query_THE, key_TKE, value_TKE).flatten(1))


class FeedForward(nn.Module):
    """Holds the matrices of a SwiGLU network; the arithmetic is in `kernels.feed_forward`."""

    def __init__(self, config: MistralConfig) -> None:
        super().__init__()
        self.gate_up_proj = nn.Linear(config.hidden_size, 2 * config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)


class RMSNorm(nn.Module):
    """Holds the scale of a norm; the arithmetic is in `kernels.rms_norm`."""

    def __init__(self, config: MistralConfig) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(config.hidden_size))
        self.eps = config.rms_norm_eps


class Block(nn.Module):
    def __init__(self, config: MistralConfig, layer: int) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config)
        self.self_attn = Attention(config, layer)
        self.post_attention_layernorm = RMSNorm(config)
        self.mlp = FeedForward(config)

    def forward(
        self, residual_TD: Tensor, delta_TD: Tensor | None, table: RotaryTable, attend: Attend, recompute: Recompute
    ) -> tuple[Tensor, Tensor]:
        """From the residual stream as a sum of two to the residual stream as a sum of two, each [T, D]."""
        if recompute != "block" or not torch.is_grad_enabled():
            return self._run(residual_TD, delta_TD, table, attend, recompute)
        if delta_TD is not None:
            # One tensor, so that one is kept.
            residual_TD = residual_TD + delta_TD
        return checkpoint(self._run, residual_TD, None, table, attend, "none", use_reentrant=False, preserve_rng_state=False)

    def _run(
        self, residual_TD: Tensor, delta_TD: Tensor | None, table: RotaryTable, attend: Attend, recompute: Recompute
    ) -> tuple[Tensor, Tensor]:
        residual_TD, delta_TD = self.self_attn(
            residual_TD, delta_TD, self.input_layernorm, table, attend, keep=recompute == "none"
        )
        norm = self.post_attention_layernorm
        return feed_forward(
            residual_TD, delta_TD, norm.weight, self.mlp.gate_up_proj.weight, self.mlp.down_proj.weight, norm.eps,
            recompute=recompute,
        )  # fmt: skip


class Embedding(nn.Module):
    """The embedding matrix; the arithmetic is in `kernels.embedding`."""

    def __init__(self, config: MistralConfig) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(config.vocab_size, config.hidden_size))

    def forward(self, tokens_T: Tensor, noise: EmbeddingNoise | None) -> Tensor:
        return embedding(tokens_T, self.weight, noise)


class Head(nn.Module):
    """The head's matrix; the arithmetic is in `kernels.linear_log_prob`, called in here, where a sharded head is whole."""

    def __init__(self, config: MistralConfig) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(config.vocab_size, config.hidden_size))
        self.pieces = config.unpadded_vocab_size

    def forward(self, hidden_TD: Tensor, target_T: Tensor, rows_N: Tensor, weight_T: Tensor | None = None):
        """Log-probabilities, or with weights (their weighted sum, negated, and the log-probabilities)."""
        if weight_T is None:
            return linear_log_prob(hidden_TD, self.weight, target_T, rows_N, vocab_size=self.pieces)
        return linear_nll(hidden_TD, self.weight, target_T, rows_N, weight_T, vocab_size=self.pieces)

    def logits(self, hidden_ND: Tensor) -> Tensor:
        return wide_product(hidden_ND, self.weight[: self.pieces])


class Mistral(nn.Module):
    """The decoder with its untied head. The matrices of head and embedding have vocab_size rows, padding included.

    recompute: what training makes again in the backward pass; attention_backend: who computes attention of packed rows, for
    those who call `attention_by`. Both may be set at any time.
    """

    def __init__(self, config: MistralConfig) -> None:
        super().__init__()
        self.config = config
        self.recompute: Recompute = "light"
        self.attention_backend: Backend = "auto"
        self.embed_tokens = Embedding(config)
        self.layers = nn.ModuleList(Block(config, layer) for layer in range(config.num_hidden_layers))
        self.norm = RMSNorm(config)
        self.lm_head = Head(config)

    def forward(self, tokens_T: Tensor, positions_T: Tensor, attend: Attend, noise: EmbeddingNoise | None = None) -> Tensor:
        """Final hidden states, normed: [T, D].

        Args: tokens_T integer [T]; positions_T integer [T], from 0 at the start of each document; attend: who sees whom;
            noise: NEFTune noise, for training only.
        """
        hidden_TD = self.embed_tokens(tokens_T, noise)
        table = rotary_table(positions_T, self.config.head_dim, self.config.rope_theta)
        residual_TD, delta_TD = hidden_TD, None
        for layer in self.layers:
            residual_TD, delta_TD = layer(residual_TD, delta_TD, table, attend, self.recompute)
        assert delta_TD is not None, "a model has a layer"
        return add_rms_norm(residual_TD, delta_TD, self.norm.weight, self.norm.eps)[1]

    def logits(self, hidden_ND: Tensor) -> Tensor:
        """Scores of the pieces that exist, float32 [N, unpadded_vocab_size]; the padding rows are left out."""
        return self.lm_head.logits(hidden_ND)

    def log_probs(self, hidden_TD: Tensor, target_T: Tensor, rows_N: Tensor) -> Tensor:
        """Log-probability of each listed row's target, float32 [T], 0 outside rows_N (see `linear_log_prob`)."""
        return self.lm_head(hidden_TD, target_T, rows_N)

    def nll(self, hidden_TD: Tensor, target_T: Tensor, rows_N: Tensor, weight_T: Tensor) -> tuple[Tensor, Tensor]:
        """(sum of weight * -log-probability over the listed rows, the log-probabilities [T] without a gradient).

        See `linear_nll`, which makes the gradients at once: `log_probs` is for losses that are not such a sum.
        """
        return self.lm_head(hidden_TD, target_T, rows_N, weight_T)


def initialize(model: Mistral, seed: int) -> None:
    """Give a model fresh weights (see `initial_weights`)."""
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for name, values in initial_weights(model, seed):
            parameters[name].copy_(values)


def initial_weights(model: Mistral, seed: int) -> Iterator[tuple[str, Tensor]]:
    """Each parameter's name and fresh values in float32 on the CPU, a pure function of the seed: normal with
    `initializer_range`, as `transformers` initialises Mistral, but the two matrices that write to the residual stream are
    divided by sqrt(2 layers) (GPT-2, Radford et al. 2019, section 2.3)."""
    generator = torch.Generator().manual_seed(seed)
    std = model.config.initializer_range
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1:
            yield name, torch.ones(parameter.shape)
            continue
        scale = (2 * model.config.num_hidden_layers) ** -0.5 if name.endswith(("o_proj.weight", "down_proj.weight")) else 1.0
        yield name, torch.empty(parameter.shape).normal_(0.0, std * scale, generator=generator)
