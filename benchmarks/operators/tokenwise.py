"""Operators that work token by token: norms, rotary embedding, SwiGLU, the embedding.

T tokens, D width, E head size.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import benchmarks.operators.operator as of
from benchmarks.operators.operator import Call, Case, Cost, Operator, Provider, Sizes, Tensors, compiled, peer, random_data
from kernels.rotary import rotary_table

EPS = 1e-5


# RMS norm, and the residual's addition before it


def _norm_case(sizes: Sizes, dtype: torch.dtype, device: torch.device) -> Case:
    normal, shape = random_data(device), (sizes.tokens, sizes.width)
    weight_D = (1 + normal(sizes.width, scale=0.1)).to(dtype)
    inputs = {"hidden": normal(*shape, dtype=dtype), "weight": weight_D}
    return Case(sizes, dtype, inputs, upstream={"out": normal(*shape, dtype=dtype)})


def _add_norm_case(sizes: Sizes, dtype: torch.dtype, device: torch.device) -> Case:
    case, normal, shape = _norm_case(sizes, dtype, device), random_data(device, 1), (sizes.tokens, sizes.width)
    inputs = {"residual": normal(*shape, dtype=dtype), **case.inputs}
    return Case(sizes, dtype, inputs, upstream={"total": normal(*shape, dtype=dtype), **case.upstream})


def _norm_call(function: Callable[..., Tensor], case: Case) -> Call:
    return Call(lambda given: {"out": function(given["hidden"], given["weight"], EPS)})


def _add_norm_call(function: Callable[..., tuple[Tensor, Tensor]], case: Case) -> Call:
    names = ("total", "out")
    return Call(lambda given: dict(zip(names, function(given["residual"], given["hidden"], given["weight"], EPS), strict=True)))


def _torch_norm(hidden: Tensor, weight: Tensor, eps: float) -> Tensor:
    return F.rms_norm(hidden, weight.shape, weight, eps)


def _torch_add_norm(residual: Tensor, hidden: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    total = residual + hidden
    return total, _torch_norm(total, weight, eps)


def _liger_norm(case: Case) -> Call:
    apply = peer("liger_kernel.ops.rms_norm", "LigerRMSNormFunction").apply
    return _norm_call(lambda hidden, weight, eps: apply(hidden, weight, eps, 0.0, "llama", True), case)


RMS_NORM = Operator(
    name="rms_norm",
    function="kernels.rms_norm:rms_norm",
    shape=lambda sizes: f"{sizes.tokens} x {sizes.width}",
    case=_norm_case,
    call=_norm_call,
    # Backward: d out, hidden, weight; d hidden, d weight.
    cost=lambda case, way: case.moved("hidden weight out" if way == "forward" else "out hidden weight hidden weight"),
    yardstick="torch F.rms_norm",
    peers=(
        Provider("torch F.rms_norm", lambda case: _norm_call(_torch_norm, case)),
        Provider("Liger-Kernel", _liger_norm, package="liger_kernel", cuda=True),
    ),
)
ADD_RMS_NORM = Operator(
    name="add_rms_norm",
    function="kernels.rms_norm:add_rms_norm",
    shape=RMS_NORM.shape,
    case=_add_norm_case,
    call=_add_norm_call,
    # Backward: d total, d out, total, weight; the gradient that both summands share, d weight.
    cost=lambda case, way: case.moved(
        "residual hidden weight total out" if way == "forward" else "total out total weight hidden weight"
    ),
    yardstick="torch F.rms_norm",
    peers=(Provider("torch F.rms_norm", lambda case: _add_norm_call(_torch_add_norm, case)),),
)


# Rotary embedding


def _rotary_case(sizes: Sizes, dtype: torch.dtype, device: torch.device) -> Case:
    normal = random_data(device)
    shape = (sizes.tokens, sizes.heads + 2 * sizes.kv_heads, sizes.head_dim)
    position_T = torch.cat([torch.arange(length, dtype=torch.int32) for length in sizes.documents]).to(device)
    table = rotary_table(position_T, sizes.head_dim, 10000.0)
    constants = {"table": table, "rotated": sizes.heads + sizes.kv_heads}
    return Case(sizes, dtype, {"qkv": normal(*shape, dtype=dtype)}, constants, {"out": normal(*shape, dtype=dtype)})


class _Product(torch.autograd.Function):
    """Makes of a leaf a tensor that may be changed in place, like a matrix product's result: no leaf, no view of a leaf."""

    @staticmethod
    def forward(ctx: Any, leaf: Tensor) -> Tensor:
        return leaf.detach()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return grads[0]


def _rotary_call(function: Callable[..., Tensor], case: Case) -> Call:
    table, rotated = case.constants["table"], case.constants["rotated"]

    def results(given: Tensors, outputs: Tensors, gradients: Tensors) -> Tensors:
        return {name: tensor[:, :rotated] for name, tensor in of.named_results(given, outputs, gradients).items()}

    return Call(lambda given: {"out": function(_Product.apply(given["qkv"]), table, rotated)}, results=results)


def _rotary_cost(case: Case, way: str) -> Cost:
    sizes = case.sizes
    # Forward turns queries and keys in place; backward, whose gradient autograd owns, writes all heads anew. The table holds
    # a float32 cosine and sine for each half of a head.
    moved = sizes.heads + sizes.kv_heads if way == "forward" else sizes.heads + 2 * sizes.kv_heads
    return Cost(2 * sizes.tokens * moved * sizes.head_dim * case.dtype.itemsize + 4 * sizes.tokens * sizes.head_dim)


def _torch_rotary(qkv: Tensor, table: Any, rotated: int) -> Tensor:
    first, second = qkv[:, :rotated].chunk(2, dim=-1)
    cos, sin = table.cos_TE[:, None], table.sin_TE[:, None]
    turned = torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
    return torch.cat((turned.to(qkv.dtype), qkv[:, rotated:]), dim=1)


ROTARY = Operator(
    name="rotary",
    function="kernels.rotary:rotary_",
    shape=lambda sizes: f"{sizes.tokens} x {sizes.heads} + 2 * {sizes.kv_heads} heads x {sizes.head_dim}",
    case=_rotary_case,
    call=_rotary_call,
    cost=_rotary_cost,
    yardstick="torch rotate-half",
    peers=(Provider("torch rotate-half", lambda case: _rotary_call(_torch_rotary, case)),),
)


# SwiGLU, and its backward pass in place, which emits the product once more


def _swiglu_case(sizes: Sizes, dtype: torch.dtype, device: torch.device) -> Case:
    normal = random_data(device)
    inputs = {"gate_up": normal(sizes.tokens, 2 * sizes.feed_forward, dtype=dtype)}
    return Case(sizes, dtype, inputs, upstream={"out": normal(sizes.tokens, sizes.feed_forward, dtype=dtype)})


def _in_place_case(sizes: Sizes, dtype: torch.dtype, device: torch.device) -> Case:
    case = _swiglu_case(sizes, dtype, device)
    return Case(sizes, dtype, case.inputs | {"grad": case.upstream["out"]})


def _swiglu_call(function: Callable[..., Tensor], case: Case) -> Call:
    return Call(lambda given: {"out": function(given["gate_up"])})


def _in_place_call(function: Callable[[Tensor, Tensor], Tensor], case: Case) -> Call:
    def run(given: Tensors) -> Tensors:
        return {"product": function(given["gate_up"], given["grad"])}

    return Call(run, results=lambda given, outputs, gradients: {"gate_up": given["gate_up"], **outputs})


def _torch_swiglu(gate_up: Tensor) -> Tensor:
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up


def _torch_in_place(gate_up: Tensor, grad: Tensor) -> Tensor:
    gate, up = gate_up.chunk(2, dim=-1)
    share = torch.sigmoid(gate)
    product = gate * share * up
    gradients = (grad * up * share * (1 + gate * (1 - share)), grad * gate * share)
    gate_up.copy_(torch.cat(gradients, dim=-1))
    return product


def _liger_swiglu(case: Case) -> Call:
    apply = peer("liger_kernel.ops.swiglu", "LigerFusedGateUpSiLUMulFunction").apply
    return _swiglu_call(lambda gate_up: apply(gate_up, True), case)


SWIGLU = Operator(
    name="swiglu",
    function="kernels.swiglu:swiglu",
    shape=lambda sizes: f"{sizes.tokens} x 2 * {sizes.feed_forward}",
    case=_swiglu_case,
    call=_swiglu_call,
    cost=lambda case, way: case.moved("gate_up out" if way == "forward" else "gate_up out gate_up"),
    yardstick="torch F.silu",
    peers=(
        Provider("torch F.silu", lambda case: _swiglu_call(_torch_swiglu, case)),
        Provider("Liger-Kernel", _liger_swiglu, package="liger_kernel", cuda=True),
    ),
)
SWIGLU_BACKWARD = Operator(
    name="swiglu backward, in place",
    function="kernels.swiglu:swiglu_backward_",
    shape=SWIGLU.shape,
    case=_in_place_case,
    call=lambda function, case: _in_place_call(lambda gate_up, grad: function(gate_up, grad, emit=True), case),
    # Gate, up and gradient are read; two gradients and the product (as large as the gradient) are written.
    cost=lambda case, way: case.moved("gate_up grad gate_up grad"),
    yardstick="torch",
    directions=("update",),
    peers=(
        Provider("torch", lambda case: _in_place_call(_torch_in_place, case)),
        Provider("torch.compile", lambda case: _in_place_call(compiled(_torch_in_place), case)),
    ),
)


# The embedding


def _embedding_case(sizes: Sizes, dtype: torch.dtype, device: torch.device) -> Case:
    normal = random_data(device)
    inputs = {"weight": normal(sizes.vocab, sizes.width, dtype=dtype, scale=0.02)}
    constants = {"tokens": of.token_ids(sizes.tokens, sizes.vocab, device)}
    return Case(sizes, dtype, inputs, constants, {"out": normal(sizes.tokens, sizes.width, dtype=dtype)})


def _embedding_call(function: Callable[[Tensor, Tensor], Tensor], case: Case) -> Call:
    return Call(lambda given: {"out": function(case.constants["tokens"], given["weight"])})


def _embedding_cost(case: Case, way: str) -> Cost:
    tokens = case.constants["tokens"]
    if way == "backward":
        return case.moved("out weight") + Cost(tokens.nbytes)  # d out, ids; d weight, which is dense
    # Ids, each row that occurs; out.
    return case.moved("out") + Cost(tokens.nbytes + len(tokens.unique()) * case.sizes.width * case.dtype.itemsize)


EMBEDDING = Operator(
    name="embedding",
    function="kernels.embedding:embedding",
    shape=lambda sizes: f"{sizes.tokens} of {sizes.vocab} x {sizes.width}",
    case=_embedding_case,
    call=_embedding_call,
    cost=_embedding_cost,
    yardstick="torch F.embedding",
    peers=(Provider("torch F.embedding", lambda case: _embedding_call(F.embedding, case)),),
)
