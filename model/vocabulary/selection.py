"""Which of more candidates than there is room for are worth a piece: those that many different texts use.

BPE's own order counts every occurrence, so that a name that one long document repeats comes before a word that many
documents use once. Here an occurrence counts the less the more there are in the same document.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import chain, pairwise

import numpy as np
import numpy.typing as npt

CAP = 8000  # characters of a document that count; one book says no more about other texts than one letter
_BATCH = 512  # documents


def select(
    pieces: Sequence[str],
    new_pieces: int,
    texts: Sequence[str],
    encode: Callable[[list[str]], list[list[int]]],
    ids: Sequence[int],
    base_scores: Mapping[str, float],
) -> list[str]:
    """Keep `new_pieces` of the candidates, those that are used most widely, in their order.

    The worth of a piece is the sum over documents of the fourth root of its uses, where a document is written with all
    candidates. The least worth goes, again and again, and always one that no other is joined from: so
    what a piece is built from stays as long as the piece does, and no longer. Its uses go over to its two halves.
    Characters stay: each that is missing costs a text of another kind three tokens.

    Args:
        pieces: reachable candidates by falling priority, no fewer than `new_pieces`.
        new_pieces: how many to keep, no fewer than the characters among them.
        texts: documents, none twice; the first 8,000 characters of each count.
        encode: gives the ids of texts by a model of the base's pieces and `pieces`, in their order.
        ids: those of `pieces` in that model.
        base_scores: the base's pieces that text encodes to, with their scores.
    """
    with ThreadPoolExecutor(1) as pool:
        counting = pool.submit(_uses, texts, encode, ids)  # outside Python's lock, so that halves are found beside it
        halves = _halves(pieces, base_scores)
        uses = counting.result().tolist()
    parents = np.bincount(list(chain(*halves)), minlength=len(pieces)).tolist()
    kept = [True] * len(pieces)
    leaves = [(uses[place], -place) for place, piece in enumerate(pieces) if len(piece) > 1 and not parents[place]]
    heapq.heapify(leaves)
    for _ in range(len(pieces) - new_pieces):
        place = -heapq.heappop(leaves)[1]
        kept[place] = False
        for half in halves[place]:
            uses[half] += uses[place]
            parents[half] -= 1
            if not parents[half] and len(pieces[half]) > 1:
                heapq.heappush(leaves, (uses[half], -half))
    return [piece for piece, stays in zip(pieces, kept, strict=True) if stays]


def _halves(pieces: Sequence[str], base_scores: Mapping[str, float]) -> list[list[int]]:
    """What each piece of two or more characters is joined from in the end: the places of those halves that are `pieces`.

    SentencePiece joins the pair of the highest score, the leftmost of equals. Pieces rank below the base, by their order.
    """
    places = {piece: place for place, piece in enumerate(pieces)}
    lowest = min(base_scores.values())
    score = {**base_scores, **{piece: lowest - 1 - place for piece, place in places.items()}}.get
    halves = []
    for piece in pieces:
        symbols = list(piece)
        joined = [score(left + right, -math.inf) for left, right in pairwise(symbols)]
        while len(joined) > 1:
            place = joined.index(max(joined))
            symbols[place] += symbols.pop(place + 1)
            del joined[place]
            if place:
                joined[place - 1] = score(symbols[place - 1] + symbols[place], -math.inf)
            if place < len(joined):
                joined[place] = score(symbols[place] + symbols[place + 1], -math.inf)
        halves.append([places[half] for half in symbols if half in places] if joined else [])
    return halves


def _uses(texts: Sequence[str], encode: Callable[[list[str]], list[list[int]]], ids: Sequence[int]) -> npt.NDArray[np.float64]:
    """Sum over documents of the fourth root of the count, for each piece by its id."""
    first, size = ids[0], ids[-1] + 1 - ids[0]
    uses = np.zeros(size)
    for start in range(0, len(texts), _BATCH):
        encoded = encode([text[:CAP] for text in texts[start : start + _BATCH]])
        document = np.repeat(np.arange(len(encoded)), [len(of_one) for of_one in encoded])
        found = np.fromiter(chain.from_iterable(encoded), np.int64, len(document)) - first
        new = found >= 0
        pairs, counts = np.unique(document[new] * size + found[new], return_counts=True)
        uses += np.bincount(pairs % size, weights=counts**0.25, minlength=size)
    return uses[np.array(ids) - first]
