"""Launches over more elements than the interpreter can walk through."""

from unittest.mock import patch

import torch
from triton.runtime.interpreter import interpreter_builder

import kernels.launch


def launch_last_program(kernel, grid, *arguments, **keywords):
    """In place of `launch`: the interpreter runs only the last program of the grid, a GPU runs all programs."""
    if not kernels.launch.INTERPRETED:
        return kernels.launch.launch(kernel, grid, *arguments, **keywords)

    def place_at_the_end(x, y, z):
        interpreter_builder.grid_idx = tuple(programs - 1 for programs in (*grid, 1, 1)[:3])

    with patch.object(interpreter_builder, "set_grid_idx", place_at_the_end):
        return kernels.launch.launch(kernel, (1,) * len(grid), *arguments, **keywords)


def vast(elements, dtype, device):
    """Zeros on a GPU; for the interpreter, memory without values: its last program touches only the end."""
    if device.type == "cuda":
        return torch.zeros(elements, dtype=dtype, device=device)
    torch.utils.deterministic.fill_uninitialized_memory = False
    tensor = torch.empty(elements, dtype=dtype)
    torch.utils.deterministic.fill_uninitialized_memory = True
    return tensor
