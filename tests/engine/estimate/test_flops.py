"""The operations of a step against brute force and torch's own count of the same products."""

from dataclasses import replace
from typing import get_args

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from engine.estimate.flops import peak_flops, recomputed_flops, training_flops
from kernels.attention.work import attended_pairs, attention_work, pairs_of
from kernels.recompute import Recompute
from model.config import PRESETS, MistralConfig
from model.mistral import Mistral, initialize

CONFIG = MistralConfig(
    vocab_size=24,
    unpadded_vocab_size=21,
    hidden_size=12,
    intermediate_size=20,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=6,
)


@given(st.lists(st.integers(0, 40), max_size=5), st.none() | st.integers(1, 50))
def test_attended_pairs_by_brute_force(lengths, window):
    expected = 0
    for length in lengths:
        for query in range(length):
            expected += sum(key <= query and (window is None or query - window < key) for key in range(length))
    assert attended_pairs(lengths, window) == expected


@given(
    prompt=st.integers(0, 12),
    answers=st.lists(st.integers(0, 12), max_size=3),
    alone=st.integers(0, 12),
    window=st.none() | st.integers(1, 30),
)
def test_pairs_of_shared_prompts_by_brute_force(prompt, answers, alone, window):
    """A prompt, answers that continue it, and another document."""
    expected = attended_pairs([prompt, alone], window)
    for answer in answers:
        for query in range(prompt, prompt + answer):
            expected += sum(key <= query and (window is None or query - window < key) for key in range(prompt + answer))
    bounds = torch.tensor([0, prompt, *answers, alone]).cumsum(0).tolist()
    work = attention_work(bounds, window, prefixes=[-1, *[0] * len(answers), -1])
    assert pairs_of(work) == expected


@pytest.mark.parametrize("window", [3, None])
@pytest.mark.parametrize(
    ("lengths", "prefixes"), [([7, 1, 4], [-1, -1, -1]), ([4, 3, 2, 3], [-1, 0, 0, -1])], ids=["documents", "shared prompt"]
)
def test_training_flops_equal_torchs_count(lengths, prefixes, window):
    """The counted model multiplies each query with the keys that it sees: of its own document and its shared prompt."""
    config = replace(CONFIG, num_hidden_layers=2, sliding_window=window)
    rows = [0, 3, 4, 9, 11]
    bounds = torch.tensor([0, *lengths]).cumsum(0).tolist()
    seen = []
    for start, end, prefix in zip(bounds, bounds[1:], prefixes, strict=False):
        before = list(range(bounds[prefix], bounds[prefix + 1])) if prefix >= 0 else []
        seen += [[*before, *range(start, place + 1)][-(window or 99) :] for place in range(start, end)]

    def weight(inputs, outputs):
        return torch.randn(inputs, outputs, requires_grad=True)

    head = weight(12, 21)
    shapes = [(12, 24), (12, 12), (12, 12), (24, 12), (12, 20), (12, 20), (20, 12)]  # q, k, v, o, gate, up, down
    layers = [[weight(*shape) for shape in shapes] for _ in range(2)]
    hidden = torch.randn(sum(lengths), 12, requires_grad=True)
    with FlopCounterMode(display=False) as counter:
        state = hidden
        for q, k, v, o, gate, up, down in layers:
            query = (state @ q).unflatten(1, (4, 6))
            key, value = ((state @ projection).unflatten(1, (2, 6)) for projection in (k, v))
            outputs = []
            for place, keys in enumerate(seen):
                heads = []
                for head_index in range(4):
                    scores = query[place, head_index][None] @ key[keys, head_index // 2].T
                    heads.append(scores.softmax(-1) @ value[keys, head_index // 2])
                outputs.append(torch.cat(heads, dim=1))
            state = state + torch.cat(outputs) @ o
            state = state + ((state @ gate) * (state @ up)) @ down
        (state[rows] @ head).sum().backward()
    work = attention_work(bounds, window, prefixes=prefixes)
    found = training_flops(config, tokens=12, rows=len(rows), pairs=pairs_of(work))
    assert found == counter.get_total_flops()


def test_shisa_7b_takes_the_designs_operations_a_token():
    """7.471 billion parameters in products, 6 operations each; attention at 4096 tokens: 3.22 GFLOP a token."""
    config = PRESETS["shisa-7b"]
    linear = training_flops(config, tokens=1, rows=1, pairs=0)
    in_products = config.parameters - (2 * 32 + 1) * 4096 - config.vocab_size * 4096 - 64 * 4096
    assert linear == 6 * in_products
    assert linear == pytest.approx(44.83e9, rel=1e-3)
    whole = training_flops(config, tokens=4096, rows=4096, pairs=attended_pairs([4096], 4096)) / 4096
    assert whole - linear == pytest.approx(3.22e9, rel=1e-3)


@pytest.mark.parametrize(
    ("name", "tflops"),
    [
        ("NVIDIA H200", 989.4),
        ("NVIDIA H200 NVL", 835.0),
        ("NVIDIA H100 80GB HBM3", 989.4),
        ("NVIDIA H100 PCIe", 756.0),
        ("NVIDIA GH200 480GB", 989.4),
        ("NVIDIA A100-SXM4-80GB", 312.0),
        ("NVIDIA GeForce RTX 4090", 165.2),
        ("NVIDIA Imaginary 9000", None),
    ],
)
def test_a_devices_peak_is_found_by_its_name_and_never_guessed(monkeypatch, name, tflops):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    found = peak_flops(torch.device("cuda"))
    assert found == (None if tflops is None else tflops * 1e12)
    assert peak_flops(torch.device("cpu")) is None


@pytest.mark.parametrize("mode", ["light", "ffn", "block"])
def test_recomputed_flops_equal_torchs_count(mode):
    """The counted model's attention has no matrix products."""
    config = replace(CONFIG, num_hidden_layers=3)
    model = Mistral(config)
    initialize(model, 0)
    tokens = torch.arange(11)

    def counted(recompute):
        model.recompute = recompute
        with FlopCounterMode(display=False) as counter:
            model(tokens, tokens, lambda layer, query, key, value: 2 * query + (key + value).sum()).sum().backward()
        return counter.get_total_flops()

    expected = recomputed_flops(config, tokens=len(tokens), pairs=0, recompute=mode)
    assert counted(mode) - counted("none") == expected
    assert (expected == 0) == (mode == "light")


@pytest.mark.parametrize("mode", get_args(Recompute))
def test_operations_in_fp8_count_half(mode):
    """Of the linear maps of 30 layers; attention and head count whole."""
    config = PRESETS["shisa-7b"]
    linear = 30 * 4096 * (6144 + 4096 + 3 * 14336)
    sizes = {"tokens": 100, "rows": 50, "pairs": 700}
    whole, halved = (training_flops(config, **sizes, fp8_layers=layers) for layers in (0, 30))
    assert whole - halved == 3 * 100 * linear
    again = [recomputed_flops(config, tokens=100, pairs=700, recompute=mode, fp8_layers=layers) for layers in (0, 30)]
    repeated = {"none": 0, "light": 0, "ffn": 30 * 4096 * 2 * 14336, "block": linear}
    assert again[0] - again[1] == 100 * repeated[mode]
