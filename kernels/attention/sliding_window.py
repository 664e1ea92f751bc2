"""Causal attention with a sliding window over packed documents, with grouped key/value heads.

Place i sees the places j of its own document with i - window < j <= i (Jiang et al. 2023, https://arxiv.org/abs/2310.06825;
Beltagy et al. 2020, https://arxiv.org/abs/2004.05150). Window 4096 means 4096 places, itself included. Several answers may
share one prompt: `kernels.attention.work` says who sees whom then.

Shapes: T tokens, H query heads, K key/value heads, E head size, Q queries of a tile, J keys of a tile.
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels import accumulation_dtype
from kernels.attention.backends import chosen, flash_attention, flex_attention
from kernels.attention.backward import attention_backward
from kernels.attention.choice import Backend
from kernels.attention.forward import attention_forward
from kernels.attention.work import AttentionWork, MaskedTile, attention_work
from kernels.launch import unit_stride


def sliding_window_attention(
    query_THE: Tensor,
    key_TKE: Tensor,
    value_TKE: Tensor,
    cu_docs: Tensor | None = None,
    window: int | None = None,
    *,
    work: AttentionWork | None = None,
    backend: Backend = "auto",
) -> Tensor:
    """softmax(query key^T / sqrt(E)) value over the visible places.

    Args: query_THE [T, H, E]; key_TKE and value_TKE [T, K, E] with H a multiple of K, query head h reading key/value head
        h // (H / K); all may be strided views of one packed row. work: who sees whom, from `attention_work`, made once a batch
        for all layers, on the tensors' device; or else cu_docs [documents + 1] on the CPU, 0 = cu_docs[0] <= ... <= T, and
        window in places, None for unbounded. backend: who computes it (`kernels.attention.backends`); the results are the
        same within rounding.
    Returns: [T, H, E] in the dtype of `query_THE`; scores and softmax in float32. Places that see nothing (padding) give 0.
    Raises: ValueError where neither a list nor bounds on the CPU are given, or for what the backend cannot do.
    """
    work = _given_or_made(query_THE, cu_docs, window, work)
    name = chosen(backend, query_THE, work)
    if name == "reference":
        # Where the log-sum-exp would cost a product more.
        return sliding_window_attention_reference(query_THE, key_TKE, value_TKE, work=work)
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
    """As `sliding_window_attention`, with the natural logarithm of each softmax's denominator.

    Returns: (output [T, H, E], log-sum-exp of the scaled scores [H, T] in float32 (float64 for float64), without a gradient,
        -inf where a place sees nothing).
    """
    work = _given_or_made(query_THE, cu_docs, window, work)
    return _computed_by(chosen(backend, query_THE, work), query_THE, key_TKE, value_TKE, work)


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
    work = _given_or_made(query_THE, cu_docs, window, work)
    parts = []
    for query_HQE, key_HJE, value_HJE, mask_QJ in _tiles(query_THE, key_TKE, value_TKE, work):
        # Products over no keys are zeros, with gradients that are.
        seen = mask_QJ.shape[1] > 0
        part = masked_attention(query_HQE, key_HJE, value_HJE, mask_QJ) if seen else query_HQE @ key_HJE.mT @ value_HJE
        parts.append(part)
    return torch.cat(parts, dim=1).transpose(0, 1)


def sliding_window_attention_with_lse_reference(
    query_THE: Tensor,
    key_TKE: Tensor,
    value_TKE: Tensor,
    cu_docs: Tensor | None = None,
    window: int | None = None,
    *,
    work: AttentionWork | None = None,
) -> tuple[Tensor, Tensor]:
    work = _given_or_made(query_THE, cu_docs, window, work)
    wide = accumulation_dtype(query_THE.dtype)
    sums = []
    with torch.no_grad():
        for query_HQE, key_HJE, _, mask_QJ in _tiles(query_THE, key_TKE, value_TKE, work):
            score_HQJ = query_HQE.to(wide) @ key_HJE.to(wide).mT * query_HQE.shape[-1] ** -0.5
            sums.append(score_HQJ.masked_fill(~mask_QJ, float("-inf")).logsumexp(dim=-1))
    return sliding_window_attention_reference(query_THE, key_TKE, value_TKE, work=work), torch.cat(sums, dim=1)


def _computed_by(
    name: str, query_THE: Tensor, key_TKE: Tensor, value_TKE: Tensor, work: AttentionWork
) -> tuple[Tensor, Tensor]:
    if name == "triton":
        return _attention(query_THE, key_TKE, value_TKE, work.work, *work.numbers)
    if name == "flash":
        return flash_attention(query_THE, key_TKE, value_TKE, work)
    if name == "flex":
        return flex_attention(query_THE, key_TKE, value_TKE, work)
    return sliding_window_attention_with_lse_reference(query_THE, key_TKE, value_TKE, work=work)


def _given_or_made(query_THE: Tensor, cu_docs: Tensor | None, window: int | None, work: AttentionWork | None) -> AttentionWork:
    if work is not None:
        if work.tokens != query_THE.shape[0]:
            raise ValueError(f"the lists of work are for a row of {work.tokens} places, query has {query_THE.shape[0]}")
        return work
    if cu_docs is None or cu_docs.is_cuda:
        raise ValueError("attention needs work from attention_work(...).to(device), or cu_docs on the CPU to make it from")
    return attention_work(cu_docs.tolist(), window, tokens=query_THE.shape[0]).to(query_THE.device)


def _tiles(
    query_THE: Tensor, key_TKE: Tensor, value_TKE: Tensor, work: AttentionWork
) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor]]:
    """(queries [H, Q, E], keys and values [H, J, E] that they see, who of them sees whom [Q, J]) of each tile; one at least."""
    group = query_THE.shape[1] // key_TKE.shape[1]
    query_HTE = query_THE.transpose(0, 1)
    sources = [tensor.repeat_interleave(group, dim=1).transpose(0, 1) for tensor in (key_TKE, value_TKE)]
    device = query_THE.device
    for tile in work.tiles(device) or [MaskedTile(0, 0, [], torch.empty((0, 0), dtype=torch.bool, device=device))]:
        if len(tile.keys) == 1:
            key_HJE, value_HJE = (source[:, slice(*tile.keys[0])] for source in sources)
        else:
            key_HJE, value_HJE = (
                torch.cat([source[:, slice(*ends)] for ends in [*tile.keys, (0, 0)]], dim=1) for source in sources
            )
        yield query_HTE[:, tile.start : tile.end], key_HJE, value_HJE, tile.mask_QJ


def masked_attention(query_HQE: Tensor, key_HJE: Tensor, value_HJE: Tensor, mask_QJ: Tensor) -> Tensor:
    """Attention of each query to the keys that its row of the boolean mask allows: [H, Q, E]."""
    out = F.scaled_dot_product_attention(query_HQE[None], key_HJE[None], value_HJE[None], attn_mask=mask_QJ)
    return out[0]


@torch.library.custom_op("komainu::sliding_window_attention", mutates_args=())
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
    query_THE, key_TKE, value_TKE = map(unit_stride, (query_THE, key_TKE, value_TKE))
    return attention_forward(query_THE, key_TKE, value_TKE, work, query_tiles, key_tiles, window, tile)


@torch.library.custom_op("komainu::sliding_window_attention_backward", mutates_args=())
def _attention_backward(
    grad_THE: Tensor, query_THE: Tensor, key_TKE: Tensor, value_TKE: Tensor, out_THE: Tensor, log_sum_exp_HT: Tensor,
    work: Tensor, query_tiles: int, key_tiles: int, window: int, tile: int,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    grad_THE, query_THE, key_TKE, value_TKE = map(unit_stride, (grad_THE, query_THE, key_TKE, value_TKE))
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
