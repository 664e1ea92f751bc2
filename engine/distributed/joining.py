"""How the processes of a run find one another: the launcher's environment, the process group, the device mesh."""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.rendezvous import rendezvous

from engine.distributed.agreement import check_same, difference_in
from engine.distributed.ranks import REPLICATE, SHARD, Ranks, first_line
from engine.settings.sections import ParallelSettings

_REMEDY = "start every rank with the same settings"


def join(
    device: torch.device,
    settings: ParallelSettings,
    facts: Mapping[str, Any],  # that all ranks must share, by name: text, numbers, truth values
) -> Ranks:
    """Join the processes that torchrun or another launcher started. Without a launcher the run has one rank.

    The ranks compare the facts before they make any group of processes: ranks that make different groups would wait for one
    another.
    Raises: ValueError if another launcher started several processes that do not know one another, the replicas do not divide
        the ranks, this machine has fewer GPUs than processes, or, on all ranks, a fact of one rank differs from rank 0's;
        ConnectionError if the other ranks cannot be reached.
    """
    check_launcher()
    ranks = world_size()
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
    facts = {**facts, "type of device": device.type}
    if dist.is_initialized():
        # This process has trained before.
        check_same(Ranks(device, dist.get_rank(), ranks), facts, _REMEDY)
    else:
        _connect(device, settings, facts)
    mesh = _mesh(device, ranks, settings)
    return Ranks(device, dist.get_rank(), ranks, mesh, settings.timeout)


def world_size() -> int:
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


def check_launcher() -> None:
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


def _connect(device: torch.device, settings: ParallelSettings, facts: Mapping[str, Any]) -> None:
    # gloo beside NCCL: names, counts and checkpoints, which are on the host, do not pass through the device.
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    timeout = timedelta(seconds=settings.timeout)
    store, rank, ranks = common_store(timeout)
    with _unreachable_ranks_named():
        difference = difference_in(store, rank, ranks, facts)
    if difference:
        raise ValueError(f"{difference}; {_REMEDY}")
    with _unreachable_ranks_named():
        dist.init_process_group(
            backend,
            store=store,
            rank=rank,
            world_size=ranks,
            timeout=timeout,
            device_id=device if device.type == "cuda" else None,
        )


def common_store(timeout: timedelta) -> tuple[dist.Store, int, int]:
    """(a store that all ranks reach, without any group of processes; this process's rank; number of ranks).

    Raises: ValueError where the launcher's variables are incomplete; ConnectionError where the store cannot be reached.
    """
    _check_rendezvous()
    with _unreachable_ranks_named():
        store, rank, ranks = next(rendezvous("env://", timeout=timeout))
        if os.environ.get("LOCAL_WORLD_SIZE") == str(ranks):
            # torchrun keeps its store over restarts, with the addresses of dead processes. The restart count tells attempts
            # apart on one machine; on several it can differ between them (https://github.com/pytorch/pytorch/issues/135712).
            store = dist.PrefixStore(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), store)
    return store, rank, ranks


@contextmanager
def _unreachable_ranks_named() -> Iterator[None]:
    try:
        yield
    except (dist.DistError, ValueError) as error:
        raise ConnectionError(
            f"rank {os.environ.get('RANK')} of {os.environ.get('WORLD_SIZE')} could not join the others at "
            f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}: {first_line(error)}; is the port in use, or a "
            "machine unreachable? Start with torchrun --standalone, or choose another --master-port"
        ) from None


def _mesh(device: torch.device, ranks: int, settings: ParallelSettings) -> DeviceMesh:
    # The groups that torch makes for a mesh have its default timeout; these have the timeout of the settings. Only the members
    # of a group make it: with one replica, each rank makes a group of itself alone instead of one for every rank.
    places = torch.arange(ranks).view(settings.replicas, -1)
    replica, place = divmod(dist.get_rank(), places.shape[1])
    given: dict[str, Any] = {"timeout": timedelta(seconds=settings.timeout), "use_local_synchronization": True}
    mine = [dist.new_group(members.tolist(), **given) for members in (places[:, place], places[replica])]
    return DeviceMesh.from_group(mine, device.type, mesh=places, mesh_dim_names=(REPLICATE, SHARD))
