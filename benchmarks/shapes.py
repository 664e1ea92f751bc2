"""The model shapes that benchmarks know, and names of dtypes."""

import dataclasses

import torch

from model.config import MistralConfig, preset


def shape(name: str, layers: int = 0) -> MistralConfig:
    """The configuration of a preset. layers: instead of its own; 0 keeps them."""
    config = preset(name)
    return dataclasses.replace(config, num_hidden_layers=layers) if layers else config


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
