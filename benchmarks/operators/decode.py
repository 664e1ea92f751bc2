"""Attention of one new token to the rolling key/value cache after `tokens` earlier tokens.

T new tokens, C places of the ring, H query heads, K key/value heads, E head size, J attended places.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.operators.operator import Call, Case, Cost, Operator, Provider, Sizes, Tensors, random_data

_NAMES = ("query", "key", "value", "ring key", "ring value")


def _case(sizes: Sizes, dtype: torch.dtype, device: torch.device) -> Case:
    normal = random_data(device)
    room = sizes.tokens if sizes.window is None else min(sizes.window, sizes.tokens)
    places = {"query": (1, sizes.heads), **dict.fromkeys(_NAMES[1:3], (1, sizes.kv_heads))}
    places |= dict.fromkeys(_NAMES[3:], (room, sizes.kv_heads))
    return Case(sizes, dtype, {name: normal(*places[name], sizes.head_dim, dtype=dtype) for name in _NAMES})


def _call(function: Callable[..., Tensor], case: Case) -> Call:
    sizes = case.sizes
    return Call(lambda given: {"out": function(*(given[name] for name in _NAMES), sizes.tokens, sizes.window)})


def _seen(case: Case, inputs: Tensors) -> tuple[Tensor, Tensor]:
    """The attended keys and values, [J, K, E]."""
    sizes, room = case.sizes, len(case.inputs["ring key"])
    first = 0 if sizes.window is None else max(0, sizes.tokens - sizes.window + 1)
    slot_J = torch.arange(first, sizes.tokens, device=case.device) % room
    key_JKE, value_JKE = (torch.cat((inputs[f"ring {name}"][slot_J], inputs[name])) for name in ("key", "value"))
    return key_JKE, value_JKE


def _cost(case: Case, direction: str) -> Cost:
    sizes, size = case.sizes, case.dtype.itemsize
    places = sizes.tokens + 1 if sizes.window is None else min(sizes.tokens + 1, sizes.window)
    query, key = (heads * sizes.head_dim for heads in (sizes.heads, sizes.kv_heads))
    # query, out; attended keys and values -- scores, out
    return Cost((2 * query + 2 * places * key) * size, 4 * places * query)


def _sdpa(case: Case) -> Call:
    """A call on contiguous keys and values in order; arranging them is not timed."""

    def arrange(inputs: Tensors) -> Tensors:
        key_JKE, value_JKE = _seen(case, inputs)
        tensors = {"query": inputs["query"], "key": key_JKE, "value": value_JKE}
        return {name: tensor.transpose(0, 1)[None].contiguous() for name, tensor in tensors.items()}

    def run(given: Tensors) -> Tensors:
        out = F.scaled_dot_product_attention(given["query"], given["key"], given["value"], enable_gqa=True)
        return {"out": out[0].transpose(0, 1)}

    return Call(run, arrange)


DECODE_ATTENTION = Operator(
    name="decode_attention",
    function="kernels.attention.decode:decode_attention",
    shape=lambda sizes: (
        f"1 after {sizes.tokens} x {sizes.heads} / {sizes.kv_heads} heads x {sizes.head_dim}, window {sizes.window}"
    ),
    case=_case,
    call=_call,
    cost=_cost,
    yardstick="torch SDPA",
    directions=("forward",),
    compiled=False,
    peers=(Provider("torch SDPA", _sdpa),),
)
