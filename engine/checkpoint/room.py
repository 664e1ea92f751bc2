"""Room for checkpoints, checked before a run starts: the disk for the folders, the host's memory for the copies."""

import os
import shutil

from engine.checkpoint.state import checkpoints, seconds_to_save
from engine.distributed.torchrun import shutdown_warning
from engine.environment import host_memory
from engine.estimate.account import amount
from engine.estimate.sizes import FLOAT32
from engine.observe.logged import logged_steps
from engine.run import Run

# Bytes a second at which a checkpoint is assumed to be written and read back for its SHA-256, where none was timed yet.
_SPEED = 2**29


def checkpoint_bytes(run: Run) -> int:
    """Size of a run's checkpoint."""
    return bytes_of_checkpoint(run.config.parameters, run.settings.optimizer.moments)


def bytes_of_checkpoint(parameters: int, moments: str) -> int:
    """Size of a checkpoint: two moments, and float32 masters, which bfloat16 weights and their low bits are together."""
    return parameters * FLOAT32 + _moments(parameters, moments)


def _moments(parameters: int, moments: str) -> int:
    """Bytes of both moments, over all ranks."""
    return 2 * parameters * (2 if moments == "bfloat16" else FLOAT32)


def check_room(run: Run) -> list[str]:
    """What to say about the room for checkpoints, one line each.

    Raises: OSError where the disk has no room for one more checkpoint, or the machine could never hold the copies and the
        offloaded moments.
    """
    size = checkpoint_bytes(run)
    lines = [*_disk(run, size), *_memory(run, size)]
    timed = None if run.continued is None else seconds_to_save(run.continued)
    seconds, source = (size / _SPEED, "estimated at 0.5 GiB/s") if timed is None else (timed, "the last one took so long")
    warning = shutdown_warning(seconds, source)
    return [*lines, *([warning] if warning else [])]


def _disk(run: Run, size: int) -> list[str]:
    settings, steps = run.settings, run.plan.steps - run.start
    existing = next(path for path in (run.out, *run.out.parents) if path.exists())
    disk = shutil.disk_usage(existing)
    if not disk.total or not steps:
        # Some network file systems do not know their size.
        return []
    if disk.free < size:
        raise OSError(
            f"{run.out}: a checkpoint takes {amount(size)}, the disk has {amount(disk.free)} free; free the disk or choose "
            "another out"
        )
    # The oldest is removed when the newest is complete.
    written, certain = _written(run, steps)
    there = min(len(checkpoints(run.out)), settings.keep_checkpoints)
    more = min(written, settings.keep_checkpoints + 1 - there)
    more += steps // settings.keep_every if settings.keep_every else 0
    up_to = "" if certain else "up to "
    found = f"checkpoint {amount(size)} each, {up_to}{more} more to keep at once, {amount(disk.free)} free in {existing}"
    if disk.free >= more * size:
        return [found]
    remedy = "free the disk, or lower keep_checkpoints, or raise keep_every"
    if certain:
        return [f"warning    {found}: not all of them fit; {remedy}"]
    minutes = disk.free // size * settings.checkpoint_seconds / 60
    return [f"{found}: not all of them fit if the run takes longer than {minutes:.3g} minutes; then {remedy}"]


def _written(run: Run, steps: int) -> tuple[int, bool]:
    """(most checkpoints that the run has still to write; whether that is certain: nobody knows how long a new run takes)."""
    settings = run.settings
    every = settings.checkpoint_every or steps
    written, interval = -(-steps // every), settings.checkpoint_seconds
    if not interval:
        return written, True
    seconds = _seconds_a_step(run)
    if seconds is None:
        return steps, False
    return min(steps, written + int(steps * seconds / interval)), True


def _seconds_a_step(run: Run) -> float | None:
    """What a step took when it was last logged; None for a fresh run."""
    lines = logged_steps(run.out / "metrics.jsonl") if run.start else ()
    return next((line["step_seconds"] for line in reversed([*lines]) if "step_seconds" in line), None)


def _memory(run: Run, size: int) -> list[str]:
    """Each rank of this machine holds copies of its shard, beside offloaded moments and, without a GPU, all of training."""
    here = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    shards = run.ranks.ranks // run.settings.parallel.replicas
    parts = {"the copies": here * -(-size // shards)}
    if run.settings.optimizer.offload == "moments":
        parts["the moments"] = here * -(-_moments(run.config.parameters, run.settings.optimizer.moments) // shards)
    total, available = host_memory()
    if total and sum(parts.values()) > total:
        raise OSError(
            f"checkpoints: {_listed(parts)} of {here} ranks take {amount(sum(parts.values()))} of the host's memory, which "
            f"has {amount(total)}; use more machines, or optimizer.moments = bfloat16"
        )
    if run.device.type == "cpu":
        parts["training"] = here * run.planned.peak
    if total and sum(parts.values()) > available:
        return [
            f"warning    {_listed(parts)} take {amount(sum(parts.values()))} of the host's memory, of which "
            f"{amount(available)} are free now; the first checkpoint may end the run"
        ]
    return []


def _listed(parts: dict[str, int]) -> str:
    return " and ".join(f"{name} ({amount(size)})" for name, size in parts.items())
