"""Activation checkpointing: all modes give the same bits, and each keeps only its own tensors."""

from dataclasses import replace
from typing import get_args

import pytest
import torch

from kernels.embedding import EmbeddingNoise
from kernels.launch import INTERPRETED
from kernels.recompute import Recompute
from model.config import MistralConfig
from model.mistral import Mistral, initialize, packed_attention
from tests.kernels.operations import Operations

CONFIG = MistralConfig(
    vocab_size=64,
    unpadded_vocab_size=50,
    hidden_size=16,
    intermediate_size=20,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=6,
    sliding_window=3,
    initializer_range=0.3,
)
MODES = get_args(Recompute)
# The interpreter rounds bfloat16 wrongly.
DTYPES = [torch.float32, torch.float16 if INTERPRETED else torch.bfloat16]
TOKENS = 9
SLOW_INTERPRETED = [pytest.mark.slow] if INTERPRETED else []


def made(config, dtype, device):
    model = Mistral(config)
    initialize(model, 3)
    return model.to(device=device, dtype=dtype)


def batch(device):
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, CONFIG.unpadded_vocab_size, (TOKENS,), generator=generator)
    lengths = torch.tensor([1, 5, 3])
    positions = torch.cat([torch.arange(length) for length in lengths])
    document = torch.repeat_interleave(torch.arange(3), lengths)
    noise = EmbeddingNoise(5.0, 1, 2, document.to(device), positions.to(device), lengths[document].to(device))
    rows = torch.tensor([3, 5, 8, -1], dtype=torch.int32)
    bounds = torch.tensor([0, 1, 6, 9], dtype=torch.int32)
    return *(tensor.to(device) for tensor in (tokens, positions, rows, bounds)), noise


def loss_of(model, device):
    tokens, positions, rows, bounds, noise = batch(device)
    hidden = model(tokens, positions, packed_attention(bounds, CONFIG.sliding_window), noise)
    return model.log_probs(hidden, tokens.roll(-1), rows).sum()


@pytest.mark.parametrize("dtype", DTYPES)
def test_loss_and_gradients_are_bit_identical_in_all_modes(dtype, device):
    model = made(CONFIG, dtype, device)
    runs = {}
    for mode in MODES:
        model.recompute = mode
        loss = loss_of(model, device)
        runs[mode] = [loss, *torch.autograd.grad(loss, list(model.parameters()))]
    assert all(gradient.isfinite().all() and gradient.any() for gradient in runs["none"])
    for mode in MODES[1:]:
        assert all(torch.equal(one, other) for one, other in zip(runs["none"], runs[mode], strict=True)), mode


# The sums are made by torch's products, not by our kernels: in the interpreter the test is slow and finds little.
@pytest.mark.parametrize("gradients", [pytest.param(name, marks=SLOW_INTERPRETED) for name in ("parameter", "float32")])
def test_sums_over_micro_batches_are_bit_identical_in_all_modes(gradients, device):
    sums = {}
    for mode in MODES:
        model = made(CONFIG, DTYPES[1], device)
        model.recompute = mode
        for parameter in model.parameters():
            parameter.grad_dtype = torch.float32 if gradients == "float32" else parameter.dtype
        for _ in range(2):
            loss_of(model, device).backward()
        sums[mode] = [parameter.grad for parameter in model.parameters()]
    for mode in MODES[1:]:
        assert all(torch.equal(one, other) for one, other in zip(sums["none"], sums[mode], strict=True)), mode


@pytest.mark.parametrize("mode", ["none", "light"])
def test_frozen_blocks_pass_gradients_on_and_get_none(mode, device):
    """As in a distillation of new rows: 4 input gradients a layer, and no product for a weight."""
    model = made(CONFIG, torch.float32, device)
    model.recompute = mode
    products = []
    for frozen in (False, True):
        model.layers.requires_grad_(not frozen)
        # Attention is replaced, because its products would be counted too.
        tokens, positions, *_ = batch(device)
        loss = model(tokens, positions, lambda layer, query, key, value: query + key + value).sum()
        with Operations() as counted:
            loss.backward()
        products.append(counted.products)
    assert products == [8 * CONFIG.num_hidden_layers, 4 * CONFIG.num_hidden_layers]
    assert model.embed_tokens.weight.grad.any()


def kept_elements(layers, mode, device):
    """Elements that a model's blocks keep for their backward pass; attention is replaced and keeps nothing."""
    model = made(replace(CONFIG, num_hidden_layers=layers), torch.float32, device)
    model.recompute = mode
    tokens, positions, *_ = batch(device)
    others = {parameter.data_ptr() for parameter in model.parameters()}
    kept = {}
    with torch.autograd.graph.saved_tensors_hooks(lambda saved: kept.setdefault(saved.data_ptr(), saved), lambda saved: saved):
        model(tokens, positions, lambda layer, query, key, value: 2 * query)
    # Rotary tables serve all layers.
    return sum(
        saved.numel() for at, saved in kept.items() if at not in others and saved.shape != (TOKENS, CONFIG.head_dim // 2)
    )


@pytest.mark.parametrize("mode", MODES)
def test_a_layer_keeps_the_tensors_of_its_mode(mode, device):
    width, attended, wide = CONFIG.hidden_size, CONFIG.num_attention_heads * CONFIG.head_dim, CONFIG.intermediate_size
    # The stream before attention and before the feed-forward network, two scales of norms, attention's output.
    least = 2 * width + 2 + attended
    expected = {"none": least + 2 * width + 3 * wide, "light": least + 2 * wide, "ffn": least, "block": width}[mode]
    assert kept_elements(3, mode, device) - kept_elements(2, mode, device) == TOKENS * expected


def test_a_step_through_the_kernels_equals_the_references(triton_device):
    """A whole model, forward and backward, in float32 against the references in float64."""
    model = made(CONFIG, torch.float32, triton_device)
    loss = loss_of(model, triton_device)
    found = torch.autograd.grad(loss, list(model.parameters()))
    exact = made(CONFIG, torch.float32, triton_device).double()
    exact_loss = loss_of(exact, triton_device)
    expected = torch.autograd.grad(exact_loss, list(exact.parameters()))
    torch.testing.assert_close(loss.double(), exact_loss, rtol=1e-5, atol=1e-5)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one.double(), other, rtol=1e-3, atol=1e-5 * float(other.abs().max()))
