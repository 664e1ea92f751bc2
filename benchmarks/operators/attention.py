"""Causal attention with a sliding window over packed documents.

T tokens, H query heads, K key/value heads, G = H / K, E head size, Q queries of a tile, J keys of a tile.
"""

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.operators.operator import Call, Case, Cost, Operator, Provider, Sizes, Tensors, compiled, peer, random_data
from kernels.attention.work import attended_pairs, attention_work

_TILE = 256


def _case(sizes: Sizes, dtype: torch.dtype, device: torch.device) -> Case:
    normal = random_data(device)
    query = (sizes.tokens, sizes.heads, sizes.head_dim)
    key = (sizes.tokens, sizes.kv_heads, sizes.head_dim)
    cu_docs = torch.tensor([0, *sizes.documents], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    # The work lists are made once a batch for all layers, so they are not timed.
    work = attention_work(cu_docs.tolist(), sizes.window).to(device)
    return Case(
        sizes,
        dtype,
        {"query": normal(*query, dtype=dtype), "key": normal(*key, dtype=dtype), "value": normal(*key, dtype=dtype)},
        {"cu_docs": cu_docs.to(device), "work": work},
        {"out": normal(*query, dtype=dtype)},
    )


def _call(function: Callable[..., Tensor], case: Case) -> Call:
    work = case.constants["work"]
    return Call(lambda given: {"out": function(given["query"], given["key"], given["value"], work=work)})


def _exact(case: Case) -> Tensors:
    """Tile by tile, each differentiated at once: the float64 scores of all tiles would not fit."""
    sizes = case.sizes
    wide = {name: tensor.double() for name, tensor in case.inputs.items()}
    gradients = {name: torch.zeros_like(tensor) for name, tensor in wide.items()}
    out_THE = torch.empty_like(wide["query"])
    bounds = case.constants["cu_docs"].tolist()
    for first, last in pairwise(bounds):
        for start in range(first, last, _TILE):
            end = min(start + _TILE, last)
            low = first if sizes.window is None else max(first, start - sizes.window + 1)
            spans = {"query": slice(start, end), "key": slice(low, end), "value": slice(low, end)}
            leaves = {name: wide[name][span].clone().requires_grad_() for name, span in spans.items()}
            tile_QHE = _exact_tile(leaves["query"], leaves["key"], leaves["value"], start - low, sizes.window)
            out_THE[start:end] = tile_QHE.detach()
            upstream = case.upstream["out"][start:end].double()
            found = torch.autograd.grad(tile_QHE, list(leaves.values()), upstream)
            for (name, span), gradient in zip(spans.items(), found, strict=True):
                gradients[name][span] += gradient
    return {"out": out_THE, **{f"d {name}": gradient for name, gradient in gradients.items()}}


def _exact_tile(
    query_QHE: Tensor,
    key_JKE: Tensor,
    value_JKE: Tensor,
    ahead: int,  # keys before the first query's own
    window: int | None,
) -> Tensor:
    query_QKGE = query_QHE.unflatten(1, (key_JKE.shape[1], -1))
    score = torch.einsum("qkge,jke->kgqj", query_QKGE, key_JKE) / query_QHE.shape[-1] ** 0.5
    place_Q1 = torch.arange(ahead, ahead + len(query_QHE), device=score.device)[:, None]
    place_1J = torch.arange(len(key_JKE), device=score.device)[None]
    hidden_QJ = place_1J > place_Q1
    if window is not None:
        hidden_QJ |= place_1J <= place_Q1 - window
    weight = score.masked_fill(hidden_QJ, float("-inf")).softmax(dim=-1)
    return torch.einsum("kgqj,jke->qkge", weight, value_JKE).flatten(1, 2)


def _cost(case: Case, direction: str) -> Cost:
    sizes, size = case.sizes, case.dtype.itemsize
    query = sizes.tokens * sizes.heads * sizes.head_dim * size
    key = sizes.tokens * sizes.kv_heads * sizes.head_dim * size
    # Only attended pairs count, whatever tiles visit. One product: 2 operations for each pair, head and element.
    product = 2 * attended_pairs(sizes.documents, sizes.window) * sizes.heads * sizes.head_dim
    if direction == "forward":
        return Cost(2 * query + 2 * key, 2 * product)  # query, key, value; out -- scores, out
    # query, key, value, out, d out; d query, d key, d value -- scores again, d weights, d value, d query, d key
    return Cost(4 * query + 4 * key, 5 * product)


def _batched(function: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Call:
    """A call of a function that takes [1, H, T, E] and [1, K, T, E]."""

    def run(given: Tensors) -> Tensors:
        query, key, value = (given[name].transpose(0, 1)[None] for name in ("query", "key", "value"))
        return {"out": function(query, key, value)[0].transpose(0, 1)}

    return Call(run)


def _visible(case: Case) -> Tensor:
    """Which key (column) each query (row) sees, bool [T, T]."""
    sizes, device = case.sizes, case.device
    place = torch.arange(sizes.tokens, device=device)
    document = torch.repeat_interleave(case.constants["cu_docs"].diff().long())
    seen = (place[None] <= place[:, None]) & (document[None] == document[:, None])
    return seen if sizes.window is None else seen & (place[None] > place[:, None] - sizes.window)


def _sdpa(case: Case) -> Call:
    sizes = case.sizes
    if not _bound(sizes):
        return _batched(lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True))
    mask, group = _visible(case), sizes.heads // sizes.kv_heads

    def function(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        # Repeated, as in transformers: under a mask, the kernels that do not keep all scores take no grouped heads.
        key, value = key.repeat_interleave(group, dim=1), value.repeat_interleave(group, dim=1)
        return F.scaled_dot_product_attention(query, key, value, attn_mask=mask)

    return _batched(function)


def _cudnn(case: Case) -> Call:
    """cuDNN's kernels through torch, which know neither a window nor packed documents."""
    if _bound(case.sizes):
        raise ValueError("the window or the documents bind, which cuDNN through torch does not know")

    def function(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            return F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)

    return _batched(function)


def _bound(sizes: Sizes) -> bool:
    """Whether the window or the documents hide an earlier place from some place."""
    return len(sizes.documents) > 1 or (sizes.window is not None and sizes.tokens > sizes.window)


def _flex(case: Case) -> Call:
    """FlexAttention, compiled. The mask is made beforehand, as for a batch, once for all layers."""
    sizes, create_mask = case.sizes, compiled(peer("torch.nn.attention.flex_attention", "create_block_mask"))
    document_T = torch.repeat_interleave(case.constants["cu_docs"].diff().long())
    window = sizes.tokens if sizes.window is None else sizes.window

    def visible(batch: Any, head: Any, query: Tensor, key: Tensor) -> Tensor:
        return (key <= query) & (query - key < window) & (document_T[query] == document_T[key])

    attention = compiled(peer("torch.nn.attention.flex_attention", "flex_attention"))
    mask = create_mask(visible, None, None, sizes.tokens, sizes.tokens, device=case.device)
    return _batched(lambda q, k, v: attention(q, k, v, block_mask=mask, enable_gqa=True))


def _varlen(case: Case) -> Call:
    """FlashAttention 2 inside torch: the operator below torch.nn.attention.varlen, as older versions have its window too."""
    cu_docs, longest = case.constants["cu_docs"], max(case.sizes.documents)
    left = -1 if case.sizes.window is None else case.sizes.window - 1
    function = torch.ops.aten._flash_attention_forward

    def run(given: Tensors) -> Tensors:
        tensors = (given["query"], given["key"], given["value"])
        bounds = (cu_docs, cu_docs, longest, longest)
        return {"out": function(*tensors, *bounds, 0.0, True, False, window_size_left=left, window_size_right=0)[0]}

    return Call(run)


def _flash(package: str) -> Callable[[Case], Call]:
    def build(case: Case) -> Call:
        function = peer(package, "flash_attn_varlen_func")
        cu_docs, longest = case.constants["cu_docs"], max(case.sizes.documents)
        # FlashAttention counts the places to the left: a window of n is n - 1.
        window = (-1 if case.sizes.window is None else case.sizes.window - 1, 0)

        def run(given: Tensors) -> Tensors:
            tensors = (given["query"], given["key"], given["value"])
            bounds = {"cu_seqlens_q": cu_docs, "cu_seqlens_k": cu_docs, "max_seqlen_q": longest, "max_seqlen_k": longest}
            out = function(*tensors, **bounds, causal=True, window_size=window)
            return {"out": out[0] if isinstance(out, tuple) else out}

        return Call(run)

    return build


SLIDING_WINDOW_ATTENTION = Operator(
    name="sliding_window_attention",
    function="kernels.attention.sliding_window:sliding_window_attention",
    shape=lambda sizes: (
        f"{len(sizes.documents)} of {max(sizes.documents)} x {sizes.heads} / {sizes.kv_heads} heads x {sizes.head_dim}, "
        f"window {sizes.window}"
    ),
    case=_case,
    call=_call,
    exact=_exact,
    cost=_cost,
    yardstick="torch SDPA",
    compiled=False,  # FlexAttention is torch.compile's own
    peers=(
        Provider("torch SDPA", _sdpa),
        Provider("torch cuDNN", _cudnn, cuda=True, dtypes=(torch.float16, torch.bfloat16)),
        Provider("torch FlexAttention", _flex, cuda=True),
        Provider("torch varlen", _varlen, cuda=True),
        Provider("FlashAttention 2", _flash("flash_attn"), package="flash_attn", cuda=True),
        Provider("FlashAttention 3", _flash("flash_attn_interface"), package="flash_attn_interface", cuda=True),
    ),
)
