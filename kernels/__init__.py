"""Operators of the model and the optimizer: one public function each, beside its eager reference.

Floating-point convention: inputs and outputs keep their dtype; whatever is summed, exponentiated or divided is computed in
`accumulation_dtype`, float32 for anything narrower.
"""

import torch


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype that reductions over `dtype` are computed in: float32, or float64 for float64."""
    return torch.promote_types(dtype, torch.float32)
