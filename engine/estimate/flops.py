"""Floating-point operations of a training step: matrix products and attention, counted exactly.

Attention counts the pairs that it really computes (causal, window, documents); the head counts the rows that reach it. The
embedding look-up costs nothing. A multiply-add is 2 operations.
"""

import itertools
import statistics

import torch

from engine.data.batch import Step
from engine.observe.timing import mark, seconds_between
from kernels.recompute import Recompute
from model.config import MistralConfig

# Dense bf16 TFLOP/s as published by the maker, by a part of the device's name; the first match counts. The utilisation of an
# unknown device reads n/a, which is better than a guess.
_PEAK_TFLOPS = (
    ("H100 PCIe", 756.0),
    ("H100 NVL", 835.0),
    ("H100", 989.4),
    ("H200 NVL", 835.0),
    ("H200", 989.4),
    ("GH200", 989.4),
    ("B200", 2250.0),
    ("A100", 312.0),
    ("A800", 312.0),
    ("L40S", 362.0),
    ("RTX 4090", 165.2),
    ("RTX 3090", 71.0),
)


def training_flops(config: MistralConfig, *, tokens: int, rows: int, pairs: int, fp8_layers: int = 0) -> int:
    """Operations of forward and backward: three times the forward products.

    Args:
        tokens: through the blocks; rows: through the head; pairs: (query, key) pairs, from `attended_pairs`.
        fp8_layers: layers whose linear maps multiply in FP8. Their operations count half, as the peak of FP8 is twice as high.
    """
    query_width = config.num_attention_heads * config.head_dim
    kv_width = config.num_key_value_heads * config.head_dim
    per_token = config.hidden_size * (2 * query_width + 2 * kv_width + 3 * config.intermediate_size)
    forward = (2 * config.num_hidden_layers - fp8_layers) * tokens * per_token
    forward += 4 * config.num_hidden_layers * pairs * query_width
    forward += 2 * rows * config.hidden_size * config.unpadded_vocab_size
    return 3 * forward


def step_flops(config: MistralConfig, step: Step, fp8_layers: int = 0) -> int:
    """Operations of a step, of all ranks together; those in FP8 count half."""
    return training_flops(config, tokens=step.tokens, rows=step.trained, pairs=step.attended, fp8_layers=fp8_layers)


def recomputed_flops(config: MistralConfig, *, tokens: int, pairs: int, recompute: Recompute, fp8_layers: int = 0) -> int:
    """Operations that activation checkpointing repeats in the backward pass; those in FP8 count half.

    Args: tokens: through the blocks; pairs: (query, key) pairs, from `attended_pairs`; recompute: the model's mode.
    """
    gate_up = (2 * config.num_hidden_layers - fp8_layers) * tokens * config.hidden_size * 2 * config.intermediate_size
    if recompute == "block":
        # The whole forward pass of a block: a third of its training operations.
        return training_flops(config, tokens=tokens, rows=0, pairs=pairs, fp8_layers=fp8_layers) // 3
    return gate_up if recompute == "ffn" else 0


def product_ceiling(device: torch.device, dtype: torch.dtype) -> float | None:
    """Operations a second that a CUDA device reaches now in a large product of random numbers.

    Takes some ten milliseconds and 0.4 GiB. None on a CPU, where other processes would decide the result.
    """
    if device.type != "cuda":
        return None
    size, repeats = 8192, 10
    left, right = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    out = torch.empty_like(left)
    marks = []
    for _ in range(repeats + 1):
        torch.mm(left, right, out=out)
        marks.append(mark(device))
    torch.cuda.synchronize(device)
    seconds = statistics.median(itertools.starmap(seconds_between, itertools.pairwise(marks)))
    del left, right, out
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    return 2 * size**3 / seconds


def peak_flops(device: torch.device) -> float | None:
    """Published dense bf16 operations a second of a CUDA device, None for an unknown device."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((tflops * 1e12 for part, tflops in _PEAK_TFLOPS if part in name), None)
