"""Packs of texts whose common beginnings are computed once.

Attention shares one level of prefixes (`kernels.attention.work`): [prefix | own | own | ...], where each own part continues the
prefix. Which texts share which prefix is decided for all texts together: sorted, texts with a common beginning stand side by
side, and their common beginnings form a tree, of which the nodes that save the most places are computed. So few-shot examples
that hundreds of questions begin with are one prefix, and so is the context of four answers whose examples no other text has.

A pack holds whole groups. A group that is larger is cut into several packs, each with the prefix anew; the saving counts that.

Shapes: T places of a pack.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from engine.data.packing import pack_best_fit
from kernels.attention.work import AttentionWork, attention_work


@dataclass(frozen=True)
class Part:
    """A text in a pack: its first places are the prefix's, the others its own."""

    text: int  # number among the given texts
    prefix: int  # first place of the prefix in the pack
    shared: int  # places of the prefix; 0 without one
    own: int  # first place of its own
    length: int  # places of the whole text

    def place(self, index: int) -> int:
        """The place in the pack of the text's token `index`."""
        return self.prefix + index if index < self.shared else self.own + index - self.shared

    def places(self) -> np.ndarray:
        """The places of all tokens of the text, int64 [length]."""
        before = min(self.shared, self.length)
        return np.concatenate(
            (np.arange(self.prefix, self.prefix + before), np.arange(self.own, self.own + self.length - before))
        )


@dataclass(frozen=True, eq=False)
class Pack:
    """One packed row of texts, on the CPU."""

    tokens_T: Tensor  # int64
    positions_T: Tensor  # int32, counted from 0 in each text
    bounds: tuple[int, ...]  # of the segments, [0, ..., T]
    prefixes: tuple[int, ...]  # index of the segment that each segment continues, -1 for none
    parts: tuple[Part, ...]

    @property
    def places(self) -> int:
        """Places to compute."""
        return self.bounds[-1]

    def work(self, window: int | None, tokens: int | None = None) -> AttentionWork:
        """The attention's work lists; places up to `tokens` are padding."""
        return attention_work(self.bounds, window, prefixes=self.prefixes, tokens=tokens)


@dataclass(frozen=True)
class _Group:
    """Sorted texts, by their places in the order, that share a prefix."""

    texts: list[int]
    shared: int


@dataclass(frozen=True)
class _Node:
    """A common beginning of neighbours in the sorted order."""

    shared: int
    texts: list[int]  # those that have no longer beginning in common with a neighbour
    children: "list[_Node]"


def pack_texts(texts: Sequence[Sequence[int]], pack_tokens: int) -> list[Pack]:
    """Pack texts of token ids, all of them once, so that common beginnings are computed once.

    A text that equals another, or begins it, has the other's places. A text longer than `pack_tokens` gets a pack of its own.
    The packs depend on texts and `pack_tokens` alone; the largest come first.

    Raises: ValueError for an empty text, and for `pack_tokens` below 1.
    """
    if pack_tokens < 1:
        raise ValueError(f"pack_tokens = {pack_tokens}: must be at least 1")
    if any(len(text) == 0 for text in texts):
        raise ValueError("a text without tokens cannot be packed: begin it with the beginning-of-sequence token")
    if not texts:
        return []
    # Big-endian bytes sort as the ids do.
    keys = [np.asarray(text, dtype=">u4").tobytes() for text in texts]
    order = sorted(range(len(texts)), key=keys.__getitem__)
    # A text that begins another stands right before it, and is read with it.
    owners: list[list[int]] = []
    for number in order:
        if owners and keys[number].startswith(keys[owners[-1][-1]]):
            owners[-1].append(number)
        else:
            owners.append([number])
    ids = [np.frombuffer(keys[numbers[-1]], dtype=">u4") for numbers in owners]
    units = [unit for group in _groups(ids, pack_tokens) for unit in _cut(group, ids, pack_tokens)]
    sizes = [unit.shared + sum(len(ids[text]) - unit.shared for text in unit.texts) for unit in units]
    # To the packing, a text that is too long fills a pack.
    packs = pack_best_fit([min(size, pack_tokens) for size in sizes], pack_tokens)
    packs.sort(key=lambda pack: -sum(sizes[at] for at in pack))
    return [_made([units[at] for at in pack], ids, owners, texts) for pack in packs]


def _groups(ids: list[np.ndarray], pack_tokens: int) -> list[_Group]:
    """The groups that compute the fewest places; a text without a group's prefix is a group alone.

    Each text continues the deepest node above it whose prefix is computed. `saved` of a node has an entry for each node above
    it: the places that the texts below save, were that the deepest one computed so far. From the leaves up, it is the better of
    computing the node's own prefix too, and not. A prefix of many texts is computed once for each pack that they fill.
    """
    nodes = _preorder(_tree(ids))
    saved: dict[int, np.ndarray] = {}
    computed: dict[int, np.ndarray] = {}
    own: dict[int, tuple[int, int]] = {}  # (texts below a node, their tokens)
    for node, above in reversed(nodes):
        below = [saved[id(child)] for child in node.children]
        lengths = [own[id(child)] for child in node.children] + [(1, len(ids[text])) for text in node.texts]
        count, tokens = map(sum, zip(*lengths, strict=True))
        total = np.sum([len(node.texts) * np.array([*above, node.shared]), *below], axis=0)
        packs = max(1, -(-(tokens - count * node.shared) // max(1, pack_tokens - node.shared)))
        with_prefix = total[-1] - packs * node.shared
        computed[id(node)] = with_prefix > total[:-1]
        saved[id(node)] = np.maximum(with_prefix, total[:-1])
        own[id(node)] = count, tokens
    found: list[_Group] = []
    root = nodes[0][0]
    open_nodes: list[tuple[_Node, int, _Group | None]] = [(root, 0, None)]  # with the deepest computed prefix above
    while open_nodes:
        node, ancestor, group = open_nodes.pop()
        if node is not root and computed[id(node)][ancestor]:
            ancestor, group = len(computed[id(node)]), _Group([], node.shared)
            found.append(group)
        if group is None:
            found += [_Group([text], 0) for text in node.texts]
        else:
            group.texts.extend(node.texts)
        open_nodes += [(child, ancestor, group) for child in reversed(node.children)]
    return found


def _tree(ids: list[np.ndarray]) -> _Node:
    """The tree of common beginnings; its root is the empty beginning."""
    stack = [_Node(0, [], [])]
    for at, text in enumerate(ids):
        shared = _common(ids[at - 1], text) if at else 0
        closed = None
        while stack[-1].shared > shared:
            closed = stack.pop()
            if stack[-1].shared >= shared:
                stack[-1].children.append(closed)
        if stack[-1].shared < shared:
            # A new node begins with the node just closed, which has a longer beginning, or with the text before.
            node = _Node(shared, [], [closed]) if closed else _Node(shared, [stack[-1].texts.pop()], [])
            stack.append(node)
        stack[-1].texts.append(at)
    while len(stack) > 1:
        closed = stack.pop()
        stack[-1].children.append(closed)
    return stack[0]


def _preorder(root: _Node) -> list[tuple[_Node, tuple[int, ...]]]:
    """Each node with the lengths of the beginnings above it, a node before its children."""
    found: list[tuple[_Node, tuple[int, ...]]] = []
    unseen: list[tuple[_Node, tuple[int, ...]]] = [(root, ())]
    while unseen:
        node, above = unseen.pop()
        found.append((node, above))
        unseen += [(child, (*above, node.shared)) for child in node.children]
    return found


def _common(one: np.ndarray, two: np.ndarray) -> int:
    """Length of the common beginning."""
    least = min(len(one), len(two))
    different = np.flatnonzero(one[:least] != two[:least])
    return int(different[0]) if len(different) else least


def _cut(group: _Group, ids: list[np.ndarray], pack_tokens: int) -> list[_Group]:
    """A group in portions that fit a pack, each with the prefix."""
    portions: list[list[int]] = []
    size = 0
    for text in group.texts:
        own = len(ids[text]) - group.shared
        if not portions or size + own > pack_tokens:
            portions.append([])
            size = group.shared
        portions[-1].append(text)
        size += own
    # A single text needs no prefix.
    return [_Group(texts, group.shared if len(texts) > 1 else 0) for texts in portions]


def _made(units: list[_Group], ids: list[np.ndarray], owners: list[list[int]], texts: Sequence[Sequence[int]]) -> Pack:
    tokens: list[np.ndarray] = []
    positions: list[np.ndarray] = []
    bounds, prefixes, parts = [0], [], []

    def add(text: np.ndarray, start: int, prefix: int) -> int:
        """Add a segment; its first place."""
        tokens.append(text[start:].astype(np.int64))
        positions.append(np.arange(start, len(text), dtype=np.int32))
        prefixes.append(prefix)
        bounds.append(bounds[-1] + len(text) - start)
        return bounds[-2]

    for unit in units:
        segment, at_prefix = -1, 0
        if unit.shared:
            segment = len(prefixes)
            at_prefix = add(ids[unit.texts[0]][: unit.shared], 0, -1)
        for at in unit.texts:
            own = add(ids[at], unit.shared, segment)
            parts += [Part(number, at_prefix, unit.shared, own, len(texts[number])) for number in owners[at]]
    return Pack(
        tokens_T=torch.from_numpy(np.concatenate(tokens)),
        positions_T=torch.from_numpy(np.concatenate(positions)),
        bounds=tuple(bounds),
        prefixes=tuple(prefixes),
        parts=tuple(parts),
    )
