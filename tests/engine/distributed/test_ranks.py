"""Training gives the same trajectory on any number of ranks: whole runs on 1 to 4 ranks, over gloo on the CPU."""

import json
import shutil
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from safetensors.torch import load_file

STAGES = ("pretrain", "sft", "dpo")
# About four micro-batches in a step, which three ranks cannot share evenly.
SIZES = {"pretrain": {"step_size": 256}, "sft": {"step_size": 256}, "dpo": {"step_size": 4}}
TIMEOUT = 120.0


class Layout(NamedTuple):
    ranks: int
    replicas: int
    once: bool = False  # gradients are reduced once a step, not after each micro-batch


ONE, TWO, THREE, FOUR, TWO_BY_TWO = Layout(1, 1), Layout(2, 1), Layout(3, 1), Layout(4, 1), Layout(4, 2)
THREE_ONCE, TWO_BY_TWO_ONCE = THREE._replace(once=True), TWO_BY_TWO._replace(once=True)


class Trajectory(NamedTuple):
    lines: list[dict]  # of metrics.jsonl
    weights: dict[str, torch.Tensor]
    out: Path


def trajectory(out: Path, steps: int) -> Trajectory:
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return Trajectory(lines, load_file(out / f"step-{steps:08d}" / "model-00001-of-00001.safetensors"), out)


@pytest.fixture(scope="module")
def trajectories(tiny_model, tiny_data, tmp_path_factory, run_ranks):
    """trajectories(steps, {layout: [(stage, dtype), ...]}, **settings) -> {(layout, stage, dtype): Trajectory}, all output."""

    def settings(out, steps: int, layout: Layout, stage: str, dtype: str) -> dict:
        data = {"pretrain": tiny_data.text, "sft": tiny_data.conversations, "dpo": tiny_data.preferences}[stage]
        return {
            "model": str(tiny_model),
            "out": str(out),
            "sources": [{"path": str(data)}],
            "heldout": [str(getattr(tiny_data, f"{data.name}_heldout"))],
            "context_length": 32 if stage == "pretrain" else 64,
            "pack_tokens": 64,
            "steps": steps,
            "device": "cpu",
            "dtype": dtype,
            "schedule": {"peak": 1e-3, "warmup_steps": 2},
            "optimizer": {"eps": 1e-6},
            "log": {"every": 5, "tensorboard": False},
            "parallel": {"replicas": layout.replicas, "reduce_once": layout.once, "timeout": TIMEOUT},
            **SIZES[stage],
            **({} if stage == "pretrain" else {"neftune_alpha": 5.0}),
        }

    def run(steps: int, wanted: dict[Layout, list[tuple[str, str]]], **changes):
        folder = tmp_path_factory.mktemp("ranks")
        outs, jobs = {}, {}
        for layout, runs in wanted.items():
            name = f"{layout.ranks}-ranks-{layout.replicas}-replicas"
            jobs.setdefault(name, {"ranks": layout.ranks, "runs": []})
            for stage, dtype in runs:
                out = outs[layout, stage, dtype] = folder / f"{name}-{'once-' * layout.once}{stage}-{dtype}"
                jobs[name]["runs"].append([stage, settings(out, steps, layout, stage, dtype) | changes])
        ended = run_ranks(jobs)
        for job in ended.values():
            assert not any(job.codes), job.said[-6000:]

        return {key: trajectory(out, steps) for key, out in outs.items()}, "".join(job.said for job in ended.values())

    return run


@pytest.fixture(scope="module")
def short(trajectories):
    """Every objective on three ranks, whose shards of the tiny model are uneven; SFT also in two replicas of two shards."""
    every = [*((stage, "float32") for stage in STAGES), ("sft", "bfloat16")]
    exact = [("sft", "float32")]
    return trajectories(
        6, {ONE: every, THREE: every, THREE_ONCE: every[-2:], TWO_BY_TWO: exact, TWO_BY_TWO_ONCE: [("pretrain", "float32")]}
    )


def assert_same(found: Trajectory, expected: Trajectory, steps: int) -> None:
    # Validation comes before the first step and after the last.
    assert len(found.lines) == len(expected.lines) == steps + 2
    for line, one in zip(found.lines, expected.lines, strict=True):
        for name in ("step", "tokens", "learning_rate"):
            assert line.get(name) == one.get(name)
        for name in one:
            if "loss" in name or name == "gradient_norm":
                assert line[name] == pytest.approx(one[name], rel=1e-6), (line["step"], name)
            elif name.startswith(("rewards/", "logps/")):
                assert line[name] == pytest.approx(one[name], rel=1e-4, abs=1e-5), (line["step"], name)
    assert found.weights.keys() == expected.weights.keys()
    for name, tensor in found.weights.items():
        torch.testing.assert_close(tensor, expected.weights[name], rtol=0, atol=1e-6)
    assert not torch.equal(expected.weights["model.norm.weight"], torch.ones_like(expected.weights["model.norm.weight"]))


@pytest.mark.parametrize(
    ("layout", "stage"),
    [*((THREE, stage) for stage in STAGES), (TWO_BY_TWO, "sft"), (TWO_BY_TWO_ONCE, "pretrain")],
    ids=lambda value: str(value),
)
def test_several_ranks_follow_a_single_rank(short, layout, stage):
    found, _ = short
    assert_same(found[layout, stage, "float32"], found[ONE, stage, "float32"], steps=6)


def test_bfloat16_differs_by_roundings(short):
    """One rank rounds its gradients to bfloat16 after each micro-batch, several ranks round theirs once a step."""
    found, _ = short
    several, one = (found[layout, "sft", "bfloat16"] for layout in (THREE, ONE))
    for line, expected in zip(several.lines, one.lines, strict=True):
        if "loss" in line:
            assert line["loss"] == pytest.approx(expected["loss"], rel=2e-3)
    for name, tensor in several.weights.items():
        assert (tensor.float() - one.weights[name].float()).abs().max() <= 2**-7, name


def test_reducing_once_differs_by_float32_roundings(short):
    """Both ways sum in float32 and round a step's gradient once, in another order."""
    found, _ = short
    each, once = (found[layout, "sft", "bfloat16"] for layout in (THREE, THREE_ONCE))
    for line, other in zip(each.lines, once.lines, strict=True):
        for name in {"loss", "gradient_norm"} & line.keys():
            assert line[name] == pytest.approx(other[name], rel=1e-3)
    for name, tensor in each.weights.items():
        other = once.weights[name]
        assert (tensor != other).float().mean() < 0.02, name
        torch.testing.assert_close(tensor, other, rtol=2**-7, atol=1e-4)


def test_every_group_of_a_mesh_waits_as_long_as_the_settings_say(short):
    _, said = short
    assert "groups [(1, 120), (3, 120)]" in said
    assert "groups [(2, 120), (2, 120)]" in said


@pytest.mark.slow
def test_twenty_steps_of_every_objective_follow_one_rank_in_every_layout(trajectories):
    layouts = (ONE, TWO, THREE, FOUR, TWO_BY_TWO)
    found, _ = trajectories(20, {layout: [(stage, "float32") for stage in STAGES] for layout in layouts})
    for layout in layouts[1:]:
        for stage in STAGES:
            assert_same(found[layout, stage, "float32"], found[ONE, stage, "float32"], steps=20)


@pytest.mark.slow
def test_a_run_from_before_gradients_were_reduced_after_each_micro_batch_goes_on(trajectories, run_ranks, tmp_path):
    """Its folder does not know the setting, and its gradients were reduced once a step."""
    once = TWO._replace(once=True)
    found, _ = trajectories(6, {once: [("sft", "float32"), ("sft", "bfloat16")]}, checkpoint_every=3)
    for (_, stage, dtype), whole in found.items():
        out = shutil.copytree(whole.out, tmp_path / dtype)
        shutil.rmtree(out / "step-00000006")
        path = out / "step-00000003" / "training" / "state.json"
        state = json.loads(path.read_text())
        settings = {**state["settings"], "out": str(out)}
        assert settings["parallel"].pop("reduce_once")
        path.write_text(json.dumps({**state, "settings": settings}))
        ended = run_ranks({dtype: {"ranks": 2, "runs": [[stage, settings]]}})[dtype]
        assert not any(ended.codes), ended.said[-6000:]
        resumed = trajectory(out, 6)
        assert resumed.lines[:4] == whole.lines[:4]
        assert len(resumed.lines) == len(whole.lines) == 8
        close = 1e-6 if dtype == "float32" else 1e-3
        for line, other in zip(resumed.lines[4:], whole.lines[4:], strict=True):
            assert line["step"] == other["step"]
            for name in {"loss", "gradient_norm"} & line.keys():
                assert line[name] == pytest.approx(other[name], rel=close), (line["step"], name)
        assert resumed.weights.keys() == whole.weights.keys()
        rtol, atol = (2**-7, 1e-4) if dtype == "bfloat16" else (0, 1e-6)
        for name, tensor in whole.weights.items():
            torch.testing.assert_close(resumed.weights[name], tensor, rtol=rtol, atol=atol)
        # Sums in another order: in float32 some bits differ, in bfloat16 they are rounded away.
        assert dtype == "bfloat16" or any((resumed.weights[name] != tensor).any() for name, tensor in whole.weights.items())
