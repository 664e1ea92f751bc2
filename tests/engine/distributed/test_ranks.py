"""Training does not depend on how it is spread over processes: whole runs on 1, 2, 3 and 4 ranks, over gloo on the CPU."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

ROOT = Path(__file__).resolve().parents[2]
STEPS = 20
STAGES = ("pretrain", "sft", "dpo")
# Ranks and replicas. The tiny model's rows do not divide by 3.
LAYOUTS = {"1": (1, 1), "2": (2, 1), "3": (3, 1), "4": (4, 1), "2 x 2": (4, 2)}
# About four micro-batches in a step, which three ranks cannot share evenly.
SIZES = {"pretrain": {"step_size": 256, "pack_tokens": 64}, "sft": {"step_size": 256, "pack_tokens": 64},
         "dpo": {"step_size": 4, "pack_tokens": 64}}  # fmt: skip


@pytest.fixture(scope="module")
def runs(tiny_model, tiny_data, tmp_path_factory):
    """runs[layout, stage, dtype] -> (losses, weights) of a run of 20 steps."""
    folder = tmp_path_factory.mktemp("ranks")

    def settings(stage: str, layout: str, dtype: str) -> dict:
        data = {"pretrain": tiny_data.text, "sft": tiny_data.conversations, "dpo": tiny_data.preferences}[stage]
        return {
            "model": str(tiny_model), "out": str(folder / f"{layout} {stage} {dtype}"), "sources": [{"path": str(data)}],
            "heldout": [str(getattr(tiny_data, f"{data.name}_heldout"))], "context_length": 32 if stage == "pretrain" else 64,
            "steps": STEPS, "device": "cpu", "dtype": dtype, "schedule": {"peak": 1e-3, "warmup_steps": 2},
            "optimizer": {"eps": 1e-6}, "log": {"every": 5, "tensorboard": False},
            "parallel": {"replicas": LAYOUTS[layout][1], "timeout": 120.0}, **SIZES[stage],
            **({} if stage == "pretrain" else {"neftune_alpha": 5.0}),
        }  # fmt: skip

    jobs: dict[int, list] = {}
    for layout, (ranks, _) in LAYOUTS.items():
        kinds = [(stage, "float32") for stage in STAGES] + [("sft", "bfloat16")] * (layout in ("1", "4"))
        jobs.setdefault(ranks, []).extend([stage, settings(stage, layout, dtype)] for stage, dtype in kinds)
    (folder / "jobs.json").write_text(json.dumps(list(jobs.items())))
    done = subprocess.run(
        [sys.executable, "-m", "tests.engine.several_ranks", str(folder / "jobs.json")], check=False, cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "TRITON_INTERPRET": "0"}, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, text=True, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-6000:]

    def read(layout: str, stage: str, dtype: str = "float32"):
        out = folder / f"{layout} {stage} {dtype}"
        lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
        return lines, load_file(out / f"step-{STEPS:08d}" / "model-00001-of-00001.safetensors")

    return read


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("layout", [layout for layout in LAYOUTS if layout != "1"])
def test_the_trajectory_is_that_of_one_rank(runs, layout, stage):
    (lines, weights), (expected_lines, expected) = runs(layout, stage), runs("1", stage)
    assert len(lines) == len(expected_lines) == STEPS + 2  # held-out values before the first and after the last step
    for line, one in zip(lines, expected_lines, strict=True):
        for name in ("step", "tokens", "learning_rate"):
            assert line.get(name) == one.get(name)
        for name in one:
            if "loss" in name or name == "gradient_norm":
                assert line[name] == pytest.approx(one[name], rel=1e-6), (line["step"], name)
            elif name.startswith(("rewards/", "logps/")):
                assert line[name] == pytest.approx(one[name], rel=1e-4, abs=1e-5), (line["step"], name)
    assert weights.keys() == expected.keys()
    for name, tensor in weights.items():
        torch.testing.assert_close(tensor, expected[name], rtol=0, atol=1e-6)
    assert not torch.equal(expected["model.norm.weight"], torch.ones_like(expected["model.norm.weight"]))


def test_every_group_of_a_mesh_waits_as_long_as_the_settings_say():
    code = (
        "import torch\n"
        "from engine.distributed.ranks import ParallelSettings, join\n"
        "from tests.engine.forked_ranks import end_of, fork_ranks\n"
        "def body(rank):\n"
        "    mesh = join(torch.device('cpu'), ParallelSettings(replicas=2, timeout=7.0)).mesh\n"
        "    groups = [mesh.get_group(name)._get_backend(torch.device('cpu')) for name in ('replicate', 'shard')]\n"
        "    assert [(group.size(), group.options._timeout.seconds) for group in groups] == [(2, 7), (2, 7)]\n"
        "raise SystemExit(any(end_of(fork_ranks(4, body))))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], check=False, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-4000:]


def test_bfloat16_differs_by_roundings(runs):
    """Gradients are rounded to bfloat16 after each micro-batch on one rank, once a step on several."""
    (lines, weights), (expected_lines, expected) = runs("4", "sft", "bfloat16"), runs("1", "sft", "bfloat16")
    for line, one in zip(lines, expected_lines, strict=True):
        if "loss" in line:
            assert line["loss"] == pytest.approx(one["loss"], rel=2e-3)
    for name, tensor in weights.items():
        assert (tensor.float() - expected[name].float()).abs().max() <= 2**-7, name
