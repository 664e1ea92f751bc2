"""Lists of who sees whom: mutants. There is nothing to compile."""

LAUNCHES = {}
MUTANTS = [
    ("own = (max(start, first - reach + 1), last, 0)", "own = (max(start, first - reach), last, 0)"),
    ("own = (max(start, first - reach + 1), last, 0)", "own = (max(0, first - reach + 1), last, 0)"),
    ("own = (max(start, first - reach + 1), last, 0)", "own = (max(start, first - reach + 2), last, 0)"),
    ("shift = start - prefix[1]", "shift = 0"),
    ("max(prefix[0], first - shift - reach + 1)", "max(prefix[0], first - reach + 1)"),
    ("max(prefix[0], first - shift - reach + 1)", "max(0, first - shift - reach + 1)"),
    ("    if before[0] >= before[1]:\n        return [own]\n", ""),
    ("ranges = [(first, min(end, last - 1 + reach), 0)]", "ranges = [(first, min(end, last + reach), 0)]"),
    ("ranges = [(first, min(end, last - 1 + reach), 0)]", "ranges = [(first, last - 1 + reach, 0)]"),
    ("stop = min(stop, last - 1 + shift + reach)", "stop = min(stop, last - 1 + reach)"),
    ("        if stop <= start:\n            continue\n", ""),
    ("        if shift == 0:\n", "        if False:\n"),
    ("for first in range(start, end, tile):", "for first in range(start - start % tile, end, tile):"),
    ("key=lambda tile: -sum(", "key=lambda tile: sum("),
    ("len(ranges) + len(own)))", "len(ranges) + len(own) - 1))"),
    ("[(0, 0, 0)] * (-len(ranges) % _PADDING)", "[]"),
]
