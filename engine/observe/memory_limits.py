"""A run whose memory plan exceeds its device is refused before it starts; out of memory, it ends with the plan and a remedy.

The limit is what a GPU has free for this process: other processes and the CUDA context take their part. On a CPU it is all of
the machine's memory (or the container's limit), shared by the ranks of the machine: what is free at the moment may change, so a
plan above that is only warned of, by `engine.checkpoint.room`.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from engine.checkpoint.state import checkpoints
from engine.distributed.ranks import first_line
from engine.environment import host_memory
from engine.estimate.account import MemoryPlan, amount
from engine.estimate.fitting import fitting_settings
from engine.estimate.sizes import Sizes
from engine.inference.samples import ROWS
from engine.run import Run

_LARGEST_ITEMS = 4
# A proposal after running out of memory takes at most this share of the plan that did not fit.
_SHARE_AFTERWARDS = 0.9
_CPU_ALLOCATOR = "can't allocate memory"


def check_memory(run: Run) -> list[str]:
    """What to say about a plan above the limit that `force` lets pass, one line each.

    All ranks call it. Raises: ValueError on all of them where the plan of one exceeds its device, naming the plan's largest
        items and settings that would fit.
    """
    own = _limit(run)
    # Ranks may have different devices. The one that lacks the most is named.
    lacking, peak, limit = max(run.ranks.gather([(run.planned.peak - own if own else 0, run.planned.peak, own)]))
    if lacking > 0:
        found = f"the memory plan takes {amount(peak)}, {_device(run)} has {amount(limit)}"
        if run.settings.force:
            return [f"warning    {found}; going on because of force"]
        raise ValueError(f"{found}: {largest_items(run.planned)}; {_remedy(run, limit)}; or start anyway (--force)")
    needed = _evaluation_bytes(run)
    lacking, needed, limit = max(run.ranks.gather([(needed - own if own else 0, needed, own)]))
    if lacking > 0 and not run.settings.force:
        raise ValueError(
            f"evaluate: whole weights on every rank take {amount(needed)} with the optimizer's shards and the answers' cache, "
            f"{_device(run)} has {amount(limit)}; leave evaluate.prompts and evaluate.tasks out, or start anyway (--force)"
        )
    return []


@contextmanager
def out_of_memory_explained(run: Run) -> Iterator[None]:
    """Around a run's work. Raises: MemoryError with the plan and settings that need less, where the memory is exhausted."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not (isinstance(error, MemoryError | torch.OutOfMemoryError) or _CPU_ALLOCATOR in str(error)):
            raise
        peak, limit = run.planned.peak, _limit(run)
        target = int(_SHARE_AFTERWARDS * min(peak, limit or peak))
        begun = "the last complete checkpoint is intact: start again to continue from it" if checkpoints(run.out) else ""
        text = "; ".join(
            part
            for part in (
                f"out of memory on {_device(run)} ({first_line(error)[:200]})",
                f"the plan takes {amount(peak)} in the {run.planned.moment}: {largest_items(run.planned)}",
                _remedy(run, target),
                begun,
            )
            if part
        )
        raise MemoryError(text) from error


def largest_items(plan: MemoryPlan) -> str:
    """The largest items of a plan in words, largest first."""
    items = sorted(((size, name) for name, size in plan.items.items() if size), reverse=True)
    return ", ".join(f"{name} {amount(size)}" for size, name in items[:_LARGEST_ITEMS])


def _evaluation_bytes(run: Run) -> int:
    """Bytes of an evaluation by `evaluate.prompts` and `evaluate.tasks` on several ranks; 0 where it takes less than a step."""
    settings, config = run.settings, run.config
    if run.ranks.mesh is None or not (settings.evaluate.prompts or settings.evaluate.tasks):
        return 0
    sizes = Sizes(run.trainings[0])
    slots = min(config.sliding_window or config.max_position_embeddings, settings.context_length + settings.evaluate.new_tokens)
    cache = 2 * config.num_hidden_layers * ROWS * slots * config.num_key_value_heads * config.head_dim * sizes.item
    return sizes.share(config.parameters * (sizes.item + sizes.state)) + config.parameters * sizes.item + cache


def _remedy(run: Run, limit: int) -> str:
    """Settings whose plan is at most `limit`, in words."""
    fresh = run.continued is None and not checkpoints(run.out)
    found = fitting_settings(run.trainings, lambda found: found.peak <= limit, least=run.plan.longest_unit, fresh=fresh)
    if not found:
        return "no setting is lean enough: use more GPUs, GPUs with more memory, or a smaller model"
    return "these would fit: " + ", or ".join(f"{fitting} ({amount(fitting.peak)})" for fitting in found)


def _device(run: Run) -> str:
    return f"this rank's {torch.cuda.get_device_name(run.device)}" if run.device.type == "cuda" else "this machine's memory"


def _limit(run: Run) -> int:
    """Bytes that this rank can have; 0 where unknown."""
    if run.device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(run.device)
        return free + torch.cuda.memory_reserved(run.device)
    total, _ = host_memory()
    return total // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
