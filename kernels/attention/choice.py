"""The names of the attention backends, apart from their code, so that settings load without torch."""

from typing import Literal

Backend = Literal["auto", "triton", "flash", "flex", "reference"]
"""auto: triton on CUDA except in float32, else reference. `kernels.attention.backends` computes with them."""
