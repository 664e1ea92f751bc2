"""Of each operator, a module here of its name:

LAUNCHES: name -> function of (dtype, tokens) that launches kernels of the operator in the forms that training uses, with Shisa
7B's shapes, on tensors without data: what offline compilation builds.
MUTANTS: deliberately wrong kernels, (text, replacement). The operator's own tests must fail on each, or they prove nothing.
Each text stands exactly once in its module.
"""

import importlib
import pkgutil
from types import ModuleType

import torch

from model.config import preset

CONFIG = preset("shisa-7b")


def empty(*shape, dtype):
    """A tensor without data."""
    return torch.empty(shape, dtype=dtype, device="meta")


def cases() -> dict[str, ModuleType]:
    """The modules of all operators by name."""
    return {found.name: importlib.import_module(f"{__name__}.{found.name}") for found in pkgutil.iter_modules(__path__)}
