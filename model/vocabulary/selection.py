"""Selection among candidate pieces: the pieces that many different documents use stay.

Why. BPE's own order counts every occurrence, so a name that one long document repeats comes before a word that many documents
use once. Here repeated uses in one document count less and less.

The method. All documents are encoded with all candidates. The worth of a piece is the sum over documents of the fourth root of
its uses. Then the piece of least worth goes, again and again, until `new_pieces` are left. Only a piece from which no other is
joined may go, so the parts of a piece stay as long as the piece does. Its uses pass to its two halves. Single characters stay
always: a missing one costs a text of another kind three tokens.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import chain, pairwise

import numpy as np
import numpy.typing as npt

CAP = 8000  # characters of a document that count, so that one book does not outweigh many letters
_BATCH = 512  # documents


def select(
    pieces: Sequence[str],
    new_pieces: int,
    texts: Sequence[str],
    encode: Callable[[list[str]], list[list[int]]],
    ids: Sequence[int],
    base_scores: Mapping[str, float],
) -> list[str]:
    """Keep `new_pieces` of the candidates, the most widely used, in their order.

    Args:
        pieces: reachable candidates by falling priority, at least `new_pieces`.
        new_pieces: number of pieces to keep, at least the number of single characters.
        texts: documents, none twice; the first 8,000 characters of each count.
        encode: encodes texts with a model of the base's pieces and `pieces`, in their order.
        ids: the ids of `pieces` in that model.
        base_scores: the base's normal pieces with their scores.
    """
    with ThreadPoolExecutor(1) as pool:
        counting = pool.submit(_uses, texts, encode, ids)  # sentencepiece releases Python's lock: both run at once
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
    """The indices in `pieces` of the two halves of each piece's last join, without base pieces; a character has no halves.

    SentencePiece joins the pair of the highest score, the leftmost among equals. `pieces` rank below the base, in their order.
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
    """Worth of each piece of `ids`: the sum over documents of the fourth root of its uses."""
    first, size = ids[0], ids[-1] + 1 - ids[0]
    uses = np.zeros(size)
    for start in range(0, len(texts), _BATCH):
        encoded = encode([text[:CAP] for text in texts[start : start + _BATCH]])
        document = np.repeat(np.arange(len(encoded)), [len(found_ids) for found_ids in encoded])
        found = np.fromiter(chain.from_iterable(encoded), np.int64, len(document)) - first
        new = found >= 0
        pairs, counts = np.unique(document[new] * size + found[new], return_counts=True)
        uses += np.bincount(pairs % size, weights=counts**0.25, minlength=size)
    return uses[np.array(ids) - first]
