"""The processes of a run: one rank without any wrapper, or several with FSDP2 (`fully_shard`).

Each rank holds some rows of every parameter, gradient and optimizer state; whole parameters exist only while a block computes.
Values are summed over ranks, never averaged, in float32 or wider: an objective's denominator already counts all ranks.
"""

import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.rendezvous import rendezvous

from engine.settings.sections import ParallelSettings

SHARD, REPLICATE = "shard", "replicate"


@dataclass(frozen=True)
class Ranks:
    """This process's place among the processes of the run."""

    device: torch.device
    rank: int = 0
    ranks: int = 1
    mesh: DeviceMesh | None = None  # None for one rank; dimensions ("shard",) or ("replicate", "shard") for several
    timeout: float = ParallelSettings.timeout  # seconds that ranks wait for one another in a collective
    timed: Callable[[], AbstractContextManager[None]] = nullcontext  # entered around each sum of a step's values

    @property
    def main(self) -> bool:
        """Whether this rank prints and writes."""
        return self.rank == 0

    def sum(self, values: dict[str, Tensor]) -> dict[str, Tensor]:
        """Scalars summed over all ranks in float64, in one collective. The host does not wait for a CUDA device."""
        if self.mesh is None:
            return values
        stacked = torch.stack([value.detach().double() for value in values.values()])
        with self.timed():
            dist.all_reduce(stacked)
        return {name: total.to(value.dtype) for (name, value), total in zip(values.items(), stacked, strict=True)}

    def sum_(self, tensor: Tensor) -> Tensor:
        """Sum a tensor over all ranks in place. It is on the CPU or on the run's device."""
        if self.mesh is not None:
            dist.all_reduce(tensor)
        return tensor

    def decided(self, action: Callable[[], Any]) -> Any:
        """What the action returns on rank 0, on every rank; if it raises there, every rank raises the same error."""
        result = error = None
        if self.main:
            try:
                result = action()
            except (OSError, ValueError) as failure:
                error = failure
        result, error = self.from_main([result, error])
        if error is not None:
            raise error
        return result

    def from_main(self, value: Any) -> Any:
        """Rank 0's value on every rank: text, a number, None, or a list of these."""
        if self.mesh is None:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0, device=torch.device("cpu"))
        return box[0]


def join(device: torch.device, settings: ParallelSettings) -> Ranks:
    """Join the processes that torchrun or another launcher started. Without a launcher the run has one rank.

    Raises: ValueError if another launcher started several processes that do not know one another, the replicas do not divide
        the ranks, or this machine has fewer GPUs than processes; ConnectionError if the other ranks cannot be reached.
    """
    _check_launcher()
    ranks = _world_size()
    if ranks % settings.replicas:
        raise ValueError(
            f"parallel.replicas = {settings.replicas} does not divide the {ranks} ranks of this run; start another number of "
            "processes (torchrun --nproc-per-node), or set it to a divisor"
        )
    if ranks == 1:
        return Ranks(device)
    if device.type == "cuda":
        local = int(os.environ.get("LOCAL_RANK", "0"))
        if local >= torch.cuda.device_count():
            raise ValueError(
                f"LOCAL_RANK = {local}: this machine has {torch.cuda.device_count()} GPUs; start as many processes on it "
                "(torchrun --nproc-per-node)"
            )
        device = torch.device("cuda", local)
        torch.cuda.set_device(device)
    if not dist.is_initialized():
        _check_rendezvous()
        _connect(device, settings)
    mesh = _mesh(device, ranks, settings)
    return Ranks(device, dist.get_rank(), ranks, mesh, settings.timeout)


def _world_size() -> int:
    """Number of processes. Raises: ValueError for a WORLD_SIZE that is no number."""
    text = os.environ.get("WORLD_SIZE", "1")
    if not text.isdigit() or int(text) == 0:
        raise ValueError(f"WORLD_SIZE = {text!r}: must be the number of processes; unset it, or start with torchrun")
    return int(text)


def _check_rendezvous() -> None:
    """Refuse a WORLD_SIZE that another run left in the environment."""
    missing = [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if not os.environ.get(name)]
    if missing:
        raise ValueError(
            f"WORLD_SIZE = {os.environ.get('WORLD_SIZE')} is set in the environment, and {', '.join(missing)} "
            f"{'is' if len(missing) == 1 else 'are'} not: it may be left over from another run. Unset WORLD_SIZE for one "
            "process, or start several with torchrun --standalone --nproc-per-node N --shutdown-timeout 600 -m RECIPE CONFIG"
        )


# Variable of a launcher that holds the number of processes -> command that starts one process.
_LAUNCHERS = {"SLURM_NTASKS": "srun --ntasks-per-node 1", "OMPI_COMM_WORLD_SIZE": "mpirun --map-by ppr:1:node"}


def _check_launcher() -> None:
    """Refuse several processes that would each train a run of their own in one folder."""
    if "WORLD_SIZE" in os.environ:
        return
    for variable, start in _LAUNCHERS.items():
        processes = os.environ.get(variable, "")
        if processes.isdigit() and int(processes) > 1:
            raise ValueError(
                f"{variable} = {processes}: {start.split()[0]} started {processes} processes, and nothing tells them of one "
                f"another (WORLD_SIZE is not set), so each would train alone in the same folder. Start one torchrun a machine: "
                f"{start} torchrun --nnodes MACHINES --nproc-per-node GPUS --shutdown-timeout 600 --rdzv-backend c10d "
                f"--rdzv-endpoint HOST:29400 -m RECIPE CONFIG; for one process, unset {variable}"
            )


def _connect(device: torch.device, settings: ParallelSettings) -> None:
    # gloo beside NCCL: names, counts and checkpoints, which are on the host, do not pass through the device.
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    timeout = timedelta(seconds=settings.timeout)
    try:
        store, rank, ranks = next(rendezvous("env://", timeout=timeout))
        if os.environ.get("LOCAL_WORLD_SIZE") == str(ranks):
            # torchrun keeps its store over restarts, with the addresses of dead processes. The restart count tells attempts
            # apart on one machine; on several it can differ between them (https://github.com/pytorch/pytorch/issues/135712).
            store = dist.PrefixStore(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), store)
        dist.init_process_group(
            backend,
            store=store,
            rank=rank,
            world_size=ranks,
            timeout=timeout,
            device_id=device if device.type == "cuda" else None,
        )
    except (dist.DistError, ValueError) as error:
        raise ConnectionError(
            f"rank {os.environ.get('RANK')} of {os.environ.get('WORLD_SIZE')} could not join the others at "
            f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}: {_first_line(error)}; is the port in use, or a "
            "machine unreachable? Start with torchrun --standalone, or choose another --master-port"
        ) from None


def _mesh(device: torch.device, ranks: int, settings: ParallelSettings) -> DeviceMesh:
    if settings.replicas == 1:
        return init_device_mesh(device.type, (ranks,), mesh_dim_names=(SHARD,))
    # The groups that torch makes for a mesh have its default timeout; these have the timeout of the settings.
    places = torch.arange(ranks).view(settings.replicas, -1)
    mine: list[dist.ProcessGroup] = []
    for lists in (places.T, places):
        groups = [dist.new_group(members, timeout=timedelta(seconds=settings.timeout)) for members in lists.tolist()]
        mine += [group for group in groups if group != dist.GroupMember.NON_GROUP_MEMBER]
    return DeviceMesh.from_group(mine, device.type, mesh=places, mesh_dim_names=(REPLICATE, SHARD))


def host_group(ranks: Ranks) -> dist.ProcessGroup | None:
    """A new process group on the host, apart from training's; None for one rank. All ranks call this together."""
    return None if ranks.mesh is None else dist.new_group(backend="gloo", timeout=timedelta(seconds=ranks.timeout))


def gather(values: Iterable[Any], ranks: Ranks, group: dist.ProcessGroup | None) -> list[Any]:
    """The values of all ranks, in the order of ranks, on every rank."""
    mine = list(values)
    if group is None:
        return mine
    everyone: list[Any] = [None] * ranks.ranks
    dist.all_gather_object(everyone, mine, group=group)
    return [value for values_of_rank in everyone for value in values_of_rank]


def leave() -> None:
    """Leave the process group at the end of a successful run."""
    if dist.is_initialized():
        dist.destroy_process_group()


@contextmanager
def lost_ranks_named() -> Iterator[None]:
    """Turns a collective's error into one clear error when another rank has died or hangs.

    Raises: ConnectionError.
    """
    try:
        yield
    except RuntimeError as error:
        text = str(error)
        distributed = isinstance(error, dist.DistError) or "gloo" in text or "Connection closed by peer" in text
        if not (dist.is_initialized() and distributed):
            raise
        raise ConnectionError(
            f"rank {dist.get_rank()}: another rank stopped or did not answer within parallel.timeout ({_first_line(error)}); "
            "the first error above, or the stacks of the rank that hangs, say why. The last complete checkpoint is intact: "
            "start again to continue from it (torchrun --max-restarts does so by itself)"
        ) from error


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
