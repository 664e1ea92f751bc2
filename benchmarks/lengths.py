"""Lengths of documents as they are in real data, and the ways to pack them that ours is compared with."""

from bisect import bisect_left
from collections.abc import Callable, Sequence

import numpy as np

from engine.data.packing import pack_best_fit

# Places of a document (of both sides of a pair) at percentiles of public data, in tokens of Mistral 7B's tokenizer.
_PERCENTILES = (0, 1, 2, 5, 10, 20, 30, 40, 50, 60, 70, 80, 90, 95, 98, 99, 100)
_PLACES: dict[str, tuple[int, ...]] = {
    # 505 books, articles, dialogues, laws and pages of documentation: Aozora Bunko, Japanese Wikipedia (JaQuAD),
    # RealPersonaChat, English classics, documentation of Python, Rust, Visual Studio.
    "text": (52, 183, 242, 327, 526, 663, 750, 831, 933, 1073, 2064, 3866, 8603, 15084, 36971, 43610, 58633),
    # 11,350 instructions: GPTeacher, Self-Instruct seeds, JaQuAD, NIILC.
    "instructions": (19, 27, 31, 38, 60, 109, 137, 168, 209, 295, 423, 540, 692, 805, 917, 981, 1460),
    # 6,169 conversations: FastChat's examples, DSTC8, megagonlabs/instruction_ja, RealPersonaChat.
    "conversations": (28, 36, 39, 57, 105, 214, 285, 355, 434, 597, 819, 943, 1064, 1141, 1219, 1268, 1532),
    # 3,553 pairs: hh-rlhf (harmless), megagonlabs/instruction_ja, Japanese MT-Bench, Rakuda.
    "preferences": (38, 56, 66, 86, 116, 171, 233, 293, 357, 428, 519, 658, 877, 1049, 1266, 1449, 2535),
}
DISTRIBUTIONS = tuple(_PLACES)


def sample(distribution: str, count: int, seed: int = 0) -> np.ndarray:
    """Places of `count` documents (pairs, for "preferences"), int64, drawn from between the percentiles."""
    at = np.random.default_rng(seed).uniform(0, 100, count)
    return np.interp(at, _PERCENTILES, _PLACES[distribution]).astype(np.int64)


def segments(places: np.ndarray, longest: int) -> list[int]:
    """Documents cut into segments of at most `longest` places, as a plan cuts them."""
    return [part for length in places.tolist() for part in [longest] * (length // longest) + [length % longest] if part]


def first_fit(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Each item, in its order, into the oldest pack that has room."""
    packs: list[list[int]] = []
    # A binary tree over the packs, each node the most room below it; the leaf of pack i is node `leaves + i`.
    leaves = 1 << max(0, len(lengths) - 1).bit_length()
    room = [capacity] * (2 * leaves)
    for item, length in enumerate(lengths):
        node = 1
        while node < leaves:
            node = 2 * node if room[2 * node] >= length else 2 * node + 1
        if node - leaves == len(packs):
            packs.append([])
        packs[node - leaves].append(item)
        room[node] -= length
        while node > 1:
            node //= 2
            room[node] = max(room[2 * node], room[2 * node + 1])
    return packs


def first_fit_decreasing(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """`first_fit` with the longest items first."""
    order = sorted(range(len(lengths)), key=lambda item: -lengths[item])
    return [[order[at] for at in pack] for pack in first_fit([lengths[item] for item in order], capacity)]


def sequential(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Items in their order, a new pack where the next one does not fit (next-fit)."""
    packs: list[list[int]] = []
    ends = np.cumsum(lengths).tolist()
    start = before = 0
    while start < len(lengths):
        end = bisect_left(ends, before + capacity + 1, lo=start)
        packs.append(list(range(start, end)))
        start, before = end, ends[end - 1]
    return packs


PACKERS: dict[str, Callable[[Sequence[int], int], list[list[int]]]] = {
    "komainu, best-fit decreasing": pack_best_fit,
    "first-fit decreasing": first_fit_decreasing,
    "first-fit": first_fit,
    "sequential": sequential,
}


def padded_utilisation(lengths: Sequence[int], rows: int) -> float:
    """Share of places that are not padding in rectangles of `rows` documents, each as long as its longest."""
    rectangles = [lengths[start : start + rows] for start in range(0, len(lengths), rows)]
    return sum(lengths) / sum(len(rectangle) * max(rectangle) for rectangle in rectangles)
