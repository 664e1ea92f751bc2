"""The processes of a run: one rank without any wrapper, or several with FSDP2 (`fully_shard`).

Each rank holds some rows of every parameter, gradient and optimizer state; whole parameters exist only while a block computes.
Values are summed over ranks, never averaged, in float32 or wider: an objective's denominator already counts all ranks.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from engine.settings.sections import ParallelSettings

SHARD, REPLICATE = "shard", "replicate"


@dataclass(frozen=True)
class Ranks:
    """This process's place among the processes of the run."""

    device: torch.device
    rank: int = 0
    ranks: int = 1
    mesh: DeviceMesh | None = None  # None for one rank; dimensions ("replicate", "shard") for several
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

    def gather(self, values: Iterable[Any], group: dist.ProcessGroup | None = None) -> list[Any]:
        """The values of all ranks, in the order of ranks, on every rank. group: of all ranks; another thread needs its own."""
        mine = list(values)
        if self.ranks == 1:
            return mine
        everyone: list[Any] = [None] * self.ranks
        dist.all_gather_object(everyone, mine, group=group)
        return [value for values_of_rank in everyone for value in values_of_rank]


def host_group(ranks: Ranks) -> dist.ProcessGroup | None:
    """A new process group on the host, for another thread than training's; None for one rank. All ranks call this together."""
    return None if ranks.mesh is None else dist.new_group(backend="gloo", timeout=timedelta(seconds=ranks.timeout))


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
            f"rank {dist.get_rank()}: another rank stopped or did not answer within parallel.timeout ({first_line(error)}); "
            "the first error above, or the stacks of the rank that hangs, say why. The last complete checkpoint is intact: "
            "start again to continue from it (torchrun --max-restarts does so by itself)"
        ) from error


def first_line(error: BaseException) -> str:
    """The first line of an error's message; the name of its class where it has none."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
