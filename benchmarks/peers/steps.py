"""The steps that a peer trains on, read from the file that `benchmarks.synthetic.export_steps` wrote.

T: places of a micro-batch.
"""

import itertools
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

IGNORED = -100


@dataclass(frozen=True, eq=False)
class Row:
    """One packed micro-batch; tensors are int64."""

    tokens_T: Tensor
    labels_T: Tensor  # shifted already; -100 where not trained
    positions_T: Tensor  # from 0 in each document
    lengths: list[int]  # places of each document


@dataclass(frozen=True)
class Document:
    """A whole document: one token more than its places."""

    ids: list[int]
    trained: list[bool]  # whether each token is predicted

    @property
    def prompt(self) -> int:
        """Tokens before the first predicted token."""
        return self.trained.index(True)


class Steps:
    """All steps of a job. `len` is their number."""

    def __init__(self, path: str | Path) -> None:
        data = load_file(path)
        self._tokens, self._labels, self._weight = data["tokens"], data["labels"], data["weight"]
        self._documents: list[int] = data["document_bounds"].tolist()
        self._batches: list[int] = data["batch_bounds"].tolist()
        self._steps: list[int] = data["step_bounds"].tolist()

    def __len__(self) -> int:
        return len(self._steps) - 1

    def rows(self, step: int) -> list[Row]:
        """The micro-batches of a step."""
        found = []
        for batch in range(self._steps[step], self._steps[step + 1]):
            bounds = self._documents[self._batches[batch] : self._batches[batch + 1] + 1]
            places = slice(bounds[0], bounds[-1])
            lengths = [end - start for start, end in itertools.pairwise(bounds)]
            labels_T = self._labels[places].masked_fill(self._weight[places] == 0, IGNORED)
            found.append(Row(self._tokens[places], labels_T, torch.cat([torch.arange(n) for n in lengths]), lengths))
        return found

    def trained(self, step: int) -> float:
        """Sum of the weights of a step: the denominator of its loss."""
        first, last = (self._documents[self._batches[self._steps[at]]] for at in (step, step + 1))
        return float(self._weight[first:last].sum())

    def documents(self, step: int) -> list[Document]:
        """The documents of a step, in order; of a preference pair first the chosen one."""
        found = []
        for document in range(self._batches[self._steps[step]], self._batches[self._steps[step + 1]]):
            start, end = self._documents[document : document + 2]
            ids = [*self._tokens[start:end].tolist(), int(self._labels[end - 1])]
            found.append(Document(ids, [False, *(self._weight[start:end] != 0).tolist()]))
        return found

    @property
    def longest(self) -> int:
        """Tokens of the longest document."""
        return max(end - start for start, end in itertools.pairwise(self._documents)) + 1
