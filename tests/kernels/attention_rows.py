"""Shared by the tests of attention: rows of segments around the borders of tiles and windows, and the plain formula."""

from dataclasses import dataclass, replace

import pytest
import torch

from kernels import configurations
from kernels.attention.work import attention_work
from kernels.launch import INTERPRETED
from tests.kernels.conftest import DTYPES
from tests.kernels.error_rule import random

KERNELS = ("attention_forward", "attention_backward", "attention_queries", "attention_keys")


@dataclass(frozen=True)
class Row:
    """A packed row.

    lengths: of each segment. window, tile: of the work lists. heads: (query heads, key/value heads). prefixes: the prefix of
    each segment, -1 for none. padding: places behind the last segment. size: of a head.
    """

    lengths: tuple[int, ...]
    window: int | None
    tile: int
    heads: tuple[int, int] = (1, 1)
    prefixes: tuple[int, ...] | None = None
    padding: int = 0
    size: int = 16

    @property
    def bounds(self) -> list[int]:
        return [0, *torch.tensor(self.lengths, dtype=torch.int64).cumsum(0).tolist()]

    @property
    def tokens(self) -> int:
        return sum(self.lengths) + self.padding

    def work(self, device="cpu"):
        given = {"prefixes": self.prefixes, "tokens": self.tokens, "tile": self.tile}
        return attention_work(self.bounds, self.window, **given).to(device)

    def inputs(self, dtype, device, seed=0) -> list[torch.Tensor]:
        """Query, key and value, views of one packed row, and the gradient of the output."""
        heads, kv_heads = self.heads
        packed = random(self.tokens, heads + 2 * kv_heads, self.size, dtype=dtype, device=device, seed=seed)
        grad = random(self.tokens, heads, self.size, dtype=dtype, device=device, seed=seed + 1)
        return [*packed.split((heads, kv_heads, kv_heads), dim=1), grad]

    def visible(self) -> torch.Tensor:
        """Whether a place (row) sees another (column), by definition: the last `window` places of its text up to itself."""
        seen = torch.zeros((self.tokens, self.tokens), dtype=torch.bool)
        bounds = self.bounds
        for segment in range(len(self.lengths)):
            own = list(range(bounds[segment], bounds[segment + 1]))
            prefix = self.prefixes[segment] if self.prefixes else -1
            text = [*range(bounds[prefix], bounds[prefix + 1]), *own] if prefix >= 0 else own
            for at in range(len(text) - len(own), len(text)):
                first = 0 if self.window is None else max(0, at - self.window + 1)
                seen[text[at], text[first : at + 1]] = True
        return seen


# Lengths around a tile and around a window, and windows from one place to longer than the text.
ROWS = {
    "around a tile": Row((1, 15, 16, 17), 16, 16),
    "around a window": Row((23, 24, 25), 24, 32),
    "window of 1": Row((17, 2), 1, 16),
    "window of 2": Row((18,), 2, 16, (4, 1)),
    "window beyond the text": Row((9,), 128, 32, (3, 1)),
    "no window, nothing, padding": Row((18, 0, 5), None, 16, (4, 2), padding=3),
    "blocks seen whole": Row((75,), 52, 16),
    "shared prompt": Row((20, 13, 17), 64, 16, (2, 2), (-1, 0, 0)),
    "prompt beyond the window": Row((37, 18, 5, 4), 18, 32, (1, 1), (-1, 0, 0, -1), padding=1),
    "prompt that only a tile's first part sees": Row((20, 3, 70), 8, 64, (1, 1), (-1, 0, 0)),
    "empty prompt": Row((0, 9, 17), 16, 16, (1, 1), (-1, 0, 0)),
    "odd head size": Row((21, 5), 8, 16, size=12),
}


# Documents whose last blocks of keys, and of queries, reach into the next document.
NEIGHBOURS = Row((21, 25, 9), 40, 32, (2, 1))
# Reading by descriptors takes the rows behind a range's end along.
WITHOUT_AND_WITH_DESCRIPTORS = pytest.mark.parametrize("descriptors", [False, True])


# On a GPU every row in every dtype; in the interpreter the dtypes alternate.
WITH_DTYPES = [
    pytest.param(name, dtype, id=f"{name}-{str(dtype).removeprefix('torch.')}")
    for number, name in enumerate(ROWS)
    for dtype in (DTYPES[number % 2 :][:1] if INTERPRETED else DTYPES)
]


def small_blocks(monkeypatch, **changed):
    """Give the kernels blocks and parts of tiles of 16 places, so that short rows have many of them.

    changed: further fields of the configurations; default as configured. descriptors: whether rows are read by descriptors.
        passes: of the backward.
    """
    for table in configurations.TABLES.values():
        for name in KERNELS:
            monkeypatch.setitem(table, name, replace(table[name], **{"block": 16, "rows": 16, "warps": 4} | changed))


def plain(query, key, value, seen):
    """(output, log-sum-exp) by torch's own operations. The output of a place that sees nothing is 0."""
    group, seen = query.shape[1] // key.shape[1], seen.to(query.device)
    key, value = key.repeat_interleave(group, dim=1), value.repeat_interleave(group, dim=1)
    score = torch.einsum("qhe,jhe->hqj", query, key) * query.shape[-1] ** -0.5
    nobody = ~seen.any(dim=1, keepdim=True)
    weight = score.masked_fill(~(seen | nobody), float("-inf")).softmax(dim=-1).masked_fill(nobody, 0)
    return torch.einsum("hqj,jhe->qhe", weight, value), score.masked_fill(~seen, float("-inf")).logsumexp(dim=-1)


def plain_gradients(query, key, value, seen, grad):
    leaves = [tensor.detach().requires_grad_() for tensor in (query, key, value)]
    return torch.autograd.grad(plain(*leaves, seen)[0], leaves, grad)


def with_unseen_changed(row, inputs, places):
    """(inputs with large values at every place that `places` do not see, whether each place was changed)."""
    unseen = ~row.visible()[places].any(dim=0).to(inputs[0].device)
    large = 1e2 if inputs[0].dtype == torch.float16 else 1e4
    changed = []
    for number, tensor in enumerate(inputs):
        sign = random(*tensor.shape, dtype=tensor.dtype, device=tensor.device, seed=90 + number).sign()
        changed.append(torch.where(unseen[:, None, None], sign * large, tensor))
    return changed, unseen


def with_nans(inputs, broken):
    """(inputs with NaN at the places of a document, whether each place belongs to another document)."""
    spoilt = [tensor.detach().clone() for tensor in inputs]
    for tensor in spoilt:
        tensor[broken] = float("nan")
    others = torch.ones(len(inputs[0]), dtype=torch.bool)
    others[broken] = False
    return spoilt, others
