"""A ledger of memory: the bytes held at each moment of a step, and the peak."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

ITEMS = (
    "weights",
    "weight codes",
    "optimizer",
    "gradients",
    "activations",
    "logits",
    "head gradient",
    "transients",
    "gathered parameters",
    "communication",
    "workspaces",
)


def amount(size: int) -> str:
    """Bytes in words."""
    return f"{size / 2**30:.1f} GiB" if size >= 2**30 else f"{size / 2**20:.1f} MiB"


@dataclass(frozen=True)
class MemoryPlan:
    """The peak of a step."""

    items: dict[str, int]  # bytes of each of `ITEMS` at the peak
    moment: str  # the part of the step that runs then

    @property
    def peak(self) -> int:
        """Bytes."""
        return sum(self.items.values())


@dataclass
class Account:
    """Bytes held now, by item, and the largest sum so far."""

    held: dict[str, int] = field(default_factory=lambda: dict.fromkeys(ITEMS, 0))
    total: int = 0
    peak: int = 0
    plan: MemoryPlan = field(default_factory=lambda: MemoryPlan(dict.fromkeys(ITEMS, 0), "nothing"))

    def hold(self, item: str, size: int, moment: str) -> None:
        """Allocate `size` bytes of `item`, until `release`."""
        self.held[item] += size
        self.total += size
        self.pass_by(moment)

    def release(self, item: str, size: int) -> None:
        """Free `size` bytes of `item`."""
        self.held[item] -= size
        self.total -= size
        assert self.held[item] >= 0, f"{item} released twice"

    def pass_by(self, moment: str, transients: int = 0, **items: int) -> None:
        """A moment with more bytes than are held: tensors that come and go."""
        peak = self.total + transients + sum(items.values())
        if peak > self.peak:
            extra = {"transients": transients, **{name.replace("_", " "): size for name, size in items.items()}}
            self.peak = peak
            self.plan = MemoryPlan({name: size + extra.get(name, 0) for name, size in self.held.items()}, moment)

    @contextmanager
    def holding(self, item: str, size: int, moment: str) -> Iterator[None]:
        """Hold `size` bytes of `item` for a while."""
        self.hold(item, size, moment)
        yield
        self.release(item, size)
