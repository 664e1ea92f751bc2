"""A model whose middle layer multiplies in FP8 while it trains."""

from dataclasses import replace
from typing import get_args

import pytest
import torch

import kernels.fp8_feed_forward
import kernels.fp8_linear
import kernels.fp8_norm_qkv
from kernels.recompute import Recompute
from model.config import MistralConfig
from model.mistral import Mistral, initialize, packed_attention

MODES = get_args(Recompute)
CONFIG = MistralConfig(
    vocab_size=64,
    unpadded_vocab_size=50,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=3,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=16,
    sliding_window=8,
    initializer_range=0.3,
)
LENGTHS = [5, 16, 11]


def made(dtype=torch.float32, fp8=range(1, 2), device="cpu", **changes):
    model = Mistral(replace(CONFIG, **changes))
    initialize(model, 3)
    model.fp8_layers = fp8
    return model.to(device=device, dtype=dtype)


def documents():
    draw = torch.Generator().manual_seed(0)
    return [torch.randint(0, CONFIG.unpadded_vocab_size, (length,), generator=draw) for length in LENGTHS]


def loss_of(model, texts):
    """Sum over the tokens of some documents in one packed row."""
    device = model.norm.weight.device
    tokens = torch.cat(texts).to(device)
    positions = torch.cat([torch.arange(len(text)) for text in texts]).to(device)
    bounds = torch.tensor([0, *(len(text) for text in texts)]).cumsum(0).to(torch.int32)
    hidden = model(tokens, positions, packed_attention(bounds, CONFIG.sliding_window))
    rows = torch.arange(len(tokens), dtype=torch.int32, device=device)
    targets = torch.cat([text.roll(-1) for text in texts]).to(device)
    return -model.log_probs(hidden, targets, rows).sum()


@pytest.mark.parametrize("kept", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_all_recompute_modes_give_the_same_bits(dtype, kept):
    runs = []
    for mode in MODES:
        model = made(dtype)
        model.recompute, model.weight_codes.keep = mode, kept
        with model.weight_codes.unchanged():
            for texts in (documents(), documents()[:2]):
                loss_of(model, texts).backward()
        runs.append([parameter.grad for parameter in model.parameters()])
    for run in runs[1:]:
        assert all(torch.equal(one, other) for one, other in zip(runs[0], run, strict=True))


@pytest.mark.parametrize("mode", MODES)
def test_codes_of_each_weight_are_made_once_a_step(mode, monkeypatch):
    made_of = []
    original = kernels.fp8_linear.matrix_codes
    monkeypatch.setattr(
        kernels.fp8_linear, "matrix_codes", lambda weight, **named: made_of.append(weight.shape) or original(weight, **named)
    )
    model = made()
    model.recompute = mode
    for _ in range(2):
        made_of.clear()
        with model.weight_codes.unchanged():
            for texts in (documents(), documents()[:1]):
                loss_of(model, texts).backward()
        assert made_of == [(64, 32), (32, 32), (96, 32), (32, 48)]


@pytest.mark.parametrize("mode", MODES)
def test_gradients_carry_their_codes_to_the_next_product(mode, monkeypatch):
    """Passes over rows: attention's output of each layer in FP8, and the gradient from the layer above, which is in bf16."""
    passes, found = [], []
    original = kernels.fp8_linear.row_codes
    monkeypatch.setattr(kernels.fp8_linear, "row_codes", lambda rows: passes.append(rows.shape) or original(rows))
    for expected in (2 + 1, 2 + 4):
        model = made(torch.bfloat16, range(1, 3), num_hidden_layers=4)
        model.recompute = mode
        passes.clear()
        loss_of(model, documents()).backward()
        assert len(passes) == expected + (2 if mode == "block" else 0)
        found.append([parameter.grad for parameter in model.parameters()])
        for module in (kernels.fp8_feed_forward, kernels.fp8_norm_qkv):
            monkeypatch.setattr(module, "carry_codes", lambda gradient, codes: None)
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


def test_only_training_uses_fp8():
    model, plain = made(), made(fp8=())
    assert not torch.equal(loss_of(model, documents()), loss_of(plain, documents()))
    model.eval()
    with torch.no_grad():
        assert torch.equal(loss_of(model, documents()), loss_of(plain, documents()))


def test_outputs_and_gradients_are_near_those_in_float32():
    """A loss within 1 %, and gradients within 15 %, in norm."""
    results = []
    for fp8 in (range(1, 2), ()):
        model = made(fp8=fp8, initializer_range=0.05)
        loss = loss_of(model, documents())
        results.append((loss, *torch.autograd.grad(loss, list(model.parameters()))))
    (loss, *found), (expected_loss, *expected) = results
    torch.testing.assert_close(loss, expected_loss, rtol=0.01, atol=0)
    for one, other in zip(found, expected, strict=True):
        assert 0 < (one - other).norm() < 0.15 * other.norm()


def gradients_of(model, packs):
    """Of the embedded tokens and of the matrices, where documents are cut into packs."""
    rows = []
    handle = model.embed_tokens.register_forward_hook(lambda module, given, out: rows.append(out) or out.retain_grad())
    model.zero_grad()
    for texts in packs:
        loss_of(model, texts).backward()
    handle.remove()
    return torch.cat([row.grad for row in rows]), model.layers[1].mlp.down_proj.weight.grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_documents_gradients_do_not_depend_on_its_pack(dtype):
    """Gradients of a document's rows have the same bits wherever they have the same bits without FP8; sums of the weights'
    gradients differ by roundings and by what a larger neighbour lets underflow."""
    one, two, three = documents()
    packs = [[[one, two, three]], [[one], [two, three]], [[one, two], [three]], [[one], [two], [three]]]
    found = [[gradients_of(made(dtype, fp8), pack) for pack in packs] for fp8 in (range(1, 2), ())]
    for (rows, weight), (plain_rows, _) in zip(*found, strict=True):
        same = (plain_rows == found[1][0][0]).all(dim=1)
        assert torch.equal(rows[same], found[0][0][0][same])
        assert same.float().mean() >= 0.5
        torch.testing.assert_close(weight, found[0][0][1], rtol=0.02, atol=0.02 * float(weight.abs().max()))


def test_another_documents_wrong_numbers_change_no_bit():
    """A token whose embedding is NaN makes its own document's rows NaN, and no others."""
    model = made()
    one, two, three = (text.clamp(max=48) for text in documents())
    two = torch.full_like(two, 49)
    expected = gradients_of(model, [[one, two, three]])[0]
    with torch.no_grad():
        model.embed_tokens.weight[49] = torch.nan
    rows = gradients_of(model, [[one, two, three]])[0]
    others = torch.cat((torch.arange(5), torch.arange(21, 32)))
    assert torch.equal(rows[others], expected[others])
    assert rows[5:21].isnan().all()


def test_a_step_through_the_kernels_is_near_the_references(triton_device):
    found = []
    for device in (triton_device, torch.device("cpu")):
        model = made(device=device)
        loss = loss_of(model, documents())
        found.append([loss.cpu(), *(grad.cpu() for grad in torch.autograd.grad(loss, list(model.parameters())))])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=0.05, atol=0.05 * float(other.abs().max()))
