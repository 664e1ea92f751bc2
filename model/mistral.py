"""Mistral, from scratch (Jiang et al. 2023, https://arxiv.org/abs/2310.06825).

The model knows nothing of packing, caching or parallelism. It takes tokens, their positions and a function `attend`, which
decides which tokens see which. Training passes `attention_by(work)`, made from a batch's work lists; generation passes the
`attend` of a key/value cache.

Query, key and value share one matrix, gate and up another, stacked in that order: an export slices rows and permutes nothing.

The residual stream travels between blocks as two tensors, `residual` and `delta`, whose sum it is. The next norm adds the two
in the pass over memory that it makes anyway.

Shapes: T tokens, N listed rows, D width, H query heads, K key/value heads, E head size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterator

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from kernels.attention.choice import Backend
from kernels.attention.sliding_window import sliding_window_attention
from kernels.attention.work import AttentionWork, attention_work
from kernels.embedding import EmbeddingNoise, embedding
from kernels.feed_forward import feed_forward
from kernels.fp8_feed_forward import fp8_feed_forward
from kernels.fp8_linear import WeightCodes, fp8_linear
from kernels.fp8_norm_qkv import fp8_norm_qkv
from kernels.linear import linear, wide_product
from kernels.linear_log_prob import linear_log_prob, linear_nll
from kernels.norm_qkv import norm_qkv
from kernels.recompute import Recompute
from kernels.rms_norm import add_rms_norm
from kernels.rotary import RotaryTable, rotary_table
from model.config import MistralConfig

# (layer, query_THE, key_TKE, value_TKE) -> out_THE; queries and keys arrive rotated.
Attend = Callable[[int, Tensor, Tensor, Tensor], Tensor]


class Mistral(nn.Module):
    """The decoder with its untied head. Embedding and head have vocab_size rows, padding rows included.

    Three attributes may be set at any time: `recompute` is the activation checkpointing of training; `attention_backend` is the
    backend that callers hand to `attention_by`; `fp8_layers` are the layers whose matrix products run in FP8 while the model is
    in training mode. Everything else, such as evaluation, never uses FP8.
    """

    def __init__(self, config: MistralConfig) -> None:
        super().__init__()
        self.config = config
        self.recompute: Recompute = "light"
        self.attention_backend: Backend = "auto"
        self.fp8_layers: Container[int] = ()
        self.weight_codes = WeightCodes()
        self.embed_tokens = Embedding(config)
        self.layers = nn.ModuleList(Block(config, layer) for layer in range(config.num_hidden_layers))
        self.norm = RMSNorm(config)
        self.lm_head = Head(config)

    def forward(
        self,
        tokens_T: Tensor,  # integer
        positions_T: Tensor,  # integer, from 0 at the start of each document
        attend: Attend,  # which tokens see which
        noise: EmbeddingNoise | None = None,  # NEFTune, for training only
    ) -> Tensor:
        """Final hidden states, normed: [T, D]."""
        rotary = rotary_table(positions_T, self.config.head_dim, self.config.rope_theta)
        residual_TD, delta_TD = self.embed_tokens(tokens_T, noise), None
        for layer, block in enumerate(self.layers):
            codes = self.weight_codes if self.training and layer in self.fp8_layers else None
            residual_TD, delta_TD = block(residual_TD, delta_TD, rotary, attend, self.recompute, codes)
        assert delta_TD is not None, "a model has at least one layer"
        _, normed_TD = add_rms_norm(residual_TD, delta_TD, self.norm.weight, self.norm.eps)
        return normed_TD

    def logits(self, hidden_ND: Tensor) -> Tensor:
        """Scores of the real pieces, float32 [N, unpadded_vocab_size]; padding rows are left out."""
        return self.lm_head.logits(hidden_ND)

    def log_probs(self, hidden_TD: Tensor, target_T: Tensor, rows_N: Tensor) -> Tensor:
        """Log-probability of the target at each listed row, float32 [T], 0 elsewhere (see `linear_log_prob`)."""
        return self.lm_head(hidden_TD, target_T, rows_N)

    def nll(self, hidden_TD: Tensor, target_T: Tensor, rows_N: Tensor, weight_T: Tensor) -> tuple[Tensor, Tensor]:
        """(sum of weight * -log-probability over the listed rows, the log-probabilities [T] without a gradient).

        `linear_nll` computes the gradients in its forward pass. A loss of any other form needs `log_probs`.
        """
        return self.lm_head(hidden_TD, target_T, rows_N, weight_T)


class Block(nn.Module):
    def __init__(self, config: MistralConfig, layer: int) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config)
        self.self_attn = Attention(config, layer)
        self.post_attention_layernorm = RMSNorm(config)
        self.mlp = FeedForward(config)

    def forward(
        self,
        residual_TD: Tensor,
        delta_TD: Tensor | None,
        rotary: RotaryTable,
        attend: Attend,
        recompute: Recompute,
        codes: WeightCodes | None = None,  # for products in FP8; None for products in the weights' dtype
    ) -> tuple[Tensor, Tensor]:
        """The residual stream after the block, again as the pair (residual, delta)."""

        def run(residual_TD: Tensor, delta_TD: Tensor | None, recompute: Recompute) -> tuple[Tensor, Tensor]:
            norms = self.input_layernorm, self.post_attention_layernorm
            residual_TD, delta_TD = self.self_attn(residual_TD, delta_TD, norms[0], rotary, attend, recompute, codes)
            return self.mlp(residual_TD, delta_TD, norms[1], recompute, codes)

        if recompute != "block" or not torch.is_grad_enabled():
            return run(residual_TD, delta_TD, recompute)
        if delta_TD is not None:
            residual_TD = residual_TD + delta_TD  # the backward pass keeps one tensor instead of two
        return checkpoint(run, residual_TD, None, "none", use_reentrant=False, preserve_rng_state=False)


class Attention(nn.Module):
    def __init__(self, config: MistralConfig, layer: int) -> None:
        super().__init__()
        self.layer = layer
        self.heads = (config.num_attention_heads, config.num_key_value_heads)
        query_heads, kv_heads = self.heads
        self.qkv_proj = nn.Linear(config.hidden_size, (query_heads + 2 * kv_heads) * config.head_dim, bias=False)
        self.o_proj = nn.Linear(query_heads * config.head_dim, config.hidden_size, bias=False)

    def forward(
        self,
        residual_TD: Tensor,
        delta_TD: Tensor | None,
        norm: RMSNorm,
        rotary: RotaryTable,
        attend: Attend,
        recompute: Recompute,
        codes: WeightCodes | None,
    ) -> tuple[Tensor, Tensor]:
        """(residual + delta, the output of attention over the norm of that sum)."""
        given = (residual_TD, delta_TD, norm.weight, self.qkv_proj.weight, rotary, self.heads, norm.eps)
        if codes is None:
            residual_TD, query_THE, key_TKE, value_TKE = norm_qkv(*given, keep_normed=recompute == "none")
        else:
            residual_TD, query_THE, key_TKE, value_TKE = fp8_norm_qkv(*given, codes)
        out_TX = attend(self.layer, query_THE, key_TKE, value_TKE).flatten(1)
        weight = self.o_proj.weight
        return residual_TD, linear(out_TX, weight) if codes is None else fp8_linear(out_TX, weight, codes)


class FeedForward(nn.Module):
    def __init__(self, config: MistralConfig) -> None:
        super().__init__()
        self.gate_up_proj = nn.Linear(config.hidden_size, 2 * config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(
        self, residual_TD: Tensor, delta_TD: Tensor, norm: RMSNorm, recompute: Recompute, codes: WeightCodes | None
    ) -> tuple[Tensor, Tensor]:
        """(residual + delta, the output of SwiGLU over the norm of that sum)."""
        given = (residual_TD, delta_TD, norm.weight, self.gate_up_proj.weight, self.down_proj.weight, norm.eps)
        if codes is None:
            return feed_forward(*given, recompute=recompute)
        return fp8_feed_forward(*given, codes, recompute=recompute)


class RMSNorm(nn.Module):
    """The scale of a norm; `kernels.rms_norm`, `kernels.norm_qkv` and `kernels.feed_forward` do the arithmetic."""

    def __init__(self, config: MistralConfig) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(config.hidden_size))
        self.eps = config.rms_norm_eps


class Embedding(nn.Module):
    def __init__(self, config: MistralConfig) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(config.vocab_size, config.hidden_size))

    def forward(self, tokens_T: Tensor, noise: EmbeddingNoise | None) -> Tensor:
        return embedding(tokens_T, self.weight, noise)


class Head(nn.Module):
    """The head's matrix. Loss and log-probabilities go through `forward`, as FSDP gathers a sharded matrix there."""

    def __init__(self, config: MistralConfig) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(config.vocab_size, config.hidden_size))
        self.pieces = config.unpadded_vocab_size

    def forward(self, hidden_TD: Tensor, target_T: Tensor, rows_N: Tensor, weight_T: Tensor | None = None):
        """The result of `Mistral.log_probs`, or with weights the result of `Mistral.nll`."""
        if weight_T is None:
            return linear_log_prob(hidden_TD, self.weight, target_T, rows_N, vocab_size=self.pieces)
        return linear_nll(hidden_TD, self.weight, target_T, rows_N, weight_T, vocab_size=self.pieces)

    def logits(self, hidden_ND: Tensor) -> Tensor:
        return wide_product(hidden_ND, self.weight[: self.pieces])


def attention_by(work: AttentionWork, backend: Backend = "auto") -> Attend:
    """Attention driven by a batch's work lists, on their device, computed by the chosen backend."""

    def attend(layer: int, query_THE: Tensor, key_TKE: Tensor, value_TKE: Tensor) -> Tensor:
        return sliding_window_attention(query_THE, key_TKE, value_TKE, work=work, backend=backend)

    return attend


def packed_attention(cu_docs: Tensor, window: int | None) -> Attend:
    """Attention within each document of one packed row, for training and for scoring.

    Args: cu_docs: integer [documents + 1], boundaries from 0 to T; window: in tokens, None for unbounded.
    """
    return attention_by(attention_work(cu_docs.tolist(), window).to(cu_docs.device))


def initialize(model: Mistral, seed: int) -> None:
    """Give a model fresh weights (see `initial_weights`)."""
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for name, values in initial_weights(model, seed):
            parameters[name].copy_(values)


def initial_weights(model: Mistral, seed: int) -> Iterator[tuple[str, Tensor]]:
    """Each parameter's name and fresh values, float32 on the CPU: a pure function of the seed.

    Norms are 1. Matrices are normal with standard deviation `initializer_range`, as `transformers` initializes Mistral, except
    that `o_proj` and `down_proj`, which write to the residual stream, are divided by sqrt(2 layers) (GPT-2, Radford et al.
    2019, section 2.3).
    """
    generator = torch.Generator().manual_seed(seed)
    residual_scale = (2 * model.config.num_hidden_layers) ** -0.5
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1:
            yield name, torch.ones(parameter.shape)
            continue
        scale = residual_scale if name.endswith(("o_proj.weight", "down_proj.weight")) else 1.0
        std = model.config.initializer_range * scale
        yield name, torch.empty(parameter.shape).normal_(0.0, std, generator=generator)
