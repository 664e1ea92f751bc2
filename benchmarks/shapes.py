"""The model shapes that benchmarks know: the engine's presets, and a small one that a CPU computes in seconds."""

import dataclasses

import torch

from model.config import MistralConfig, preset

SMALL = MistralConfig(
    hidden_size=256,
    intermediate_size=704,
    num_hidden_layers=4,
    num_attention_heads=8,
    num_key_value_heads=2,
    head_dim=32,
    max_position_embeddings=4096,
)


def shape(name: str, layers: int = 0) -> MistralConfig:
    """The configuration of a preset or of "small". layers: instead of its own; 0 keeps them."""
    config = SMALL if name == "small" else preset(name)
    return dataclasses.replace(config, num_hidden_layers=layers) if layers else config


def dtype_of(name: str, device: torch.device) -> torch.dtype:
    """A dtype by its name; "auto" is what the recipes train in: bfloat16 on CUDA, float32 on a CPU."""
    if name == "auto":
        name = "bfloat16" if device.type == "cuda" else "float32"
    return getattr(torch, name)


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
