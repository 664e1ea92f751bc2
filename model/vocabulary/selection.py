"""Which of more candidates than there is room for are worth a piece: those that many different texts use.

BPE's own order counts every occurrence, so that a name that one long document repeats comes before a word that many
documents use once. Here an occurrence counts the less the more there are in the same document.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise

import numpy as np
import numpy.typing as npt

CAP = 8000  # characters of a document that count; one book says no more about other texts than one letter
_BATCH = 512  # documents


def select(
    pieces: Sequence[str],
    new_pieces: int,
    texts: Sequence[str],
    encode: Callable[[list[str]], list[list[int]]],
    base_size: int,
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
        encode: gives the ids of texts by a model of the base's pieces with `pieces` appended.
        base_size: the id of the first of `pieces`.
        base_scores: the base's pieces that text encodes to, with their scores.
    """
    halves = _halves(pieces, base_scores)
    index = {piece: place for place, piece in enumerate(pieces)}
    uses = _uses(texts, encode, base_size, len(pieces))
    parts = [[index[half] for half in halves.get(piece, ()) if half in index] for piece in pieces]
    parents = np.bincount([half for both in parts for half in both], minlength=len(pieces))
    kept = [True] * len(pieces)
    leaves = [(uses[place], -place) for place, piece in enumerate(pieces) if piece in halves and not parents[place]]
    heapq.heapify(leaves)
    for _ in range(len(pieces) - new_pieces):
        place = -heapq.heappop(leaves)[1]
        kept[place] = False
        for half in parts[place]:
            uses[half] += uses[place]
            parents[half] -= 1
            if not parents[half] and pieces[half] in halves:
                heapq.heappush(leaves, (uses[half], -half))
    return [piece for piece, stays in zip(pieces, kept, strict=True) if stays]


def _halves(pieces: Sequence[str], base_scores: Mapping[str, float]) -> dict[str, tuple[str, str]]:
    """What each piece of two or more characters is joined from in the end.

    SentencePiece joins the pair of the highest score, the leftmost of equals. Pieces rank below the base, by their order.
    """
    scores = dict(base_scores)
    lowest = min(base_scores.values())
    for place, piece in enumerate(pieces):
        scores[piece] = lowest - 1 - place
    halves = {}
    for piece in pieces:
        symbols = list(piece)
        while len(symbols) > 2:
            joined = [scores.get(left + right, -math.inf) for left, right in pairwise(symbols)]
            place = joined.index(max(joined))
            symbols[place : place + 2] = [symbols[place] + symbols[place + 1]]
        if len(piece) > 1:
            halves[piece] = (symbols[0], symbols[1])
    return halves


def _uses(
    texts: Sequence[str], encode: Callable[[list[str]], list[list[int]]], base_size: int, size: int
) -> npt.NDArray[np.float64]:
    """Sum over documents of the fourth root of the count, for each piece from the id `base_size` on."""
    uses = np.zeros(size)
    for start in range(0, len(texts), _BATCH):
        encoded = encode([text[:CAP] for text in texts[start : start + _BATCH]])
        ids = np.concatenate([np.array(of_one, dtype=np.int64) for of_one in encoded])
        document = np.repeat(np.arange(len(encoded)), [len(of_one) for of_one in encoded])
        new = ids >= base_size
        pairs, counts = np.unique(document[new] * size + ids[new] - base_size, return_counts=True)
        uses += np.bincount(pairs % size, weights=counts**0.25, minlength=size)
    return uses
