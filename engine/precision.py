"""Which layers of a run multiply in FP8, and why a run cannot."""

import torch

from engine.settings.training import TrainSettings
from kernels.fp8 import MULTIPLE
from model.config import MistralConfig

# Compute capability of the first GPUs whose tensor cores multiply E4M3.
_CAPABILITY = (8, 9)


def fp8_layers(settings: TrainSettings, config: MistralConfig) -> range:
    """The layers whose matrix products run in FP8 while training; none with precision = dtype.

    Raises: ValueError where no layer remains, and for a model whose sizes FP8 products do not take.
    """
    if settings.precision != "fp8":
        return range(0)
    count, chosen = config.num_hidden_layers, settings.fp8
    layers = chosen.layers(count)
    if not layers:
        raise ValueError(
            f"precision = fp8: fp8.bf16_first = {chosen.bf16_first} and fp8.bf16_last = {chosen.bf16_last} leave none of the "
            f"model's {count} layers to FP8; lower them"
        )
    query_width = config.num_attention_heads * config.head_dim
    sizes = {
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_attention_heads * head_dim": query_width,
        "(num_attention_heads + 2 num_key_value_heads) * head_dim": query_width
        + 2 * config.num_key_value_heads * config.head_dim,
    }
    for name, size in sizes.items():
        if size % MULTIPLE:
            raise ValueError(
                f"precision = fp8: the model's {name} = {size} is not a multiple of {MULTIPLE}; use precision = dtype"
            )
    return layers


def check_fp8(device: torch.device, dtype: torch.dtype) -> None:
    """Raises: ValueError for parameters or a device that FP8 products do not take. A CPU takes all."""
    if device.type != "cuda":
        return
    if dtype != torch.bfloat16:
        raise ValueError(f"precision = fp8: needs dtype = bfloat16 on CUDA, this is {dtype}".replace("torch.", ""))
    found, name = torch.cuda.get_device_capability(device), torch.cuda.get_device_name(device)
    if found < _CAPABILITY:
        raise ValueError(
            f"precision = fp8: needs a GPU of compute capability 8.9 or newer (H100: 9.0), {name} has {found[0]}.{found[1]}; "
            "use precision = dtype"
        )
