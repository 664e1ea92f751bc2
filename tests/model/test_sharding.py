"""FSDP2 sees through the operators: a sharded model has the gradients of the whole one, in every recompute mode."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("interpret", ["0", "1"], ids=["references", "kernels"])
def test_gradients_of_a_sharded_model(interpret):
    done = subprocess.run(
        [sys.executable, "-m", "tests.model.sharded_gradients"], check=False, cwd=ROOT,
        env={**os.environ, "TRITON_INTERPRET": interpret, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-4000:]
