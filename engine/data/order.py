"""The order of a source's units, epoch after epoch. An epoch is shuffled when it is read, so a long run costs no more."""

import hashlib
from functools import lru_cache

import numpy as np

# The epoch that a step reads, and the one before or after it.
_KEPT_EPOCHS = 2
# Units between two known numbers of places: a look-up adds up at most this many.
_BLOCK = 1024


class SourceOrder:
    """The units of a source in the order of its epochs, each shuffled by (seed, source, epoch).

    Units are counted through all epochs: unit `count * e + i` is the i-th of epoch e.
    """

    def __init__(
        self,
        sizes: np.ndarray | None,  # places of each unit; None: each unit counts 1, as pairs do
        count: int,  # units of the source
        seed: int,
        source: int,  # index of the source
    ):
        self.count = count
        self.total = count if sizes is None else int(sizes.sum())
        self.longest = 1 if sizes is None else int(sizes.max())
        self._sizes, self._key = sizes, (seed, source)
        self._epoch = lru_cache(_KEPT_EPOCHS)(self._shuffled)

    def units(self, first: int, stop: int) -> np.ndarray:
        """The units `first` to `stop`, as indices into the source: uint32 (or uint64) [stop - first]."""
        parts = []
        while first < stop:
            epoch, begin = divmod(first, self.count)
            end = min(self.count, begin + stop - first)
            parts.append(self._epoch(epoch)[0][begin:end])
            first += end - begin
        return np.concatenate(parts) if parts else np.empty(0, dtype=np.uint32)

    def counted(self, units: np.ndarray) -> np.ndarray:
        """The part of a step that each given unit takes: 1 for a pair, its places for a segment; int64 [units]."""
        return np.ones(len(units), dtype=np.int64) if self._sizes is None else self._sizes[units].astype(np.int64)

    def start(self, unit: int) -> int:
        """Places (pairs) before a unit."""
        epoch, index = divmod(unit, self.count)
        if self._sizes is None or not index:
            return epoch * self.total + (index if self._sizes is None else 0)
        order, marks = self._epoch(epoch)
        block = index // _BLOCK
        return epoch * self.total + int(marks[block]) + int(self._sizes[order[block * _BLOCK : index]].sum())

    def first_at(self, place: int) -> int:
        """The first unit that begins at or after a place (pair)."""
        epoch, rest = divmod(place, self.total)
        if self._sizes is None or not rest:
            return epoch * self.count + (rest if self._sizes is None else 0)
        order, marks = self._epoch(epoch)
        # The block of the last unit that begins before `place`; the sum goes through the units of this block.
        block = int(np.searchsorted(marks, rest, side="left")) - 1
        sizes = self._sizes[order[block * _BLOCK : (block + 1) * _BLOCK]].astype(np.int64)
        starts = int(marks[block]) + np.cumsum(sizes) - sizes
        return epoch * self.count + block * _BLOCK + int(np.searchsorted(starts, rest, side="left"))

    def sum_of(self, values: np.ndarray, stop: int) -> int:
        """The sum of a value of each unit over all units before `stop`."""
        epochs, rest = divmod(stop, self.count)
        return epochs * int(values.sum()) + (int(values[self._epoch(epochs)[0][:rest]].sum()) if rest else 0)

    def _shuffled(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """The units of an epoch in order, and the places before every `_BLOCK`-th."""
        seed, source = self._key
        order = shuffle(self.count, seed, source, epoch).astype(np.uint32 if self.count <= 2**32 else np.uint64)
        if self._sizes is None:
            return order, np.empty(0, dtype=np.int64)
        blocks = np.add.reduceat(self._sizes[order], np.arange(0, self.count, _BLOCK), dtype=np.int64)
        return order, np.cumsum(blocks) - blocks


def shuffle(count: int, seed: int, source: int, epoch: int) -> np.ndarray:
    """A permutation of range(count), keyed by (seed, source, epoch).

    Sorts outputs of SplitMix64 (Steele, Lea, Flood 2014). They are distinct for distinct counters and the same in every NumPy
    release; NumPy's own generators do not promise that.
    """
    key = hashlib.sha256(f"{seed} {source} {epoch}".encode()).digest()
    mixed = np.arange(count, dtype=np.uint64)
    mixed *= np.uint64(0x9E3779B97F4A7C15)
    mixed += np.uint64(int.from_bytes(key[:8], "little"))
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        mixed ^= mixed >> np.uint64(shift)
        mixed *= np.uint64(factor)
    mixed ^= mixed >> np.uint64(31)
    return np.argsort(mixed)
