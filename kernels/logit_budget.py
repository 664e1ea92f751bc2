"""How many rows of logits the head holds at once, and whether it keeps their gradients, under a budget in bytes."""

from typing import Literal, NamedTuple, get_args

import torch

from kernels import TILE

Mode = Literal["auto", "keep", "recompute"]


class Plan(NamedTuple):
    """keep: whether the logits' gradients of all rows are kept. chunk: rows whose logits exist at once."""

    keep: bool
    chunk: int


def default_budget(device: torch.device) -> int:
    """Bytes for logits and their gradients: 2.5 GiB on CUDA, enough to keep 8,192 rows of 120,064; elsewhere 32 MiB.

    On a CPU larger arrays are slower: glibc maps them anew each time, and the page faults cost more than the product.
    """
    return 5 * 2**29 if device.type == "cuda" else 2**25


def sum_of_parts(weight_elements: int, itemsize: int, *, kernels: bool) -> int:
    """Bytes of the float32 sum of the head's gradient where parts make it, beyond the gradient itself.

    0 for float32 weights, whose gradient is this sum, and for eager functions, which make parts in any case.
    """
    return weight_elements * 4 if kernels and itemsize < 4 else 0


def plan(
    rows: int,  # listed rows, padding included
    vocab: int,  # rows of the weight, padding included
    itemsize: int,  # of the inputs' dtype
    budget_bytes: int,
    mode: Mode = "auto",  # auto keeps the gradients if they fit
    *,
    backward: bool = True,  # False keeps nothing
    sum_bytes: int = 0,  # of the sum of the weight's gradient, which parts need and kept gradients save
) -> Plan:
    """What to keep, and how many rows' logits may exist at once under a budget.

    Keeping may go beyond the budget by `sum_bytes`: parts would hold the sum on top of the budget, and add to it over and over.

    Raises: ValueError for an unknown mode, and for a budget too small for the mode.
    """
    if mode not in get_args(Mode):
        raise ValueError(f"mode = {mode!r}: must be one of {', '.join(get_args(Mode))}")
    logits, gradient = vocab * max(4, itemsize), vocab * itemsize
    row = logits + gradient if backward else logits
    if budget_bytes < row:
        raise ValueError(f"budget_bytes = {budget_bytes}: one row of {vocab} takes {row}; give at least that")
    if backward and mode != "recompute":
        for room in (budget_bytes, budget_bytes + sum_bytes):
            chunk = _whole_tiles((room - rows * gradient) // logits, rows)
            if chunk >= min(rows, 1 if mode == "keep" else TILE):
                return Plan(True, max(1, chunk))
        if mode == "keep":
            raise ValueError(
                f"budget_bytes = {budget_bytes}: to keep {rows} rows of {vocab} takes {rows * gradient + logits}; give that or "
                f"mode = 'recompute'"
            )
    return Plan(False, max(1, _whole_tiles(budget_bytes // row, rows)))


def _whole_tiles(room: int, rows: int) -> int:
    """Rows of a chunk: whole tiles if the room has any, so that matrix products stay efficient."""
    if room >= rows:
        return rows
    return room // TILE * TILE if room >= TILE else room
