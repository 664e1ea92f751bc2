"""Counts the operations that real code runs."""

from collections import Counter

import torch
from torch.utils._python_dispatch import TorchDispatchMode

_PRODUCTS = [getattr(packet, name) for packet in (torch.ops.aten.mm, torch.ops.aten.addmm) for name in packet.overloads()]


class Operations(TorchDispatchMode):
    """calls: of each operation, inside and outside of backward passes."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[torch._ops.OpOverload] = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.calls[function] += 1
        return function(*args, **(kwargs or {}))

    @property
    def products(self) -> int:
        """Matrix products."""
        return sum(self.calls[product] for product in _PRODUCTS)
