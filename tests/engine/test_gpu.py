"""Training and generation on a CUDA device: losses as on the CPU, exact resume with split masters, no host syncs."""

import dataclasses
import json

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

import engine.observe.metrics
import engine.run
from engine.checkpoint.state import read_state
from engine.data.stream import step_stream
from engine.distributed.ranks import REPLICATE, SHARD, Ranks, leave
from engine.estimate.flops import product_ceiling
from engine.observe.profile import memory_curve
from engine.optim.adamw import AdamW
from engine.run import open_run
from model.generate import generate
from model.mistral import packed_attention
from model.sampling import Sampling
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
    # Without its last checkpoint the folder looks like a run that was killed after the third step.
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


@pytest.mark.parametrize("stage", STAGES)
def test_a_sharded_run_follows_the_unsharded(tiny_settings, tmp_path, monkeypatch, stage):
    """One rank with a mesh: FSDP2, NCCL and checkpoints of sharded tensors, as far as one GPU allows."""

    def join(device, settings, facts):
        dist.init_process_group(
            "cpu:gloo,cuda:nccl", store=dist.HashStore(), rank=0, world_size=1, device_id=torch.device("cuda", 0)
        )
        return Ranks(device, mesh=init_device_mesh("cuda", (1, 1), mesh_dim_names=(REPLICATE, SHARD)))

    finished = {}
    for name in ("whole", "sharded"):
        with monkeypatch.context() as patch:
            if name == "sharded":
                patch.setattr(engine.run, "join", join)
                # A mesh of one rank has no other rank to compare with.
                patch.setattr(engine.observe.metrics, "slowest", lambda waits: (0, 0.0))
            finished[name] = STAGES[stage].run(
                tiny_settings(stage, tmp_path / name, device="cuda", dtype="float32", step_size=8 if stage == "dpo" else 512)
            )
            leave()
    torch.testing.assert_close(_losses(tmp_path / "sharded"), _losses(tmp_path / "whole"), rtol=1e-5, atol=1e-5)
    expected = dict(read_tensors(finished["whole"]))
    for name, tensor in read_tensors(finished["sharded"]):
        torch.testing.assert_close(tensor, expected[name], rtol=1e-4, atol=1e-5, msg=name)
    assert read_state(finished["sharded"]).step == 6


@pytest.mark.parametrize("stage", STAGES)
def test_no_step_waits_for_the_device(tiny_settings, tmp_path, monkeypatch, stage):
    """Between log lines the host launches everything without a synchronisation, NEFTune and shared prompts included."""
    step, done = AdamW.step, []

    def watched(optimizer, *arguments):
        # Watch from the second step's update on: the first step may wait while it sets things up.
        updated = step(optimizer, *arguments)
        done.append(torch.cuda.get_sync_debug_mode())
        torch.cuda.set_sync_debug_mode("error" if len(done) < 5 else "default")
        return updated

    monkeypatch.setattr(AdamW, "step", watched)
    changes = {} if stage == "pretrain" else {"neftune_alpha": 5.0}
    settings = tiny_settings(
        stage, tmp_path / "run", device="cuda", heldout=[], log={"every": 6, "tensorboard": False}, **changes
    )
    try:
        STAGES[stage].run(settings)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert done == [0, 2, 2, 2, 2, 0]


def test_steps_arrive_on_the_device_while_it_computes(tiny_settings, tmp_path):
    """Batches copied ahead equal batches made on the spot, even when the device is far behind the host."""
    run = open_run(tiny_settings("dpo", tmp_path / "run", device="cuda"), ("preferences",), share_prompts=True)
    stream = step_stream(run.plan, 0, run.packing, device=run.device)
    for step in stream:
        torch.cuda._sleep(10_000_000)
        expected = run.step(step.index)
        for batch, made in zip(step.batches, expected.batches, strict=True):
            for field in dataclasses.fields(batch):
                ours, theirs = getattr(batch, field.name), getattr(made, field.name)
                if field.name == "attention":
                    ours, theirs = ours.work, theirs.work
                assert ours.is_cuda
                assert torch.equal(ours.cpu(), theirs), field.name


def test_a_profile_holds_kernels_and_the_allocators_history(tiny_settings, tmp_path):
    settings = tiny_settings("pretrain", tmp_path / "run", device="cuda", heldout=[], profile={"steps": [3]})
    pretrain.run(settings)
    folder = tmp_path / "run" / "profile" / "step-00000003" / "rank-0"
    trace = json.loads((folder / "trace.json").read_text())
    assert any(event.get("cat") == "kernel" for event in trace["traceEvents"])
    assert max(size for _, size in memory_curve(trace, cuda=True)) > 40_096 * 2
    snapshot = json.loads((folder / "memory.json").read_text())
    assert any(event["action"] == "alloc" for event in snapshot["device_traces"][0])
    shares = json.loads((folder / "time.json").read_text())["shares"]
    assert min(shares[name] for name in ("products", "our operators", "optimizer", "waiting")) > 0


def test_nvtx_ranges_change_nothing(tiny_settings, tmp_path):
    for tool in ("torch", "nvtx"):
        profile = {"steps": [3] if tool == "nvtx" else [], "tool": tool}
        pretrain.run(tiny_settings("pretrain", tmp_path / tool, device="cuda", heldout=[], profile=profile))
    assert torch.equal(_losses(tmp_path / "nvtx"), _losses(tmp_path / "torch"))


@pytest.mark.parametrize("stage", STAGES)
def test_a_step_is_replayed_to_the_bit(tiny_settings, tmp_path, capsys, stage):
    settings = tiny_settings(stage, tmp_path / "run", device="cuda", checkpoint_every=3, keep_checkpoints=9)
    STAGES[stage].run(settings)
    capsys.readouterr()
    STAGES[stage].run(dataclasses.replace(settings, replay=4))
    assert capsys.readouterr().out.count("the same)") >= 2


def test_the_share_of_the_ceiling_is_known(tiny_settings, tmp_path):
    pretrain.run(tiny_settings("pretrain", tmp_path / "run", device="cuda"))
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert all(0 < line["of_ceiling"] < 1 for line in lines if "loss" in line)
    assert 1e13 < product_ceiling(torch.device("cuda"), torch.bfloat16) < 3e15
