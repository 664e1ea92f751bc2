"""The whole path on a CUDA device: the same losses as on the CPU, exact resume with split masters, generation."""

import json

import pytest
import torch

from engine.checkpoint import read_state
from model.generate import Sampling, generate
from model.mistral import packed_attention
from model.weights import load_model, read_tensors
from recipes import dpo, pretrain, sft

pytestmark = pytest.mark.gpu

STAGES = {"pretrain": pretrain, "sft": sft, "dpo": dpo}


def _losses(out):
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return torch.tensor([line["loss"] for line in lines if "loss" in line])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logits_equal_the_cpus(tiny_model, dtype):
    tokens = torch.randint(0, 340, (100,), generator=torch.Generator().manual_seed(0))
    bounds = torch.tensor([0, 30, 100], dtype=torch.int32)
    positions = torch.cat((torch.arange(30), torch.arange(70)))
    exact = load_model(tiny_model, dtype=torch.float64)
    with torch.no_grad():
        expected = exact.logits(exact(tokens, positions, packed_attention(bounds, 16)))
        errors = {}
        for device in ("cpu", "cuda"):
            model = load_model(tiny_model, dtype=dtype, device=device)
            attend = packed_attention(bounds.to(device), 16)
            logits = model.logits(model(tokens.to(device), positions.to(device), attend))
            errors[device] = (logits.cpu().double() - expected).abs().max()
    assert errors["cuda"] <= 2 * errors["cpu"] + 1e-6


@pytest.mark.parametrize("stage", STAGES)
def test_float32_training_follows_the_cpu(tiny_settings, tmp_path, stage):
    for device in ("cpu", "cuda"):
        STAGES[stage].run(tiny_settings(stage, tmp_path / device, device=device, dtype="float32"))
    torch.testing.assert_close(_losses(tmp_path / "cuda"), _losses(tmp_path / "cpu"), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("stage", STAGES)
def test_bfloat16_resumes_exactly(tiny_settings, tmp_path, stage):
    whole = STAGES[stage].run(tiny_settings(stage, tmp_path / "whole", device="cuda", checkpoint_every=3, keep_checkpoints=9))
    # The run as a kill after its third step would have left it.
    STAGES[stage].run(tiny_settings(stage, tmp_path / "resumed", device="cuda", checkpoint_every=3, keep_checkpoints=9))
    (tmp_path / "resumed" / "step-00000006").rename(tmp_path / "lost")
    resumed = STAGES[stage].run(tiny_settings(stage, tmp_path / "resumed", device="cuda", checkpoint_every=3))
    assert read_state(resumed).step == 6
    expected = dict(read_tensors(whole))
    for name, tensor in read_tensors(resumed):
        assert tensor.dtype == torch.bfloat16
        assert torch.equal(tensor, expected[name]), name


def test_greedy_generation_equals_the_cpus(tiny_model):
    prompt, sampling = [1, 50, 60, 70], Sampling(temperature=0, max_new_tokens=40)
    answers = [list(generate(load_model(tiny_model, device=device), prompt, sampling)) for device in ("cpu", "cuda")]
    assert answers[0] == answers[1]
