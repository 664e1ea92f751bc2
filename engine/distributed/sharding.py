"""A model sharded over ranks with FSDP2 (`fully_shard`), and this rank's rows of a sharded tensor."""

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from engine.distributed.ranks import SHARD, Ranks
from engine.settings.sections import ParallelSettings
from model.mistral import Mistral

# Attributes of a sharded model: whether its gradients are reduced once a step, and the units that reshard after their forward
# pass.
_ONCE, _RESHARDING = "_reduces_once", "_resharding_units"


def shard(model: Mistral, ranks: Ranks, settings: ParallelSettings) -> Mistral:
    """Shard a model in place; a single rank's model stays as it is.

    Each block, the embedding and the head are FSDP units of their own; the root holds the final norm. Gradients are summed over
    ranks in float32, never averaged. The next unit's weights are gathered while a unit computes.
    """
    if ranks.mesh is None:
        return model
    policy = MixedPrecisionPolicy(reduce_dtype=torch.float32)
    *blocks, last = model.layers
    inners: list[Any] = [*blocks, model.embed_tokens]
    for inner in inners:
        fully_shard(inner, mesh=ranks.mesh, mp_policy=policy, reshard_after_forward=settings.reshard)
    # The backward pass begins with these units: resharding them would gather their weights twice in a row.
    for outer in (last, model.lm_head, model):
        fully_shard(outer, mesh=ranks.mesh, mp_policy=policy, reshard_after_forward=False)
    order: list[Any] = [model.embed_tokens, *model.layers, model.lm_head]
    for unit, following in itertools.pairwise(order):
        unit.set_modules_to_forward_prefetch([following])
        following.set_modules_to_backward_prefetch([unit])
    for unit in _units(model):
        unit.set_gradient_divide_factor(1.0)
        unit.set_force_sum_reduction_for_comms(True)
    setattr(model, _ONCE, settings.reduce_once)
    # A tuple, because nn.Module would take a list of modules for its own.
    setattr(model, _RESHARDING, tuple(inners) if settings.reshard else ())
    return model


def _units(model: nn.Module) -> list[FSDPModule]:
    return [module for module in model.modules() if isinstance(module, FSDPModule)]


def reduce_after(model: nn.Module, last: bool) -> None:
    """Before each backward pass: say whether it is the step's last.

    Each micro-batch's gradients are summed over the shards in float32 as soon as a unit has them, and added to this rank's
    float32 shard of the sum. Replicas exchange their sums after the last micro-batch. With `parallel.reduce_once`, a rank adds
    up whole float32 gradients instead, and nothing is sent before the last micro-batch.
    """
    if not isinstance(model, FSDPModule):
        return
    if getattr(model, _ONCE):
        model.set_requires_gradient_sync(last)
        model.set_is_last_backward(last)
    else:
        # FSDP2 keeps the sum of what replicas have not exchanged yet; a mesh has replicas even where there is but one.
        model.set_requires_all_reduce(last)


def reshard(model: nn.Module) -> None:
    """Free the gathered weights that a forward pass without a backward pass has left behind."""
    for unit in _units(model):
        unit.reshard()


@contextmanager
def gathered(model: nn.Module) -> Iterator[None]:
    """Whole weights on every rank: forward passes inside, without gradients, wait for no other rank.

    All ranks enter together. Each then needs memory for the whole model's weights beside its shards.
    """
    units, resharding = _units(model), getattr(model, _RESHARDING, ())
    with torch.no_grad():
        for unit in units:
            unit.unshard()
    for unit in resharding:
        unit.set_reshard_after_forward(False, recurse=False)
    try:
        yield
    finally:
        for unit in resharding:
            unit.set_reshard_after_forward(True, recurse=False)
        reshard(model)


def local(tensor: Tensor) -> Tensor:
    """This rank's rows of a sharded tensor, sharing its memory; an unsharded tensor itself."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole(tensor: Tensor) -> Tensor:
    """All rows of a sharded tensor. A collective: all ranks call it together."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def first_row(tensor: Tensor) -> int:
    """Index of this rank's first row in the whole tensor."""
    if not isinstance(tensor, DTensor):
        return 0
    mesh = tensor.device_mesh[SHARD]
    # FSDP2 cuts as torch.chunk does: equal numbers of rows, except that the last shards may have fewer rows or none.
    rows = -(-len(tensor) // mesh.size())
    return min(mesh.get_local_rank() * rows, len(tensor))


def sum_over_shards(
    value: Tensor,  # a scalar computed from this rank's shards, changed in place
    sharded: DTensor,  # any of them: names the ranks to sum over
) -> Tensor:
    """Sum a scalar over all shards, each counted once, whatever the number of replicas."""
    dist.all_reduce(value, group=sharded.device_mesh[SHARD].get_group())
    return value
