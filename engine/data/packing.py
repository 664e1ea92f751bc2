"""Best-fit packing: which segments share a micro-batch, and which rank takes it."""

from bisect import bisect_left, insort
from collections.abc import Sequence


def pack_best_fit(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Pack items into as few bins as best-fit decreasing finds (at most 11/9 of the optimum plus a constant: Johnson 1973).

    Takes items by decreasing length, equal lengths in their order. Each item goes into the fullest bin that has room, the
    oldest among equally full bins.
    Returns: the items' indices per bin, bins in the order of their opening.

    Raises: ValueError where an item is longer than `capacity`.
    """
    bins: list[list[int]] = []
    # (room, bin), sorted: the first entry with room >= length is the best fit.
    rooms: list[tuple[int, int]] = []
    for item in sorted(range(len(lengths)), key=lambda index: -lengths[index]):
        length = lengths[item]
        if length > capacity:
            raise ValueError(f"an item of {length} does not fit a pack of {capacity}")
        at = bisect_left(rooms, (length, -1))
        if at == len(rooms):
            room, bin = capacity, len(bins)
            bins.append([])
        else:
            room, bin = rooms.pop(at)
        bins[bin].append(item)
        if room > length:
            insort(rooms, (room - length, bin))
    return bins


def deal(packs: list[list[int]], lengths: Sequence[int], ranks: int) -> list[list[list[int]]]:
    """Deal packs to ranks: the same number to each rank, and packs of about equal size at the same turn.

    Halves the fullest packs of several items until the number of packs is a multiple of `ranks`. Too few items leave some
    ranks with an empty pack. Deterministic.
    """
    packs = [list(pack) for pack in packs]

    def filled(pack: list[int]) -> int:
        return sum(lengths[item] for item in pack)

    while len(packs) % ranks:
        divisible = [index for index, pack in enumerate(packs) if len(pack) > 1]
        if not divisible:
            packs.append([])
            continue
        fullest = max(divisible, key=lambda index: (filled(packs[index]), -index))
        halves: list[list[int]] = [[], []]
        for item in sorted(packs[fullest], key=lambda item: -lengths[item]):
            min(halves, key=filled).append(item)
        packs[fullest] = halves[0]
        packs.append(halves[1])
    if ranks > 1:
        packs.sort(key=filled, reverse=True)
    return [packs[rank::ranks] for rank in range(ranks)]
