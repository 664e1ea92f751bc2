"""Causal attention with a sliding window over packed documents, with grouped key/value heads.

Token i sees the tokens j of its own document with i - window < j <= i (Jiang et al. 2023, https://arxiv.org/abs/2310.06825;
Beltagy et al. 2020, https://arxiv.org/abs/2004.05150): a window of 4096 is 4096 tokens, itself included. Several answers may
share one prompt; `kernels.attention.work` says who sees whom then.

Shapes: T tokens, H query heads, K key/value heads, E head size.
"""

import torch
from torch import Tensor

from kernels.attention.backends import chosen, flash_attention, flex_attention
from kernels.attention.backward import attention_backward
from kernels.attention.choice import Backend
from kernels.attention.eager import batched_attention, log_sum_exps, tiled_attention
from kernels.attention.forward import attention_forward
from kernels.attention.work import AttentionWork, attention_work
from kernels.launch import operator


def sliding_window_attention(
    query_THE: Tensor,
    key_TKE: Tensor,  # H is a multiple of K; query head h reads key/value head h // (H / K)
    value_TKE: Tensor,
    cu_docs: Tensor | None = None,  # integer [documents + 1] on the CPU, 0 = cu_docs[0] <= ... <= T
    window: int | None = None,  # in tokens, None for unbounded
    *,
    work: AttentionWork | None = None,  # on the tensors' device, made once a batch for all layers
    backend: Backend = "auto",
) -> Tensor:
    """softmax(query key^T / sqrt(E)) value over the visible tokens.

    Args:
        query_THE, key_TKE, value_TKE: of one dtype; strided views of one packed row will do.
        work: who sees whom, from `attention_work`; alternatively cu_docs and window.
        backend: who computes it (`kernels.attention.backends`); results are the same within rounding.
    Returns: [T, H, E] in the dtype of `query_THE`; scores and softmax in float32. Tokens that see nothing (padding) give 0.
    Raises: ValueError without work lists or bounds on the CPU, and for what the backend cannot do.
    """
    work = _given_or_made(query_THE, cu_docs, window, work)
    name = chosen(backend, query_THE, work)
    if name == "reference":
        # Without the log-sum-exp, which costs a product.
        return _eager(backend, query_THE, key_TKE, value_TKE, work)
    return _computed_by(name, query_THE, key_TKE, value_TKE, work)[0]


def sliding_window_attention_with_lse(
    query_THE: Tensor,
    key_TKE: Tensor,
    value_TKE: Tensor,
    cu_docs: Tensor | None = None,
    window: int | None = None,
    *,
    work: AttentionWork | None = None,
    backend: Backend = "auto",
) -> tuple[Tensor, Tensor]:
    """`sliding_window_attention` and the natural logarithm of each softmax's denominator.

    Returns: (output [T, H, E]; log-sum-exp of the scaled scores [H, T] in float32 (float64 for float64), without a gradient,
        -inf where a token sees nothing).
    """
    work = _given_or_made(query_THE, cu_docs, window, work)
    name = chosen(backend, query_THE, work)
    if name == "reference":
        return _eager(backend, query_THE, key_TKE, value_TKE, work), log_sum_exps(query_THE, key_TKE, work)
    return _computed_by(name, query_THE, key_TKE, value_TKE, work)


def sliding_window_attention_reference(
    query_THE: Tensor,
    key_TKE: Tensor,
    value_TKE: Tensor,
    cu_docs: Tensor | None = None,
    window: int | None = None,
    *,
    work: AttentionWork | None = None,
    backend: Backend = "reference",
) -> Tensor:
    return tiled_attention(query_THE, key_TKE, value_TKE, _given_or_made(query_THE, cu_docs, window, work))


def _eager(backend: Backend, query_THE: Tensor, key_TKE: Tensor, value_TKE: Tensor, work: AttentionWork) -> Tensor:
    """The reference by name and on a GPU; on a CPU the faster batches of tiles."""
    batched = backend != "reference" and query_THE.device.type == "cpu" and query_THE.shape[0] > 0
    return (batched_attention if batched else tiled_attention)(query_THE, key_TKE, value_TKE, work)


def _computed_by(
    name: str, query_THE: Tensor, key_TKE: Tensor, value_TKE: Tensor, work: AttentionWork
) -> tuple[Tensor, Tensor]:
    if name == "triton":
        return _attention(query_THE, key_TKE, value_TKE, work.work, *work.numbers)
    return (flash_attention if name == "flash" else flex_attention)(query_THE, key_TKE, value_TKE, work)


def _given_or_made(query_THE: Tensor, cu_docs: Tensor | None, window: int | None, work: AttentionWork | None) -> AttentionWork:
    if work is not None:
        if work.tokens != query_THE.shape[0]:
            raise ValueError(f"attention work is for a row of {work.tokens} tokens, query has {query_THE.shape[0]}")
        return work
    if cu_docs is None or cu_docs.is_cuda:
        raise ValueError("attention needs work from attention_work(...).to(device), or cu_docs on the CPU to make it from")
    return attention_work(cu_docs.tolist(), window, tokens=query_THE.shape[0]).to(query_THE.device)


@operator("komainu::sliding_window_attention")
def _attention(
    query_THE: Tensor,
    key_TKE: Tensor,
    value_TKE: Tensor,
    work: Tensor,
    query_tiles: int,
    key_tiles: int,
    window: int,
    tile: int,
) -> tuple[Tensor, Tensor]:
    return attention_forward(query_THE, key_TKE, value_TKE, work, query_tiles, key_tiles, window, tile)


@operator("komainu::sliding_window_attention_backward")
def _attention_backward(
    grad_THE: Tensor,
    query_THE: Tensor,
    key_TKE: Tensor,
    value_TKE: Tensor,
    out_THE: Tensor,
    log_sum_exp_HT: Tensor,
    work: Tensor,
    query_tiles: int,
    key_tiles: int,
    window: int,
    tile: int,
) -> tuple[Tensor, Tensor, Tensor]:
    return attention_backward(
        grad_THE, query_THE, key_TKE, value_TKE, out_THE, log_sum_exp_HT, work, query_tiles, key_tiles, window, tile
    )


@_attention.register_fake
def _(query_THE, key_TKE, value_TKE, work, query_tiles, key_tiles, window, tile):
    tokens, heads, _ = query_THE.shape
    out_THE = torch.empty(query_THE.shape, dtype=query_THE.dtype, device=query_THE.device)
    return out_THE, query_THE.new_empty((heads, tokens), dtype=torch.float32)


@_attention_backward.register_fake
def _(grad_THE, query_THE, key_TKE, value_TKE, out_THE, log_sum_exp_HT, work, query_tiles, key_tiles, window, tile):
    return tuple(torch.empty(part.shape, dtype=part.dtype, device=part.device) for part in (query_THE, key_TKE, value_TKE))


def _save(ctx, inputs, output) -> None:
    query_THE, key_TKE, value_TKE, work, *ctx.numbers = inputs
    ctx.save_for_backward(query_THE, key_TKE, value_TKE, *output, work)
    ctx.mark_non_differentiable(output[1])


def _differentiate(ctx, grad_THE, _):
    *tensors, work = ctx.saved_tensors
    return *_attention_backward(grad_THE, *tensors, work, *ctx.numbers), *[None] * 5


_attention.register_autograd(_differentiate, setup_context=_save)
