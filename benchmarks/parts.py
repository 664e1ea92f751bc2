"""Which parts of the engine exist: found by looking, so that a column or row fills by itself once its part is there."""

import importlib
import importlib.util
import typing
from collections.abc import Callable, Iterable, Iterator
from dataclasses import fields

import torch

from engine.observe.profile import OPERATORS
from engine.settings.training import TrainSettings

# torch.compile over each block, around the operators: beside all parts, as the engine does not use it.
COMPILED = "compiled blocks"
LADDER = ("eager", "fused operators", "attention", "fused head", "light recompute", "fused optimizer", COMPILED)


def reference_name(name: str) -> str:
    """The eager reference of an operator: rms_norm -> rms_norm_reference, adamw_ -> adamw_reference_."""
    return f"{name.removesuffix('_')}_reference{'_' if name.endswith('_') else ''}"


def is_fused(module: str, name: str) -> bool:
    """Whether an operator does anything but call its reference."""
    function = getattr(importlib.import_module(module), name)
    return bool(set(function.__code__.co_names) - {reference_name(name)})


def missing_part(part: str, device: str) -> str | None:
    """Why a part of the ladder cannot be measured; None where it can."""
    if part == COMPILED:
        return None if device == "cuda" else "compiling takes a CPU minutes"
    if part == "light recompute":
        return missing_setting("recompute", "light")
    if part == "eager" or any(is_fused(*operator) for operator in OPERATORS[part]):
        return None
    return "only the eager reference exists"


def missing_setting(name: str, value: str) -> str | None:
    """Why the engine cannot be told `name = value`; None where it can. An empty value asks for nothing."""
    if not value:
        return None
    if name not in {field.name for field in fields(TrainSettings)}:
        return f"the engine has no {name} setting yet"
    allowed = typing.get_args(typing.get_type_hints(TrainSettings)[name])
    return None if not allowed or value in allowed else f"{name} = {value} is not one of {', '.join(map(str, allowed))}"


def missing_ranks(ranks: int, device: torch.device) -> str | None:
    """Why as many ranks cannot be measured together on this machine; None where they can."""
    if device.type != "cuda" or ranks <= torch.cuda.device_count():
        return None
    return f"this machine has {torch.cuda.device_count()} GPUs"


def references(parts: Iterable[str]) -> Iterator[tuple[Callable, Callable]]:
    """(operator, its eager reference) of these parts, for `replaced`."""
    for part in parts:
        for module_name, name in OPERATORS.get(part, ()):
            module = importlib.import_module(module_name)
            yield getattr(module, name), getattr(module, reference_name(name))
