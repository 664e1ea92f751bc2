"""FSDP2 sees through the operators: a sharded model has the gradients of the whole model.

    python -m tests.model.test_sharding

compares them on two ranks, forked from one process because importing torch is slow. In Triton's interpreter a model in float32
runs through the kernels, a model in float64 through the references.
"""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import kernels.attention.work
from model.mistral import Mistral
from tests.engine.forked_ranks import end_of, fork_ranks, spare_forks_the_garbage
from tests.model.test_recompute import CONFIG, MODES, loss_of, made

ROOT = Path(__file__).resolve().parents[2]
CPU = torch.device("cpu")
# (dtype, model, recompute modes). The references run in every mode; the interpreter is slow and runs the kernels in one mode.
CASES = [(torch.float64, CONFIG, MODES), (torch.float32, replace(CONFIG, num_hidden_layers=1), ("light",))]


@pytest.mark.slow
def test_a_sharded_model_has_the_gradients_of_the_whole_model():
    done = subprocess.run(
        [sys.executable, "-m", "tests.model.test_sharding"],
        check=False,
        cwd=ROOT,
        env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout[-4000:]


def main() -> None:
    import torch._dynamo  # each rank would import it at first use

    torch.set_num_threads(1)
    kernels.attention.work._PADDING = 2  # fewer empty programs for the interpreter
    wholes = [made(config, dtype, CPU) for dtype, config, _ in CASES]
    losses = [loss_of(whole, CPU) for whole in wholes]
    for loss in losses:
        loss.backward()
    spare_forks_the_garbage()
    codes = end_of(fork_ranks(2, lambda _: compare(wholes, losses)))
    if any(codes):
        raise SystemExit(f"the processes ended with {codes}")


def compare(wholes: list[Mistral], losses: list[torch.Tensor]) -> None:
    dist.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for (dtype, config, modes), whole, loss in zip(CASES, wholes, losses, strict=True):
        for mode in modes:
            model = made(config, dtype, CPU)
            model.recompute = mode
            for unit in (*model.layers, model.embed_tokens, model.lm_head, model):
                fully_shard(unit, mesh=mesh)
            sharded = loss_of(model, CPU)
            sharded.backward()
            torch.testing.assert_close(sharded.detach(), loss.detach(), rtol=0, atol=0)
            for (name, part), parameter in zip(model.named_parameters(), whole.parameters(), strict=True):
                assert part.to_local().numel() < parameter.numel(), name
                torch.testing.assert_close(part.grad.full_tensor(), parameter.grad, rtol=1e-6, atol=1e-7)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
