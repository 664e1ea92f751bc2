"""SwiGLU (Shazeer 2020, https://arxiv.org/abs/2002.05202): silu(gate) * up.

Shapes: T tokens, F feed-forward size.
"""

import torch.nn.functional as F
from torch import Tensor

from kernels import accumulation_dtype


def swiglu(gate_up_TF2: Tensor) -> Tensor:
    """silu(gate) * up of a packed product.

    Args: gate_up_TF2 [T, 2F], the gate in the first F columns, the up projection in the last F.
    Returns: [T, F] in the same dtype, computed in float32 and rounded once.
    """
    return swiglu_reference(gate_up_TF2)


def swiglu_reference(gate_up_TF2: Tensor) -> Tensor:
    gate_TF, up_TF = gate_up_TF2.to(accumulation_dtype(gate_up_TF2.dtype)).chunk(2, dim=-1)
    return (F.silu(gate_TF) * up_TF).to(gate_up_TF2.dtype)
