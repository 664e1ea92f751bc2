"""Embedding and head rows for the pieces that a merge added.

A new piece stands for several base pieces, its sub-pieces, which spelled the same text before. Its rows start from theirs:

    weighted    mean weighted by place, scaled to the length of the sub-pieces' rows, plus noise
    mean        plain mean
    random      normal, with each column's mean and standard deviation in the base
    distilled   as weighted, then trained on text (see `model.vocabulary.distill`)

Why weights: a plain mean gives です and すで, which have the same sub-pieces, the same rows, and nothing tells them apart
before training. In the head the first sub-piece weighs most, as the new piece must win where that sub-piece won. In the
embedding the last weighs most, as the model predicted the following text from it. Why noise: repetitions (ああ and あああ)
have equal means under any weights; 1 % of a typical row separates them.

Both matrices are padded to whole tiles of the kernels' products. A padding row is the mean of the base's rows: its score is
average beside any hidden state, should a reader forget to exclude it.

Shapes: N new pieces, D width, B rows of the base, V rows with padding.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from kernels import padded_to_tiles
from model.config import MistralConfig, write_config
from model.tensor_file import TensorStream
from model.vocabulary.distill import Distillation, distill
from model.vocabulary.export import write_tokenizer_folder
from model.vocabulary.fitting import fitted_config
from model.vocabulary.merge import split_pieces
from model.vocabulary.methods import Method
from model.vocabulary.tokenizer import Tokenizer
from model.weights import TensorFolder, hugging_face_shapes, write_tensor_folder

Side = Literal["input", "head"]

_EMBEDDING, _HEAD = "model.embed_tokens.weight", "lm_head.weight"
_RUN, _COLUMNS = 128, 256  # rows and columns computed at a time: few, so that the allocator reuses their memory

# Each further sub-piece counts 4/5 of the one before. 4/5 is no root of a polynomial with coefficients -1, 0, 1, so two orders
# of the same sub-pieces never get equal weights. The sixteenth sub-piece still counts 3.5 %, more than bf16 rounds off.
_DECAY = 0.8
_NOISE = 0.01  # relative to the length of a typical row


def new_rows(
    base_BD: Tensor,  # the base's rows, without padding, of any float dtype
    subpieces: Sequence[Sequence[int]],  # for each new piece, its ids in the base tokenizer
    side: Side,
    *,
    method: Method = "weighted",
    seed: int = 0,  # of noise and random rows; embedding and head draw different numbers
) -> Iterator[Tensor]:
    """Rows for new pieces, in their order: yields blocks of float32 [at most 128, D]. The module explains the methods.

    Raises:
        ValueError: an unknown method.
    """
    if method not in get_args(Method):
        raise ValueError(f"method = {method!r}: must be one of {', '.join(get_args(Method))}")
    generator = torch.Generator().manual_seed(2 * seed + (side == "head"))
    runs = [subpieces[start : start + _RUN] for start in range(0, len(subpieces), _RUN)]
    if method == "random":
        mean_D, deviation_D = _mean(base_BD), _deviation(base_BD)
        for run in runs:
            yield torch.randn(len(run), len(mean_D), generator=generator).mul_(deviation_D).add_(mean_D)
    elif method == "mean":
        for run in runs:
            subpiece = _subpieces(run)
            yield _weighted_sum(base_BD, subpiece, 1 / subpiece.length, len(run))
    else:
        yield from _weighted_rows(base_BD, runs, side, generator)


def _weighted_rows(
    base_BD: Tensor,
    runs: Sequence[Sequence[Sequence[int]]],
    side: Side,
    generator: torch.Generator,
) -> Iterator[Tensor]:
    norm_B = torch.cat([torch.linalg.vector_norm(rows, dim=1, dtype=torch.float32) for rows in base_BD.split(_RUN)])
    noise = _NOISE * norm_B.median() / base_BD.shape[1] ** 0.5
    for run in runs:
        subpiece = _subpieces(run)
        weight = _DECAY ** (subpiece.place if side == "head" else subpiece.length - 1 - subpiece.place)
        weight /= torch.zeros(len(run)).index_add_(0, subpiece.piece, weight)[subpiece.piece]
        mean_ND = _weighted_sum(base_BD, subpiece, weight, len(run))
        wanted_N = torch.zeros(len(run)).index_add_(0, subpiece.piece, weight * norm_B[subpiece.id])
        found_N = torch.linalg.vector_norm(mean_ND, dim=1).clamp_min(torch.finfo(torch.float32).tiny)
        mean_ND *= (wanted_N / found_N)[:, None]
        yield mean_ND.add_(noise * torch.randn(mean_ND.shape, generator=generator))


class _Subpieces(NamedTuple):
    """All sub-pieces of a run of pieces, one after the other; each field has one entry a sub-piece."""

    id: Tensor
    piece: Tensor  # number of its piece in the run
    place: Tensor  # its place in the piece, from 0
    length: Tensor  # number of sub-pieces of its piece


def _subpieces(run: Sequence[Sequence[int]]) -> _Subpieces:
    lengths = torch.tensor([len(ids) for ids in run])
    id = torch.tensor([id for ids in run for id in ids])
    piece = torch.arange(len(run)).repeat_interleave(lengths)
    place = torch.arange(len(id)) - (lengths.cumsum(0) - lengths)[piece]
    return _Subpieces(id, piece, place, lengths[piece])


def _weighted_sum(base_BD: Tensor, subpiece: _Subpieces, weight: Tensor, pieces: int) -> Tensor:
    """The weighted sum of each piece's sub-pieces' rows: float32 [pieces, D]."""
    rows = base_BD[subpiece.id].float().mul_(weight[:, None])
    return torch.zeros(pieces, base_BD.shape[1]).index_add_(0, subpiece.piece, rows)


def resized_rows(
    base_BD: Tensor,
    subpieces: Sequence[Sequence[int]],
    side: Side,
    *,
    method: Method = "weighted",
    seed: int = 0,
) -> Iterator[Tensor]:
    """A resized matrix [V, D] in blocks of rows: the base's rows, bit for bit, then `new_rows`, then padding."""
    yield base_BD
    yield from new_rows(base_BD, subpieces, side, method=method, seed=seed)
    pieces = len(base_BD) + len(subpieces)
    yield _mean(base_BD).expand(padded_to_tiles(pieces) - pieces, -1)


def resize_model(
    source: str | Path,
    folder: str | Path,
    base: Tokenizer,
    merged: Tokenizer,
    *,
    method: Method = "weighted",
    seed: int = 0,
    texts: Iterable[str] = (),
    distillation: Distillation | None = None,
) -> MistralConfig:
    """Write a model with rows for the merged tokenizer, and that tokenizer, into an existing folder, in Hugging Face's form.

    Streams: memory holds the base's rows of one matrix. All other weights, and the base's rows, keep their bits.
    `unpadded_vocab_size` in config.json says where padding begins; generation_config.json keeps padding from being sampled.

    Args:
        method: see the module. For `distilled` the whole model must fit the memory.
        seed: of noise and random rows.
        texts: documents to distill the rows from.
        distillation: settings of the distillation; default: `Distillation()`.

    Returns:
        The configuration of the new model.

    Raises:
        ValueError: the rows of the model do not match the base tokenizer, the merged tokenizer does not extend the base,
            the weights have several dtypes, or texts are given to a method without distillation. See `TensorFolder` for
            damaged folders.
    """
    if method != "distilled" and (texts or distillation):
        raise ValueError(f"method = {method!r} learns from no text: leave texts and distillation out")
    config = fitted_config(source, base)
    subpieces = split_pieces(base, merged)
    resized = replace(config, vocab_size=padded_to_tiles(merged.vocab_size), unpadded_vocab_size=merged.vocab_size)
    sides: dict[str, Side] = {_EMBEDDING: "input", _HEAD: "head"}
    with TensorFolder(source) as tensors:
        names = tensors.check(config)
        dtype = tensors.dtype("model.norm.weight")
        for name in names:
            if tensors.dtype(name) != dtype:
                raise ValueError(
                    f"{source}: {name} is {tensors.dtype(name)} where other weights are {dtype}: "
                    "export the model in one dtype first"
                )

        def blocks(name: str) -> Iterator[Tensor]:
            if name not in sides:
                return tensors.blocks(name)
            base_BD = tensors.rows(name, 0, base.vocab_size)
            return resized_rows(base_BD, subpieces, sides[name], method=method, seed=seed)

        shapes = hugging_face_shapes(resized)
        write_tensor_folder(folder, {name: TensorStream(shape, dtype, partial(blocks, name)) for name, shape in shapes.items()})
    write_config(folder, resized, dtype)
    write_tokenizer_folder(folder, merged)
    if method == "distilled":
        distill(folder, subpieces, merged, texts, distillation or Distillation())
    return resized


def _mean(base_BD: Tensor) -> Tensor:
    return torch.cat([columns.float().mean(dim=0) for columns in base_BD.split(_COLUMNS, dim=1)])


def _deviation(base_BD: Tensor) -> Tensor:
    return torch.cat([columns.float().std(dim=0) for columns in base_BD.split(_COLUMNS, dim=1)])
