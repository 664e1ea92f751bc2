"""The model shapes that benchmarks know, and dtypes by name."""

import dataclasses

import torch

from model.config import MistralConfig, preset


def shape(name: str, layers: int = 0) -> MistralConfig:
    """The configuration of a preset. layers: instead of its own; 0 keeps them."""
    config = preset(name)
    return dataclasses.replace(config, num_hidden_layers=layers) if layers else config


def dtype_of(name: str, device: torch.device) -> torch.dtype:
    """A dtype by its name; "auto" is what the recipes train in: bfloat16 on CUDA, float32 on a CPU."""
    if name == "auto":
        name = "bfloat16" if device.type == "cuda" else "float32"
    return getattr(torch, name)


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
