"""Operators of the model and the optimizer: each a public function beside its eager reference and its Triton kernels.

Numerics: inputs and outputs keep their dtype; sums, exponentials and quotients are computed in `accumulation_dtype`.
"""

from __future__ import annotations

import sys
from functools import cache
from importlib import metadata, util
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

# Rows of a tile of the kernels' matrix products. Lengths are padded to whole tiles: rows that fill the last tile cost nothing.
TILE = 128


def padded_to_tiles(rows: int) -> int:
    """`rows`, rounded up to whole tiles."""
    return -(-rows // TILE) * TILE


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of reductions over `dtype`: float32, or float64 for float64."""
    import torch  # here, so that settings and help texts, which need this package's names, load without torch

    return torch.promote_types(dtype, torch.float32)


def in_dtype(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The tensor in a dtype. Unlike `Tensor.to`, no operation where it has it already.

    Where an autograd function returns a tensor that passed through an operation without effect, torch 2.11 compiles it to a
    function whose gradients are zero.
    """
    return tensor if tensor.dtype == dtype else tensor.to(dtype)


def __getattr__(name: str) -> Any:
    """A name of Hugging Face's package `kernels`, which this folder hides.

    `transformers` imports such names wherever that package is installed, and could load no model without them.
    """
    hidden = name == "__version__" or not (name.startswith("__") or util.find_spec(f"{__name__}.{name}"))
    package = _hugging_face() if hidden else None
    if package is None:
        raise AttributeError(f"module '{__name__}' has no attribute '{name}'")
    return getattr(package, name)


@cache
def _hugging_face() -> ModuleType | None:
    """Hugging Face's package, None where it is not installed. Its modules import one another, so they are found after ours."""
    try:
        folder = metadata.distribution("kernels").locate_file("kernels")
    except metadata.PackageNotFoundError:
        return None
    spec = util.spec_from_file_location(f"{__name__}.hugging_face", f"{folder}/__init__.py")
    if spec is None or spec.loader is None:
        return None
    __path__.append(str(folder))
    package = sys.modules[spec.name] = util.module_from_spec(spec)
    spec.loader.exec_module(package)
    return package
