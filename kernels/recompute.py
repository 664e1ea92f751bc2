"""The modes of activation checkpointing."""

from typing import Literal

Recompute = Literal["none", "light", "ffn", "block"]
"""What the backward pass computes again, because the forward pass did not keep it:

    none    nothing
    light   norms and the product of SwiGLU: passes over memory, no matrix product
    ffn     as light, and the matrix product for gate and up
    block   everything but a block's input

The same functions compute it again, so loss and gradients are bit-identical in all modes.
"""
