"""The optimizer's operators, over the parameters of one layer."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks.operators.operator import Call, Case, Cost, Operator, Provider, Sizes, Tensors, compiled, random_data
from kernels.adamw import join_master, split_master

_BETAS = (0.9, 0.95)
_CONSTANTS = {"learning_rate": 1e-4, "betas": _BETAS, "eps": 1e-8, "weight_decay": 0.1, "step": 100}
_CLIP = 0.5
# The same constants under torch's names.
_TORCH: dict[str, Any] = {
    "lr": 1e-4,
    "beta1": _BETAS[0],
    "beta2": _BETAS[1],
    "weight_decay": 0.1,
    "eps": 1e-8,
    "amsgrad": False,
    "maximize": False,
}


def _named(kind: str, tensors: Tensors) -> list[Tensor]:
    """The tensors of one kind, one of each parameter."""
    return [tensor for name, tensor in tensors.items() if name.rpartition(" ")[0] == kind]


def _shape(sizes: Sizes) -> str:
    return f"one layer, {sum(_elements(sizes)):,} parameters"


def _elements(sizes: Sizes) -> list[int]:
    return [torch.Size(shape).numel() for shape in sizes.layer]


# AdamW


def _adamw_case(sizes: Sizes, dtype: torch.dtype, device: torch.device) -> Case:
    normal = random_data(device)
    inputs: Tensors = {}
    for i, shape in enumerate(sizes.layer):
        master = normal(*shape, scale=0.02)
        inputs[f"parameter {i}"] = master
        if dtype == torch.bfloat16:
            inputs[f"parameter {i}"], inputs[f"remainder {i}"] = split_master(master)
        inputs[f"gradient {i}"] = normal(*shape, dtype=dtype, scale=1e-3)
        inputs[f"exp_avg {i}"] = normal(*shape, scale=1e-4)
        inputs[f"exp_avg_sq {i}"] = normal(*shape, scale=1e-3).square()
    return Case(sizes, dtype, inputs, {"clip": torch.tensor(_CLIP, device=device)})


def _masters(tensors: Tensors) -> list[Tensor]:
    parameters, remainders = _named("parameter", tensors), _named("remainder", tensors)
    return [join_master(*pair) for pair in zip(parameters, remainders, strict=True)] if remainders else parameters


def _updated(masters: list[Tensor], given: Tensors) -> Tensors:
    """Results by name, from float32 masters or from a provider's substitute for them."""
    kinds = {"master": masters, "exp_avg": _named("exp_avg", given), "exp_avg_sq": _named("exp_avg_sq", given)}
    return {f"{kind} {i}": tensor for kind, tensors in kinds.items() for i, tensor in enumerate(tensors)}


def _adamw_call(function: Callable[..., None], case: Case) -> Call:
    def run(given: Tensors) -> Tensors:
        parameters = _named("parameter", given)
        remainders: list[Any] = _named("remainder", given) or [None] * len(parameters)
        moments = (_named(kind, given) for kind in ("gradient", "exp_avg", "exp_avg_sq"))
        for tensors in zip(parameters, remainders, *moments, strict=True):
            function(*tensors, **_CONSTANTS, gradient_scale=case.constants["clip"])
        return {}

    return Call(run, results=lambda given, outputs, gradients: _updated(_masters(given), given))


def _exact_adamw(case: Case) -> Tensors:
    """Algorithm 2 of Loshchilov and Hutter (https://arxiv.org/abs/1711.05101), line by line."""
    (beta1, beta2), rate = _BETAS, 1e-4
    results: Tensors = {}
    gradients, firsts, seconds = (_named(kind, case.inputs) for kind in ("gradient", "exp_avg", "exp_avg_sq"))
    for i, master in enumerate(_masters(case.inputs)):
        gradient = gradients[i].double() * _CLIP
        first = beta1 * firsts[i].double() + (1 - beta1) * gradient
        second = beta2 * seconds[i].double() + (1 - beta2) * gradient**2
        step = (first / (1 - beta1**100)) / ((second / (1 - beta2**100)).sqrt() + 1e-8)
        results[f"master {i}"] = master.double() - rate * (step + 0.1 * master.double())
        results[f"exp_avg {i}"], results[f"exp_avg_sq {i}"] = first, second
    return results


def _adamw_cost(case: Case, direction: str) -> Cost:
    # Gradients are read; parameters (with their remainders) and both float32 moments are read and written.
    parameter = 4 if case.dtype == torch.float32 else 2 + 2
    return Cost(sum(_elements(case.sizes)) * (case.dtype.itemsize + 2 * parameter + 2 * 8))


def _masters_apart(inputs: Tensors) -> Tensors:
    """Float32 masters beside bfloat16 parameters instead of remainders: the usual mixed precision."""
    masters = {f"master {i}": master for i, master in enumerate(_masters(inputs))}
    return {name: tensor for name, tensor in inputs.items() if not name.startswith("remainder")} | masters


def _fused_step(parameters: list[Tensor], gradients: list[Tensor], given: Tensors, case: Case) -> None:
    """The operator inside torch.optim.AdamW(fused=True), with clipping as the scale of the gradient."""
    steps = [torch.full((), float(_CONSTANTS["step"]), device=case.device)] * len(parameters)  # type: ignore[arg-type]
    state: Any = (parameters, gradients, _named("exp_avg", given), _named("exp_avg_sq", given), [], steps)
    torch._fused_adamw_(*state, **_TORCH, grad_scale=1 / case.constants["clip"])


def _torch_fused(case: Case) -> Call:
    if case.dtype == torch.float32:

        def run(given: Tensors) -> Tensors:
            _fused_step(_named("parameter", given), _named("gradient", given), given, case)
            return {}

        return Call(run, results=lambda given, outputs, gradients: _updated(_named("parameter", given), given))

    def run_masters(given: Tensors) -> Tensors:
        masters = _named("master", given)
        _fused_step(masters, [gradient.float() for gradient in _named("gradient", given)], given, case)
        torch._foreach_copy_(_named("parameter", given), masters)
        return {}

    return Call(run_masters, _masters_apart, results=lambda given, outputs, gradients: _updated(_named("master", given), given))


ADAMW = Operator(
    name="adamw",
    function="kernels.adamw:adamw_",
    shape=_shape,
    case=_adamw_case,
    call=_adamw_call,
    exact=_exact_adamw,
    cost=_adamw_cost,
    yardstick="torch fused",
    directions=("update",),
    compiled=False,
    per_tokens=False,
    peers=(Provider("torch fused", _torch_fused),),
)


# The gradient's norm


def _norm_case(sizes: Sizes, dtype: torch.dtype, device: torch.device) -> Case:
    normal = random_data(device)
    inputs = {f"gradient-{i}": normal(*shape, dtype=dtype, scale=1e-3) for i, shape in enumerate(sizes.layer)}
    return Case(sizes, dtype, inputs)


def _norm_call(function: Callable[[list[Tensor], torch.device], Tensor], case: Case) -> Call:
    return Call(lambda given: {"norm": function(list(given.values()), next(iter(given.values())).device)})


def _torch_norm(gradients: list[Tensor], _device: torch.device) -> Tensor:
    wide = torch.promote_types(gradients[0].dtype, torch.float32)
    norms = [torch.linalg.vector_norm(gradient, dtype=wide) for gradient in gradients]
    return torch.linalg.vector_norm(torch.stack(norms))


GRADIENT_NORM = Operator(
    name="gradient_norm",
    function="kernels.gradient_norm:gradient_norm",
    shape=_shape,
    case=_norm_case,
    call=_norm_call,
    # The norm itself is a float32.
    cost=lambda case, way: case.moved(" ".join(case.inputs)) + Cost(4),
    yardstick="torch vector_norm",
    directions=("forward",),
    compiled=False,
    per_tokens=False,
    peers=(
        Provider("torch.compile", lambda case: _norm_call(compiled(_torch_norm), case)),
        Provider("torch vector_norm", lambda case: _norm_call(_torch_norm, case)),
    ),
)
