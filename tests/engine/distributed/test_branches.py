"""Branches and trials on several ranks."""

import shutil
from pathlib import Path

import pytest

from engine.settings.toml import to_table
from tests.engine.trajectories import assert_close, metric_lines

QUIET = {"heldout": [], "log": {"every": 1, "tensorboard": False}, "parallel": {"timeout": 120.0}}


def without_first_line(folder: Path, step: int, copy: Path) -> Path:
    """A copy of a run whose log holds only the lines of steps after this one."""
    shutil.copytree(folder, copy)
    lines = (copy / "metrics.jsonl").read_text().splitlines(keepends=True)
    kept = [text for text, line in zip(lines, metric_lines(copy), strict=True) if line["step"] > step]
    (copy / "metrics.jsonl").write_text("".join(kept))
    return copy


@pytest.mark.slow
def test_a_branch_on_several_ranks_ends_as_its_parent(tiny_settings, assert_same_end, run_ranks, tmp_path):
    """With the same bits on as many ranks; on another number within rounding. A trial moves aside once for all ranks."""
    changes = {"checkpoint_every": 2, "keep_checkpoints": 9, **QUIET}

    def run(stage, name, **more):
        return [stage, to_table(tiny_settings(stage, tmp_path / name, **changes | more))]

    def branch(stage, name):
        return run(stage, name, model=None, **{"from": str(tmp_path / f"{stage}-parent" / "step-00000004")})

    narrow = {"dtype": "bfloat16", "optimizer": {"moments": "bfloat16", "gradients": "float32"}}
    falling = {"schedule": {"peak": 3e-3}, "heldout": []}
    two = [
        run("sft", "sft-parent"),
        branch("sft", "sft-two"),
        run("dpo", "dpo-parent"),
        branch("dpo", "dpo-two"),
        run("pretrain", "pretrain-parent", **narrow),
        run("pretrain", "pretrain-two", model=None, **narrow, **{"from": str(tmp_path / "pretrain-parent" / "step-00000004")}),
        run("sft", "real", steps=2, **falling),
        run("sft", "real", **falling),
    ]
    ended = run_ranks({"two": {"ranks": 2, "runs": two}})["two"]
    assert ended.codes == [0, 0], ended.said[-6000:]
    assert f"the trial of 2 steps in {tmp_path / 'real'} is now {tmp_path / 'real'}-trial" in ended.said
    three = {"ranks": 3, "runs": [branch("sft", "sft-three"), branch("dpo", "dpo-three")]}
    ended = run_ranks({"three": three})["three"]
    assert ended.codes == [0, 0, 0], ended.said[-6000:]
    for stage in ("sft", "dpo", "pretrain"):
        parent = without_first_line(tmp_path / f"{stage}-parent", 4, tmp_path / f"{stage}-rest")
        assert_same_end(parent, without_first_line(tmp_path / f"{stage}-two", 4, tmp_path / f"{stage}-two-rest"))
        if stage != "pretrain":
            assert_close(parent, without_first_line(tmp_path / f"{stage}-three", 4, tmp_path / f"{stage}-three-rest"))
