"""Not a test: gradients of a model sharded by FSDP2 against those of the whole model, for test_sharding.py.

python -m tests.model.sharded_gradients: two processes, forked from this one as imports are dear.
"""

import torch
import torch._dynamo  # what each process imports on first use
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from kernels.launch import INTERPRETED
from model.mistral import Mistral, initialize
from tests.engine.forked_ranks import end_of, fork_ranks
from tests.model.test_recompute import CONFIG, MODES, loss_of, made

CPU = torch.device("cpu")
RANKS = 2


def compare(whole: Mistral, loss: torch.Tensor) -> None:
    dist.init_process_group("gloo")
    for mode in ("light",) if INTERPRETED else MODES:
        model = Mistral(CONFIG)
        initialize(model, 3)
        model.recompute = mode
        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
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
    torch.set_num_threads(1)
    whole = made(CONFIG, torch.float32, CPU)
    loss = loss_of(whole, CPU)
    loss.backward()
    codes = end_of(fork_ranks(RANKS, lambda _: compare(whole, loss)))
    if any(codes):
        raise SystemExit(f"the processes ended with {codes}")
