"""Run by test_sharding.py in each process: gradients of a model sharded by FSDP2 against those of the whole model."""

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from kernels.launch import INTERPRETED
from model.mistral import Mistral, initialize
from tests.model.test_recompute import CONFIG, MODES, loss_of, made

torch.set_num_threads(1)
CPU = torch.device("cpu")


def main() -> None:
    dist.init_process_group("gloo")
    whole = made(CONFIG, torch.float32, CPU)
    loss = loss_of(whole, CPU)
    loss.backward()
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
    main()
