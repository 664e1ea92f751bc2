"""SIGTERM to torchrun itself: its workers save and end, and the same command continues."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from engine.checkpoint.state import checkpoints, read_state
from engine.settings.toml import to_toml

ROOT = Path(__file__).resolve().parents[3]


@pytest.mark.slow
def test_sigterm_to_torchrun_saves_a_checkpoint(tiny_settings, tmp_path):
    settings = tiny_settings(
        "pretrain",
        tmp_path / "run",
        steps=5000,
        epochs=None,
        pack_tokens=64,
        heldout=[],
        log={"every": 1, "tensorboard": False},
        parallel={"timeout": 60.0},
    )
    (tmp_path / "run.toml").write_text(to_toml(settings))
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*torchrun, "--shutdown-timeout", "60", "-m", "recipes.pretrain", str(tmp_path / "run.toml")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    with (tmp_path / "said").open("wb") as said:
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=said, stderr=subprocess.STDOUT)
        metrics = tmp_path / "run" / "metrics.jsonl"
        while process.poll() is None and not (metrics.is_file() and metrics.read_text().count("\n") > 2):
            time.sleep(0.1)
        process.send_signal(signal.SIGTERM)
        process.wait(timeout=120)
    text = (tmp_path / "said").read_text()
    (last,) = checkpoints(tmp_path / "run")
    assert f"stopped by SIGTERM after step {read_state(last).step}; start again to continue from {last}" in text
    assert not list((tmp_path / "run").glob(".step-*"))
