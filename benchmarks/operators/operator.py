"""What the benchmark must know of an operator: its inputs, its exact result, the least it must move and compute, and who else
computes it.

A new backend of an operator, `<function>_triton` beside `<function>` and `<function>_reference`, is found by its name.
"""

import functools
import importlib
import importlib.util
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from model.config import MistralConfig

Tensors = dict[str, Tensor]
# Suffixes of a public function's other implementations, in the same module.
BACKENDS = ("triton", "gluon", "flash", "reference")


@dataclass(frozen=True)
class Sizes:
    """The dimensions of a model's operators on one packed row; documents: tokens of each, `tokens` in all."""

    tokens: int
    width: int
    heads: int
    kv_heads: int
    head_dim: int
    feed_forward: int
    vocab: int
    window: int | None
    documents: tuple[int, ...]

    @classmethod
    def of(cls, config: MistralConfig, tokens: int, document: int = 0) -> "Sizes":
        """Of a row of `tokens`, cut into documents of `document` tokens (0: all one document)."""
        document = document or tokens
        documents = [document] * (tokens // document) + [tokens % document] * (tokens % document > 0)
        return cls(
            tokens=tokens, width=config.hidden_size, heads=config.num_attention_heads, kv_heads=config.num_key_value_heads,
            head_dim=config.head_dim, feed_forward=config.intermediate_size, vocab=config.vocab_size,
            window=config.sliding_window, documents=tuple(documents),
        )  # fmt: skip

    @property
    def layer(self) -> list[tuple[int, ...]]:
        """The shapes of one layer's parameters."""
        packed = (self.heads + 2 * self.kv_heads) * self.head_dim
        return [
            (packed, self.width), (self.width, self.heads * self.head_dim), (2 * self.feed_forward, self.width),
            (self.width, self.feed_forward), (self.width,), (self.width,),
        ]  # fmt: skip


@dataclass(frozen=True)
class Cost:
    """The least that any implementation moves and computes.

    bytes: every input read once and every result written once. operations: of matrix products, 2 a multiply-add; the
    arithmetic of operators that have none hides behind their bytes.
    """

    bytes: int
    operations: int = 0

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(self.bytes + other.bytes, self.operations + other.operations)


@dataclass(frozen=True)
class Case:
    """One measurement's data.

    inputs: what gets a gradient, or is updated in place; everyone works on a copy. constants: what nobody changes.
    upstream: the gradient of each output.
    """

    sizes: Sizes
    dtype: torch.dtype
    inputs: Tensors
    constants: dict[str, Any] = field(default_factory=dict)
    upstream: Tensors = field(default_factory=dict)

    @property
    def device(self) -> torch.device:
        return next(iter(self.inputs.values())).device


def _as_they_are(tensors: Tensors) -> Tensors:
    return tensors


def _named_results(leaves: Tensors, outputs: Tensors, gradients: Tensors) -> Tensors:
    return {**outputs, **{f"d {name}": gradient for name, gradient in gradients.items()}}


@dataclass(frozen=True)
class Call:
    """How one provider computes the operator. Only `run` and the backward pass through it are timed.

    run: (its inputs) -> outputs by name. arrange: (copies of the case's inputs) -> its inputs. upstream: (copies of the case's
    upstream) -> gradients of its outputs. results: (its inputs, outputs, gradients of its inputs) -> results under the names
    and in the layout that the exact result has.
    """

    run: Callable[[Tensors], Tensors]
    arrange: Callable[[Tensors], Tensors] = _as_they_are
    upstream: Callable[[Tensors], Tensors] = _as_they_are
    results: Callable[[Tensors, Tensors, Tensors], Tensors] = _named_results


@dataclass(frozen=True)
class Provider:
    """Someone who computes the operator.

    build: may import, compile and arrange whatever is not to be timed. package: what must be installed. cuda: runs on CUDA
    only. dtypes: that it is for, all where empty. directions: in which its time means something, all where empty. ours: of
    `kernels`. rival: does the whole job, so that its time is one to beat.
    """

    name: str
    build: Callable[[Case], Call]
    package: str | None = None
    cuda: bool = False
    dtypes: tuple[torch.dtype, ...] = ()
    directions: tuple[str, ...] = ()
    ours: bool = False
    rival: bool = True

    def missing(self, case: Case) -> str | None:
        """Why this one cannot be measured here, None where it can."""
        if self.dtypes and case.dtype not in self.dtypes:
            return "is not for " + str(case.dtype).removeprefix("torch.")
        if self.package and importlib.util.find_spec(self.package.partition(".")[0]) is None:
            return f"{self.package.partition('.')[0]} is not installed"
        return "runs on CUDA only" if self.cuda and case.device.type != "cuda" else None


@dataclass(frozen=True)
class Operator:
    """An operator of `kernels`.

    module, function: where its public function is. case: (sizes, dtype, device) -> random data. call: (a function of the public
    function's signature, case) -> how it is called. exact: results in float64 by name, those of gradients as "d <input>". cost:
    of a direction. yardstick: the provider that computes it plainly with torch in the case's dtype, whose error, doubled, is
    what others may have. compiled: whether torch.compile is given our eager reference. per_tokens: whether the number of tokens
    matters.
    """

    name: str
    module: str
    function: str
    case: Callable[[Sizes, torch.dtype, torch.device], Case]
    call: Callable[[Callable[..., Any], Case], Call]
    exact: Callable[[Case], Tensors]
    cost: Callable[[Case, str], Cost]
    shape: Callable[[Sizes], str]
    peers: tuple[Provider, ...]
    yardstick: str
    directions: tuple[str, ...] = ("forward", "backward")
    compiled: bool = True
    per_tokens: bool = True

    @property
    def differentiable(self) -> bool:
        return "backward" in self.directions

    def providers(self) -> Iterator[Provider]:
        """Ours first: the public function, each backend by its name, the eager reference, that compiled; then the peers."""
        module = importlib.import_module(self.module)
        yield self._ours("komainu", getattr(module, self.function))
        stem, tail = (self.function[:-1], "_") if self.function.endswith("_") else (self.function, "")
        for backend in BACKENDS:
            function = getattr(module, f"{stem}_{backend}{tail}", None)
            if function is None:
                continue
            if backend != "reference":
                yield self._ours(f"komainu ({backend})", function)
                continue
            yield Provider("eager", functools.partial(self.call, function))
            if self.compiled:
                yield Provider("torch.compile", functools.partial(self._call_compiled, function))
        yield from self.peers

    def _ours(self, name: str, function: Callable[..., Any]) -> Provider:
        return Provider(name, functools.partial(self.call, function), ours=True, rival=False)

    def _call_compiled(self, function: Callable[..., Any], case: Case) -> Call:
        return self.call(compiled(function), case)


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function through torch.compile, for one set of shapes."""
    return torch.compile(function, dynamic=False)


def peer(package: str, name: str) -> Any:
    """An attribute of a peer's module."""
    # Peers may import transformers, which would take our package `kernels` for Hugging Face's.
    os.environ.setdefault("USE_HUB_KERNELS", "NO")
    return getattr(importlib.import_module(package), name)


def random_data(device: torch.device, seed: int = 0) -> Callable[..., Tensor]:
    """normal(*shape, dtype=..., scale=1.0): normal values of a seed, rounded once from float32."""
    generator = torch.Generator(device).manual_seed(seed)

    def normal(*shape: int, dtype: torch.dtype = torch.float32, scale: float = 1.0) -> Tensor:
        return (torch.randn(shape, generator=generator, device=device) * scale).to(dtype)

    return normal


def token_ids(count: int, vocab: int, device: torch.device) -> Tensor:
    """Ids about as frequent as pieces are in text (the rank's logarithm is uniform), int64 [count]."""
    generator = torch.Generator(device).manual_seed(1)
    rank = vocab ** torch.rand(count, generator=generator, device=device, dtype=torch.float64)
    return (rank.long() - 1).clamp(0, vocab - 1)


def exact(case: Case, formula: Callable[[Tensors], Tensors]) -> Tensors:
    """Results of a formula in float64, and of its backward pass where the case has an upstream gradient."""
    wide = {name: tensor.double().requires_grad_(bool(case.upstream)) for name, tensor in case.inputs.items()}
    outputs = formula(wide)
    results = {name: output.detach() for name, output in outputs.items()}
    if case.upstream:
        gradients = gradient_of(outputs, {name: up.double() for name, up in case.upstream.items()}, wide)
        results |= {f"d {name}": gradient for name, gradient in gradients.items()}
    return results


def gradient_of(outputs: Tensors, upstream: Tensors, leaves: Tensors) -> Tensors:
    """Gradients of the floating leaves by name."""
    wanted = {name: leaf for name, leaf in leaves.items() if leaf.requires_grad}
    gradients = torch.autograd.grad([outputs[name] for name in upstream], list(wanted.values()), list(upstream.values()))
    return dict(zip(wanted, gradients, strict=True))
