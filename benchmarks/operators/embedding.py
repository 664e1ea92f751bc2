"""The embedding, without and with NEFTune noise."""

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.operators import operator as of
from benchmarks.operators.operator import Call, Case, Cost, Operator, Provider, Sizes, Tensors, peer, random_data, token_ids
from benchmarks.operators.tokenwise import positions
from kernels.embedding import EmbeddingNoise, noise_reference


def _case(sizes: Sizes, dtype: torch.dtype, device: torch.device) -> Case:
    normal = random_data(device)
    return Case(
        sizes,
        dtype,
        {"weight": normal(sizes.vocab, sizes.width, dtype=dtype, scale=0.02)},
        {"tokens": token_ids(sizes.tokens, sizes.vocab, device), "noise": None},
        {"out": normal(sizes.tokens, sizes.width, dtype=dtype)},
    )


def _noisy_case(sizes: Sizes, dtype: torch.dtype, device: torch.device) -> Case:
    case, lengths = _case(sizes, dtype, device), torch.tensor(sizes.documents)
    case.constants["noise"] = EmbeddingNoise(
        alpha=5.0,
        seed=0,
        step=1,
        position_T=positions(sizes, device).long(),
        document_T=torch.repeat_interleave(torch.arange(len(lengths)), lengths).to(device),
        length_T=torch.repeat_interleave(lengths, lengths).to(device),
    )
    return case


def _call(function: Callable[..., Tensor], case: Case) -> Call:
    tokens, noise = case.constants["tokens"], case.constants["noise"]
    return Call(lambda given: {"out": function(tokens, given["weight"], noise)})


def _cost(case: Case, way: str) -> Cost:
    tokens, noise = case.constants["tokens"], case.constants["noise"]
    if way == "backward":
        return case.moved("out weight") + Cost(tokens.nbytes)  # d out, ids; d weight, which is dense
    # Ids, each row that occurs; out. Noise: document, position and length of each token, int64.
    rows = len(tokens.unique()) * case.sizes.width * case.dtype.itemsize
    return case.moved("out") + Cost(tokens.nbytes + rows + (24 * len(tokens) if noise is not None else 0))


def _liger(case: Case) -> Call:
    apply = peer("liger_kernel.ops.experimental.embedding", "LigerEmbeddingFunction").apply
    return _call(lambda tokens, weight, noise: apply(weight, tokens), case)


def _given_noise(case: Case) -> Call:
    """F.embedding and the same noise, made beforehand: the error's yardstick; its time lacks the making of the noise."""
    noise = noise_reference(case.constants["noise"], case.sizes.width).to(case.dtype)
    return _call(lambda tokens, weight, _: F.embedding(tokens, weight) + noise, case)


def _noise_hook(case: Case) -> Call:
    """The hook of transformers and TRL: noise from torch's generator, scaled by the row's length; outputs do not compare."""
    scale = 5.0 / math.sqrt(case.sizes.tokens * case.sizes.width)

    def function(tokens: Tensor, weight: Tensor, _: Any) -> Tensor:
        out = F.embedding(tokens, weight)
        return out + torch.zeros_like(out).uniform_(-scale, scale)

    return Call(_call(function, case).run, results=lambda given, outputs, gradients: of.named_results(given, {}, gradients))


EMBEDDING = Operator(
    name="embedding",
    function="kernels.embedding:embedding",
    shape=lambda sizes: f"{sizes.tokens} of {sizes.vocab} x {sizes.width}",
    case=_case,
    call=_call,
    cost=_cost,
    yardstick="torch F.embedding",
    peers=(
        Provider("torch F.embedding", lambda case: _call(lambda tokens, weight, noise: F.embedding(tokens, weight), case)),
        Provider("Liger-Kernel", _liger, package="liger_kernel", cuda=True),
    ),
)
NOISY_EMBEDDING = Operator(
    name="embedding, NEFTune",
    function="kernels.embedding:embedding",
    shape=EMBEDDING.shape,
    case=_noisy_case,
    call=_call,
    cost=_cost,
    yardstick="torch, noise made beforehand",
    peers=(
        Provider("torch, noise made beforehand", _given_noise, rival=False),
        Provider("torch uniform_ (transformers' hook)", _noise_hook),
    ),
)
