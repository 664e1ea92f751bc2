"""The description of an operator: its inputs, its exact result, the least it must move and compute, and who else computes it.

A backend of an operator, `<function>_triton` beside `<function>` and `<function>_reference`, is found by its name.
"""

import functools
import importlib
import importlib.util
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor

from model.config import MistralConfig

Tensors = dict[str, Tensor]
# Suffixes of a public function's other implementations, in the same module.
BACKENDS = ("triton", "gluon", "flash", "reference")


@dataclass(frozen=True)
class Sizes:
    """The dimensions of a model's operators on one packed row."""

    tokens: int
    width: int
    heads: int
    kv_heads: int
    head_dim: int
    feed_forward: int
    vocab: int
    window: int | None
    documents: tuple[int, ...]  # tokens of each

    @classmethod
    def of(
        cls,
        config: MistralConfig,
        tokens: int,
        document: int = 0,  # tokens of each document of the row; 0: one document
    ) -> "Sizes":
        document = document or tokens
        return cls(
            tokens=tokens,
            width=config.hidden_size,
            heads=config.num_attention_heads,
            kv_heads=config.num_key_value_heads,
            head_dim=config.head_dim,
            feed_forward=config.intermediate_size,
            vocab=config.vocab_size,
            window=config.sliding_window,
            documents=tuple(min(document, tokens - start) for start in range(0, tokens, document)),
        )

    @property
    def layer(self) -> list[tuple[int, ...]]:
        """The shapes of one layer's parameters."""
        packed, attended = (self.heads + 2 * self.kv_heads) * self.head_dim, self.heads * self.head_dim
        matrices = [(packed, self.width), (self.width, attended)]
        matrices += [(2 * self.feed_forward, self.width), (self.width, self.feed_forward)]
        return [*matrices, (self.width,), (self.width,)]


@dataclass(frozen=True)
class Cost:
    """The least that any implementation moves and computes."""

    bytes: int  # every input read once, every result written once
    operations: int = 0  # of matrix products, 2 a multiply-add; other arithmetic hides behind the bytes

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(self.bytes + other.bytes, self.operations + other.operations)


@dataclass(frozen=True)
class Case:
    """One measurement's data."""

    sizes: Sizes
    dtype: torch.dtype
    inputs: Tensors  # differentiated, or updated in place; each provider works on copies
    constants: dict[str, Any] = field(default_factory=dict)  # never changed; all providers share them
    upstream: Tensors = field(default_factory=dict)  # the gradient of each output

    @property
    def device(self) -> torch.device:
        return next(iter(self.inputs.values())).device

    @property
    def wide(self) -> "Case":
        """The case in float64."""
        inputs, upstream = ({name: tensor.double() for name, tensor in some.items()} for some in (self.inputs, self.upstream))
        return replace(self, dtype=torch.float64, inputs=inputs, upstream=upstream)

    def moved(self, names: str) -> Cost:
        """The bytes of tensors: names of inputs or outputs, each as often as it (or its gradient) is read or written."""
        return Cost(sum((self.inputs | self.upstream)[name].nbytes for name in names.split()))


def unchanged(tensors: Tensors) -> Tensors:
    return tensors


def named_results(leaves: Tensors, outputs: Tensors, gradients: Tensors) -> Tensors:
    return {**outputs, **{f"d {name}": gradient for name, gradient in gradients.items()}}


@dataclass(frozen=True)
class Call:
    """How a provider computes the operator. Only `run` and the backward pass through it are timed."""

    run: Callable[[Tensors], Tensors]  # its inputs -> outputs by name
    arrange: Callable[[Tensors], Tensors] = unchanged  # copies of the case's inputs -> its inputs
    upstream: Callable[[Tensors], Tensors] = unchanged  # copies of the case's upstream -> gradients of its outputs
    # (its inputs, outputs, gradients of its inputs) -> results named and laid out like the exact results
    results: Callable[[Tensors, Tensors, Tensors], Tensors] = named_results


@dataclass(frozen=True)
class Provider:
    """An implementation of the operator."""

    name: str
    build: Callable[[Case], Call]  # untimed: imports, compiles, arranges
    package: str | None = None  # must be installed; "module:name" must also have the name
    cuda: bool = False  # runs on CUDA only
    dtypes: tuple[torch.dtype, ...] = ()  # supported dtypes; empty: all
    directions: tuple[str, ...] = ()  # directions with a meaningful time; empty: all
    ours: bool = False
    rival: bool = True  # does the whole job, so that ours is compared with its time

    def missing(self, case: Case) -> str | None:
        """Why this provider cannot be measured here; None where it can."""
        if self.dtypes and case.dtype not in self.dtypes:
            return "is not for " + str(case.dtype).removeprefix("torch.")
        module, _, attribute = (self.package or "").partition(":")
        package = module.partition(".")[0]
        if package and importlib.util.find_spec(package) is None:
            return f"{package} is not installed"
        if attribute and not hasattr(importlib.import_module(module), attribute):
            return f"{module}.{attribute} is not in {package} {version(package)}"
        return "runs on CUDA only" if self.cuda and case.device.type != "cuda" else None


@dataclass(frozen=True, kw_only=True)
class Operator:
    """An operator of `kernels`."""

    name: str
    function: str  # "module:name" of the public function
    shape: Callable[[Sizes], str]
    case: Callable[[Sizes, torch.dtype, torch.device], Case]  # random data
    call: Callable[[Callable[..., Any], Case], Call]  # of a function with the public function's signature
    cost: Callable[[Case, str], Cost]  # of a direction
    peers: tuple[Provider, ...]
    yardstick: str  # the provider that is plain torch in the case's dtype; twice its error is allowed
    directions: tuple[str, ...] = ("forward", "backward")
    compiled: bool = True  # whether torch.compile gets our eager reference
    per_tokens: bool = True  # whether the number of tokens matters
    # Float64 results by name, a gradient's as "d <input>"; None: the yardstick's on float64 inputs.
    exact: Callable[[Case], Tensors] | None = None

    @property
    def differentiable(self) -> bool:
        return "backward" in self.directions

    def providers(self) -> Iterator[Provider]:
        """Ours first: the public function, each backend by its name, the eager reference, that compiled; then the peers."""
        module_name, _, name = self.function.partition(":")
        module = importlib.import_module(module_name)
        yield self._ours("komainu", getattr(module, name))
        stem, tail = (name[:-1], "_") if name.endswith("_") else (name, "")
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
    # transformers, which peers may import, would take our package `kernels` for Hugging Face's.
    os.environ.setdefault("USE_HUB_KERNELS", "NO")
    return getattr(importlib.import_module(package), name)


def random_data(device: torch.device, seed: int = 0) -> Callable[..., Tensor]:
    """normal(*shape, dtype=..., scale=1.0): normal values of a seed, rounded once from float32."""
    generator = torch.Generator(device).manual_seed(seed)

    def normal(*shape: int, dtype: torch.dtype = torch.float32, scale: float = 1.0) -> Tensor:
        return (torch.randn(shape, generator=generator, device=device) * scale).to(dtype)

    return normal


def token_ids(count: int, vocab: int, device: torch.device) -> Tensor:
    """Ids about as frequent as pieces are in text (the logarithm of the rank is uniform), int64 [count]."""
    generator = torch.Generator(device).manual_seed(1)
    rank = vocab ** torch.rand(count, generator=generator, device=device, dtype=torch.float64)
    return (rank.long() - 1).clamp(0, vocab - 1)


def gradient_of(outputs: Tensors, upstream: Tensors, leaves: Tensors) -> Tensors:
    """Gradients of the floating leaves by name."""
    wanted = {name: leaf for name, leaf in leaves.items() if leaf.requires_grad}
    gradients = torch.autograd.grad([outputs[name] for name in upstream], list(wanted.values()), list(upstream.values()))
    return dict(zip(wanted, gradients, strict=True))
