"""A chain that is killed, and a chain under torchrun, end as an unbroken chain in one process does."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from engine.checkpoint.state import newest_checkpoint
from tests.engine.trajectories import metric_lines
from tests.recipes.test_pipeline import STAGES, write_chain

ROOT = Path(__file__).resolve().parents[2]
ONE = [sys.executable, "-m"]
TWO = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m"]


def start(folder: Path, launcher: list[str], *arguments: str) -> subprocess.Popen:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}
    return subprocess.Popen(
        [*launcher, "recipes.pipeline", "chain.toml", *arguments],
        cwd=folder,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def ended(process: subprocess.Popen, code: int = 0) -> list[str]:
    """The lines of a process that ends with this status."""
    out, _ = process.communicate(timeout=600)
    assert process.returncode == code, out
    return out.splitlines()


@pytest.fixture
def folder(tmp_path, tiny_model, tiny_settings):
    """A folder with the files of a chain whose trainings take 20 steps and save after each third."""
    write_chain(tmp_path, tiny_model, tiny_settings, steps=20)
    for name in ("pretrain.toml", "sft.toml"):
        text = (tmp_path / name).read_text(encoding="utf-8")
        text = text.replace("checkpoint_every = 0", "checkpoint_every = 3").replace("every = 2", "every = 1")
        (tmp_path / name).write_text(text, encoding="utf-8")
    return tmp_path


def assert_same_results(ours: Path, theirs: Path) -> None:
    """Two folders hold the same bytes of data, weights, optimizer and export, and the same metrics."""
    for name in ("data/text", "data/chat", "export"):
        names = sorted(path.name for path in (ours / name).iterdir())
        assert names == sorted(path.name for path in (theirs / name).iterdir())
        for file in names:
            if file != "lengths.png":
                assert (ours / name / file).read_bytes() == (theirs / name / file).read_bytes(), file
    for name in ("pretrain", "sft"):
        one, other = newest_checkpoint(ours / name), newest_checkpoint(theirs / name)
        assert one.name == other.name == "step-00000020"
        for path in sorted(one.rglob("*.safetensors")):
            mine, its = load_file(path), load_file(other / path.relative_to(one))
            assert mine.keys() == its.keys()
            assert all(torch.equal(tensor, its[key]) for key, tensor in mine.items()), path
        assert metric_lines(ours / name) == metric_lines(theirs / name)
    for name in STAGES:
        assert json.loads((ours / "pipeline" / f"{name}.json").read_text())["state"] == "done"


@pytest.mark.slow
def test_a_chain_that_is_killed_five_times_at_random_moments_ends_as_an_unbroken_one(folder, tmp_path_factory):
    unbroken = tmp_path_factory.mktemp("unbroken") / "folder"
    shutil.copytree(folder, unbroken)
    lines = len(ended(start(unbroken, ONE)))
    seed = random.SystemRandom().randrange(2**32)
    rng = random.Random(seed)
    print(f"seed {seed}")
    begun = 0
    for _ in range(5):
        process = start(folder, ONE)
        for _ in range(rng.randint(1, lines // 7)):
            assert process.stdout.readline()
        time.sleep(rng.uniform(0, 0.1))
        assert process.poll() is None
        process.send_signal(signal.SIGKILL)
        process.communicate()
        begun += any(json.loads(path.read_text())["state"] == "begun" for path in (folder / "runs/pipeline").glob("*.json"))
    assert begun
    ended(start(folder, ONE))
    assert_same_results(folder / "runs", unbroken / "runs")


@pytest.mark.slow
def test_sigterm_ends_a_training_with_a_checkpoint_and_the_chain_with_its_status(folder):
    process = start(folder, ONE)
    while "step      2/20" not in process.stdout.readline():
        pass
    process.send_signal(signal.SIGTERM)
    said = "\n".join(ended(process, 128 + signal.SIGTERM))
    assert "stopped by SIGTERM after step" in said
    assert "[3/5] pretrain: not finished; the same command goes on from here" in said
    assert newest_checkpoint(folder / "runs/pretrain") is not None
    assert not (folder / "runs/pipeline/.lock").exists()
    assert any(", from runs/pretrain/step-" in line for line in ended(start(folder, ONE)))


@pytest.mark.slow
def test_under_torchrun_all_ranks_train_and_rank_0_alone_does_the_rest(folder):
    said = ended(start(folder, TWO))
    for number, name in enumerate(STAGES, 1):
        assert sum(line.startswith(f"[{number}/5] {name}: done in") for line in said) == 1
    assert sum(line.startswith("start      step 0 of 20") for line in said) == 2
    assert newest_checkpoint(folder / "runs/sft").name == "step-00000020"
    ranks = json.loads((folder / "runs/sft/step-00000020/training/state.json").read_text())["files"]
    assert len([name for name in ranks if name.startswith("training/optimizer/")]) == 2
    again = ended(start(folder, TWO))
    assert sum("finished already" in line for line in again) == len(STAGES)
    assert ended(start(folder, ONE))
    (folder / "text.txt").write_text("another text\n")
    refused = "\n".join(ended(start(folder, TWO), 1))
    assert refused.count("text: text.txt changed (paths.0): the file has another content") <= 2
    assert "no stale result is used" in refused
