"""Operators that work token by token: norms, rotary embedding, SwiGLU, embedding.

Shapes: T tokens, D width, H query heads, K key/value heads, S = H + 2K packed heads, E head size, F feed-forward size,
V vocabulary.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.operators.operator import (
    Call,
    Case,
    Cost,
    Operator,
    Provider,
    Sizes,
    Tensors,
    compiled,
    exact,
    peer,
    random_data,
    token_ids,
)  # fmt: skip
from kernels.embedding import EmbeddingNoise, noise_reference
from kernels.rotary import rotary_table

EPS = 1e-5


def _positions(sizes: Sizes, device: torch.device) -> Tensor:
    return torch.cat([torch.arange(length, dtype=torch.int32) for length in sizes.documents]).to(device)


# RMS norm


def _norm_case(sizes: Sizes, dtype: torch.dtype, device: torch.device) -> Case:
    normal = random_data(device)
    shape = (sizes.tokens, sizes.width)
    weight_D = (1 + normal(sizes.width, scale=0.1)).to(dtype)
    return Case(
        sizes, dtype, {"hidden": normal(*shape, dtype=dtype), "weight": weight_D}, upstream={"out": normal(*shape, dtype=dtype)}
    )


def _norm_call(function: Callable[..., Tensor], case: Case) -> Call:
    return Call(lambda given: {"out": function(given["hidden"], given["weight"], EPS)})


def _norm_cost(case: Case, direction: str) -> Cost:
    size, width = case.dtype.itemsize, case.sizes.width
    row = case.sizes.tokens * width * size
    if direction == "forward":
        return Cost(2 * row + width * size)  # hidden, weight; out
    return Cost(3 * row + 2 * width * size)  # d out, hidden, weight; d hidden, d weight


def _torch_norm(hidden: Tensor, weight: Tensor, eps: float) -> Tensor:
    return F.rms_norm(hidden, weight.shape, weight, eps)


def _liger_norm(case: Case) -> Call:
    apply = peer("liger_kernel.ops.rms_norm", "LigerRMSNormFunction").apply
    return _norm_call(lambda hidden, weight, eps: apply(hidden, weight, eps, 0.0, "llama", True), case)


def _quack_norm(case: Case) -> Call:
    function = peer("quack.rmsnorm", "rmsnorm")
    return _norm_call(lambda hidden, weight, eps: function(hidden, weight, eps=eps), case)


RMS_NORM = Operator(
    "rms_norm", "kernels.rms_norm", "rms_norm", _norm_case, _norm_call, cost=_norm_cost,
    exact=lambda case: exact(case, lambda x: {"out": _torch_norm(x["hidden"], x["weight"], EPS)}),
    shape=lambda sizes: f"{sizes.tokens} x {sizes.width}", yardstick="torch F.rms_norm",
    peers=(
        Provider("torch F.rms_norm", lambda case: _norm_call(_torch_norm, case)),
        Provider("Liger-Kernel", _liger_norm, package="liger_kernel", cuda=True),
        Provider("QuACK", _quack_norm, package="quack", cuda=True),
    ),
)  # fmt: skip


# The residual's addition and RMS norm


def _add_norm_case(sizes: Sizes, dtype: torch.dtype, device: torch.device) -> Case:
    case, normal = _norm_case(sizes, dtype, device), random_data(device, 1)
    shape = (sizes.tokens, sizes.width)
    return Case(
        sizes, dtype, {"residual": normal(*shape, dtype=dtype), **case.inputs},
        upstream={"total": normal(*shape, dtype=dtype), **case.upstream},
    )  # fmt: skip


def _add_norm_call(function: Callable[..., tuple[Tensor, Tensor]], case: Case) -> Call:
    def run(given: Tensors) -> Tensors:
        total, out = function(given["residual"], given["hidden"], given["weight"], EPS)
        return {"total": total, "out": out}

    return Call(run)


def _add_norm_cost(case: Case, direction: str) -> Cost:
    size, width = case.dtype.itemsize, case.sizes.width
    row = case.sizes.tokens * width * size
    if direction == "forward":
        return Cost(4 * row + width * size)  # residual, hidden, weight; total, out
    return Cost(4 * row + 2 * width * size)  # d total, d out, total, weight; the gradient that both summands share, d weight


def _torch_add_norm(residual: Tensor, hidden: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    total = residual + hidden
    return total, _torch_norm(total, weight, eps)


def _liger_add_norm(case: Case) -> Call:
    apply = peer("liger_kernel.ops.fused_add_rms_norm", "LigerFusedAddRMSNormFunction").apply

    def function(residual: Tensor, hidden: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        out, total = apply(hidden, residual, weight, eps, 0.0, "llama", True)
        return total, out

    return _add_norm_call(function, case)


def _exact_add_norm(case: Case) -> Tensors:
    def formula(x: Tensors) -> Tensors:
        total, out = _torch_add_norm(x["residual"], x["hidden"], x["weight"], EPS)
        return {"total": total, "out": out}

    return exact(case, formula)


ADD_RMS_NORM = Operator(
    "add_rms_norm", "kernels.rms_norm", "add_rms_norm", _add_norm_case, _add_norm_call, _exact_add_norm, _add_norm_cost,
    shape=lambda sizes: f"{sizes.tokens} x {sizes.width}", yardstick="torch F.rms_norm",
    peers=(
        Provider("torch F.rms_norm", lambda case: _add_norm_call(_torch_add_norm, case)),
        Provider("Liger-Kernel", _liger_add_norm, package="liger_kernel", cuda=True),
    ),
)  # fmt: skip


# Rotary embedding


def _rotary_case(sizes: Sizes, dtype: torch.dtype, device: torch.device) -> Case:
    normal = random_data(device)
    shape = (sizes.tokens, sizes.heads + 2 * sizes.kv_heads, sizes.head_dim)
    table = rotary_table(_positions(sizes, device), sizes.head_dim, 10000.0)
    return Case(
        sizes, dtype, {"qkv": normal(*shape, dtype=dtype)}, {"table": table, "rotated": sizes.heads + sizes.kv_heads},
        {"out": normal(*shape, dtype=dtype)},
    )  # fmt: skip


def _rotary_call(function: Callable[..., Tensor], case: Case) -> Call:
    table, rotated = case.constants["table"], case.constants["rotated"]

    def results(given: Tensors, outputs: Tensors, gradients: Tensors) -> Tensors:
        found = {"out": outputs["out"][:, :rotated]}
        return found | {f"d {name}": gradient[:, :rotated] for name, gradient in gradients.items()}

    return Call(lambda given: {"out": function(_Product.apply(given["qkv"]), table, rotated)}, results=results)


class _Product(torch.autograd.Function):
    """Hands a leaf out as a product's result is, which may be changed in place: neither a leaf nor autograd's view of one."""

    @staticmethod
    def forward(ctx: Any, leaf: Tensor) -> Tensor:
        return leaf.detach()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return grads[0]


def _rotary_cost(case: Case, direction: str) -> Cost:
    sizes = case.sizes
    # Forward turns queries and keys in place, values need not move; backward, whose gradient is not ours to change, writes all
    # heads anew. A float32 cosine and sine for each half of a head.
    moved = sizes.heads + sizes.kv_heads if direction == "forward" else sizes.heads + 2 * sizes.kv_heads
    return Cost(2 * sizes.tokens * moved * sizes.head_dim * case.dtype.itemsize + 4 * sizes.tokens * sizes.head_dim)


def _exact_rotary(case: Case) -> Tensors:
    """As the product of complex numbers."""
    table, rotated = case.constants["table"], case.constants["rotated"]
    turn_TE = torch.complex(table.cos_TE.double(), table.sin_TE.double())

    def formula(x: Tensors) -> Tensors:
        real, imaginary = x["qkv"][:, :rotated].chunk(2, dim=-1)
        turned = torch.complex(real, imaginary) * turn_TE[:, None]
        return {"out": torch.cat((turned.real, turned.imag), dim=-1)}

    upstream = {"out": case.upstream["out"][:, :rotated]}
    results = exact(Case(case.sizes, case.dtype, case.inputs, case.constants, upstream), formula)
    return {"out": results["out"], "d qkv": results["d qkv"][:, :rotated]}


def _split_rotary(function: Callable[..., tuple[Tensor, Tensor]], case: Case) -> Call:
    """For functions of query [1, H, T, E] and key [1, K, T, E], as transformers has them, with cos and sin [1, T, E]."""
    heads, kv_heads, table = case.sizes.heads, case.sizes.kv_heads, case.constants["table"]
    cos, sin = (torch.cat((half, half), dim=-1)[None].to(case.dtype) for half in table)

    def split(packed: Tensor) -> Tensors:
        query, key, _ = packed[None].split((heads, kv_heads, kv_heads), dim=2)
        return {"query": query.contiguous(), "key": key.contiguous()}

    def run(given: Tensors) -> Tensors:
        query, key = function(given["query"].transpose(1, 2), given["key"].transpose(1, 2), cos, sin)
        return {"query": query.transpose(1, 2), "key": key.transpose(1, 2)}

    def results(given: Tensors, outputs: Tensors, gradients: Tensors) -> Tensors:
        found = {"out": outputs, "d qkv": gradients}
        return {name: torch.cat((part["query"], part["key"]), dim=2)[0] for name, part in found.items() if part}

    return Call(run, lambda inputs: split(inputs["qkv"]), lambda upstream: split(upstream["out"]), results)


def _rotate_half(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    cos, sin = cos[:, None], sin[:, None]

    def turn(x: Tensor) -> Tensor:
        first, second = x.chunk(2, dim=-1)
        return x * cos + torch.cat((-second, first), dim=-1) * sin

    return turn(query), turn(key)


def _liger_rotary(case: Case) -> Call:
    return _split_rotary(peer("liger_kernel.ops.rope", "LigerRopeFunction").apply, case)


ROTARY = Operator(
    "rotary", "kernels.rotary", "rotary_", _rotary_case, _rotary_call, _exact_rotary, _rotary_cost,
    shape=lambda sizes: f"{sizes.tokens} x {sizes.heads} + 2 * {sizes.kv_heads} heads x {sizes.head_dim}",
    yardstick="torch rotate-half",
    peers=(
        Provider("torch rotate-half", lambda case: _split_rotary(_rotate_half, case)),
        Provider("Liger-Kernel", _liger_rotary, package="liger_kernel", cuda=True),
    ),
)  # fmt: skip


# SwiGLU


def _swiglu_case(sizes: Sizes, dtype: torch.dtype, device: torch.device) -> Case:
    normal = random_data(device)
    inputs = {"gate_up": normal(sizes.tokens, 2 * sizes.feed_forward, dtype=dtype)}
    return Case(sizes, dtype, inputs, upstream={"out": normal(sizes.tokens, sizes.feed_forward, dtype=dtype)})


def _swiglu_call(function: Callable[..., Tensor], case: Case) -> Call:
    return Call(lambda given: {"out": function(given["gate_up"])})


def _swiglu_cost(case: Case, direction: str) -> Cost:
    part = case.sizes.tokens * case.sizes.feed_forward * case.dtype.itemsize
    return Cost((3 if direction == "forward" else 5) * part)  # gate, up; out -- gate, up, d out; d gate, d up


def _torch_swiglu(gate_up: Tensor) -> Tensor:
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up


def _exact_swiglu(case: Case) -> Tensors:
    def formula(x: Tensors) -> Tensors:
        gate, up = x["gate_up"].chunk(2, dim=-1)
        return {"out": gate * torch.sigmoid(gate) * up}

    return exact(case, formula)


def _liger_swiglu(case: Case) -> Call:
    """On gate and up as two tensors, as Liger's own module has them."""
    apply = peer("liger_kernel.ops.swiglu", "LigerSiLUMulFunction").apply

    def arrange(inputs: Tensors) -> Tensors:
        gate, up = inputs["gate_up"].chunk(2, dim=-1)
        return {"gate": gate.contiguous(), "up": up.contiguous()}

    def results(given: Tensors, outputs: Tensors, gradients: Tensors) -> Tensors:
        return outputs | ({"d gate_up": torch.cat((gradients["gate"], gradients["up"]), dim=-1)} if gradients else {})

    return Call(lambda given: {"out": apply(given["gate"], given["up"])}, arrange, results=results)


def _liger_packed_swiglu(case: Case) -> Call:
    apply = peer("liger_kernel.ops.swiglu", "LigerFusedGateUpSiLUMulFunction").apply
    return _swiglu_call(lambda gate_up: apply(gate_up, True), case)


SWIGLU = Operator(
    "swiglu", "kernels.swiglu", "swiglu", _swiglu_case, _swiglu_call, _exact_swiglu, _swiglu_cost,
    shape=lambda sizes: f"{sizes.tokens} x 2 * {sizes.feed_forward}", yardstick="torch F.silu",
    peers=(
        Provider("torch F.silu", lambda case: _swiglu_call(_torch_swiglu, case)),
        Provider("Liger-Kernel", _liger_swiglu, package="liger_kernel", cuda=True),
        Provider("Liger-Kernel (packed)", _liger_packed_swiglu, package="liger_kernel", cuda=True),
    ),
)  # fmt: skip


# SwiGLU's backward pass in place, which gives the product once more


def _in_place_case(sizes: Sizes, dtype: torch.dtype, device: torch.device) -> Case:
    case = _swiglu_case(sizes, dtype, device)
    return Case(sizes, dtype, case.inputs | {"grad": case.upstream["out"]})


def _in_place_call(function: Callable[[Tensor, Tensor], Tensor], case: Case) -> Call:
    def run(given: Tensors) -> Tensors:
        return {"product": function(given["gate_up"], given["grad"])}

    return Call(run, results=lambda given, outputs, gradients: {"gate_up": given["gate_up"], **outputs})


def _in_place_cost(case: Case, direction: str) -> Cost:
    # Gate, up and gradient are read; two gradients and the product are written.
    return Cost(6 * case.sizes.tokens * case.sizes.feed_forward * case.dtype.itemsize)


def _in_place_torch(gate_up: Tensor, grad: Tensor) -> Tensor:
    gate, up = gate_up.chunk(2, dim=-1)
    share = torch.sigmoid(gate)
    product = gate * share * up
    gradients = (grad * up * share * (1 + gate * (1 - share)), grad * gate * share)
    gate_up.copy_(torch.cat(gradients, dim=-1))
    return product


def _exact_in_place(case: Case) -> Tensors:
    gate_up = case.inputs["gate_up"].double().requires_grad_()
    gate, up = gate_up.chunk(2, dim=-1)
    product = gate * torch.sigmoid(gate) * up
    (gradient,) = torch.autograd.grad(product, gate_up, case.inputs["grad"].double())
    return {"gate_up": gradient, "product": product.detach()}


SWIGLU_BACKWARD = Operator(
    "swiglu backward, in place", "kernels.swiglu", "swiglu_backward_", _in_place_case,
    lambda function, case: _in_place_call(functools.partial(function, emit=True), case), _exact_in_place, _in_place_cost,
    shape=lambda sizes: f"{sizes.tokens} x 2 * {sizes.feed_forward}", yardstick="torch", directions=("update",),
    peers=(
        Provider("torch", lambda case: _in_place_call(_in_place_torch, case)),
        Provider("torch.compile", lambda case: _in_place_call(compiled(_in_place_torch), case)),
    ),
)  # fmt: skip


# Embedding


def _embedding_case(sizes: Sizes, dtype: torch.dtype, device: torch.device, *, noisy: bool = False) -> Case:
    normal = random_data(device)
    noise = None
    if noisy:
        lengths = torch.tensor(sizes.documents)
        noise = EmbeddingNoise(
            alpha=5.0, seed=0, step=1, position_T=_positions(sizes, device).long(),
            document_T=torch.repeat_interleave(torch.arange(len(lengths)), lengths).to(device),
            length_T=torch.repeat_interleave(lengths, lengths).to(device),
        )  # fmt: skip
    return Case(
        sizes, dtype, {"weight": normal(sizes.vocab, sizes.width, dtype=dtype, scale=0.02)},
        {"tokens": token_ids(sizes.tokens, sizes.vocab, device), "noise": noise},
        {"out": normal(sizes.tokens, sizes.width, dtype=dtype)},
    )  # fmt: skip


def _embedding_call(function: Callable[..., Tensor], case: Case) -> Call:
    tokens, noise = case.constants["tokens"], case.constants["noise"]
    return Call(lambda given: {"out": function(tokens, given["weight"], noise)})


def _embedding_cost(case: Case, direction: str) -> Cost:
    sizes, size, tokens = case.sizes, case.dtype.itemsize, case.constants["tokens"]
    row = sizes.width * size
    if direction == "backward":
        return Cost(8 * sizes.tokens + sizes.tokens * row + sizes.vocab * row)  # ids, d out; d weight, all of it
    # Ids, each row that occurs; out. Noise: document, position and length of each token.
    noise = 24 * sizes.tokens if case.constants["noise"] is not None else 0
    return Cost(8 * sizes.tokens + len(tokens.unique()) * row + sizes.tokens * row + noise)


def _exact_embedding(case: Case) -> Tensors:
    tokens, noise = case.constants["tokens"], case.constants["noise"]
    added = 0.0 if noise is None else noise_reference(noise, case.sizes.width).double()
    return exact(case, lambda x: {"out": x["weight"][tokens] + added})


def _torch_embedding(tokens: Tensor, weight: Tensor, noise: Any) -> Tensor:
    return F.embedding(tokens, weight)


def _liger_embedding(case: Case) -> Call:
    apply = peer("liger_kernel.ops.experimental.embedding", "LigerEmbeddingFunction").apply
    return _embedding_call(lambda tokens, weight, noise: apply(weight, tokens), case)


def _given_noise(case: Case) -> Call:
    """F.embedding and the same noise, made beforehand: the yardstick of the error, whose time lacks the noise's making."""
    noise = noise_reference(case.constants["noise"], case.sizes.width).to(case.dtype)
    return _embedding_call(lambda tokens, weight, _: F.embedding(tokens, weight) + noise, case)


def _noise_hook(case: Case) -> Call:
    """The hook of transformers and TRL: noise drawn from torch's generator and scaled by the row's length; not comparable."""
    scale = 5.0 / math.sqrt(case.sizes.tokens * case.sizes.width)

    def function(tokens: Tensor, weight: Tensor, _: Any) -> Tensor:
        out = F.embedding(tokens, weight)
        return out + torch.zeros_like(out).uniform_(-scale, scale)

    def results(given: Tensors, outputs: Tensors, gradients: Tensors) -> Tensors:
        return {f"d {name}": gradient for name, gradient in gradients.items()}

    return Call(_embedding_call(function, case).run, results=results)


EMBEDDING = Operator(
    "embedding", "kernels.embedding", "embedding", _embedding_case, _embedding_call, _exact_embedding, _embedding_cost,
    shape=lambda sizes: f"{sizes.tokens} of {sizes.vocab} x {sizes.width}", yardstick="torch F.embedding",
    peers=(
        Provider("torch F.embedding", lambda case: _embedding_call(_torch_embedding, case)),
        Provider("Liger-Kernel", _liger_embedding, package="liger_kernel", cuda=True),
    ),
)  # fmt: skip
NOISY_EMBEDDING = Operator(
    "embedding, NEFTune", "kernels.embedding", "embedding",
    lambda sizes, dtype, device: _embedding_case(sizes, dtype, device, noisy=True), _embedding_call, _exact_embedding,
    _embedding_cost, shape=lambda sizes: f"{sizes.tokens} of {sizes.vocab} x {sizes.width}",
    yardstick="torch, noise made beforehand",
    peers=(
        Provider("torch, noise made beforehand", _given_noise, rival=False),
        Provider("torch uniform_ (transformers' hook)", _noise_hook),
    ),
)  # fmt: skip
