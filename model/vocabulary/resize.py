"""Embedding and head rows for the pieces that a merge added.

Shapes: N new pieces, D width, B rows of the base, V rows with padding.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Literal, get_args

import torch
from torch import Tensor

from kernels import TILE, padded_to_tiles
from model.config import MistralConfig, read_config, write_config
from model.tensor_file import TensorStream
from model.vocabulary.distill import Distillation, distill
from model.vocabulary.export import write_tokenizer_folder
from model.vocabulary.merge import split_pieces
from model.vocabulary.tokenizer import Tokenizer
from model.weights import TensorFolder, hugging_face_shapes, write_tensor_folder

Method = Literal["weighted", "mean", "random", "distilled"]
Side = Literal["input", "head"]

_EMBEDDING, _HEAD = "model.embed_tokens.weight", "lm_head.weight"
_RUN, _COLUMNS = 128, 256  # of a matrix, computed at a time: few, so that the memory of one run serves the next

# Each further sub-piece counts 4/5 of the one before. No polynomial with coefficients -1, 0, 1 has the root 4/5, so two
# orders of the same sub-pieces never get equal weights; and the sixteenth still counts 3.5 %, more than bf16 rounds off.
_DECAY = 0.8
_NOISE = 0.01  # of a typical row's length


def padded_size(pieces: int) -> int:
    """Rows of embedding and head for a number of pieces: whole tiles of the kernels' products."""
    return padded_to_tiles(pieces)


def new_rows(
    base_BD: Tensor, subpieces: Sequence[Sequence[int]], side: Side, *, method: Method = "weighted", seed: int = 0
) -> Iterator[Tensor]:
    """Rows for new pieces from the base's rows of the sub-pieces that spelled them before, a run of rows at a time.

    `weighted`: a mean weighted by place, as long as the sub-pieces' rows are. In the head the first sub-piece weighs
    most (the new piece must win where that one won), in the input the last (what follows has been predicted from it).
    A plain mean gives pieces of the same sub-pieces in another order (です and すで) equal rows, which nothing tells
    apart before training; repetitions (ああ and あああ) have equal means with any weights, so noise of 1 % of a typical row
    is added. `mean`: the plain mean. `random`: normal with the mean and deviation that each column of the base has.
    `distilled`: as `weighted`; `distill` goes on from there.

    Args:
        base_BD: the base's rows, without padding, of any float dtype.
        subpieces: for each new piece, its ids in the base tokenizer.
        side: which matrix the rows are for.
        method: see above.
        seed: of noise and random rows; input and head draw apart.

    Yields:
        float32 [at most 128, D], all N in their order.
    """
    if method not in get_args(Method):
        raise ValueError(f"method = {method!r}: must be one of {', '.join(get_args(Method))}")
    generator = torch.Generator().manual_seed(2 * seed + (side == "head"))
    runs = [subpieces[start : start + _RUN] for start in range(0, len(subpieces), _RUN)]
    if method == "random":
        mean_D, deviation_D = _mean(base_BD), _deviation(base_BD)
        for run in runs:
            yield torch.randn(len(run), len(mean_D), generator=generator).mul_(deviation_D).add_(mean_D)
        return
    norm_B = torch.cat([torch.linalg.vector_norm(rows, dim=1, dtype=torch.float32) for rows in base_BD.split(_RUN)])
    for run in runs:
        ids, place, length, row = _flat(run)
        if method == "mean":
            weight = 1 / length
        else:
            weight = _DECAY ** (place if side == "head" else length - 1 - place)
            weight /= torch.zeros(len(run)).index_add_(0, row, weight)[row]
        mean_ND = torch.zeros(len(run), base_BD.shape[1]).index_add_(0, row, base_BD[ids].float().mul_(weight[:, None]))
        if method != "mean":
            wanted_N = torch.zeros(len(run)).index_add_(0, row, weight * norm_B[ids])
            found_N = torch.linalg.vector_norm(mean_ND, dim=1).clamp_min(torch.finfo(torch.float32).tiny)
            mean_ND *= (wanted_N / found_N)[:, None]
            noise = _NOISE * norm_B.median() / base_BD.shape[1] ** 0.5
            mean_ND += noise * torch.randn(mean_ND.shape, generator=generator)
        yield mean_ND


def _flat(subpieces: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Of each sub-piece of all pieces in a row: its id, its place, how many its piece has, and its piece."""
    lengths = torch.tensor([len(ids) for ids in subpieces])
    ids = torch.tensor([id for ids in subpieces for id in ids])
    row = torch.arange(len(subpieces)).repeat_interleave(lengths)
    place = torch.arange(len(ids)) - (lengths.cumsum(0) - lengths)[row]
    return ids, place, lengths[row], row


def resized_rows(
    base_BD: Tensor, subpieces: Sequence[Sequence[int]], side: Side, *, method: Method = "weighted", seed: int = 0
) -> Iterator[Tensor]:
    """A resized matrix [V, D], a run of rows at a time: the base's rows, bit for bit, then `new_rows`, then padding.

    Padding rows, to a multiple of 128, are the mean of the base's: of a middling score beside any hidden state, should a
    reader forget to exclude them.
    """
    yield base_BD
    yield from new_rows(base_BD, subpieces, side, method=method, seed=seed)
    pieces = len(base_BD) + len(subpieces)
    yield _mean(base_BD).expand(padded_size(pieces) - pieces, -1)


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
    """Write a Hugging Face model folder with rows for the merged tokenizer, and that tokenizer, into an existing folder.

    Streams: no more is in memory than the base's rows of one matrix. All other weights, and the base's rows, keep their bits.
    `unpadded_vocab_size` in config.json says where padding begins, and generation_config.json keeps it from being sampled.

    Args:
        method: see `new_rows`. `distilled` then trains the rows (see `distill`), for which the model must fit the memory.
        seed: of noise and random rows.
        texts: documents to distil the rows from.
        distillation: how; default: as it stands there.

    Returns:
        The configuration of the new model.

    Raises:
        ValueError: the rows of the model do not match the base tokenizer, the merged tokenizer does not extend the base,
            the weights have several dtypes, texts where no method takes them. See `TensorFolder` for damaged folders.
    """
    if method != "distilled" and (texts or distillation):
        raise ValueError(f"method = {method!r} learns from no text: leave texts and distillation out")
    config = read_config(source)
    check_rows(config, base, source)
    subpieces = split_pieces(base, merged)
    resized = replace(config, vocab_size=padded_size(merged.vocab_size), unpadded_vocab_size=merged.vocab_size)
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
    write_tokenizer_folder(folder, merged.model_bytes)
    if method == "distilled":
        distill(folder, subpieces, merged, texts, distillation or Distillation())
    return resized


def check_rows(config: MistralConfig, tokenizer: Tokenizer, source: str | Path) -> None:
    """Check that a model's rows are those of a tokenizer: one for each piece, and at most padding behind them.

    Raises:
        ValueError: they are not.
    """
    padding = config.vocab_size - tokenizer.vocab_size
    named = config.unpadded_vocab_size not in (config.vocab_size, tokenizer.vocab_size)
    if named or not 0 <= padding < TILE:
        raise ValueError(
            f"{source}: the model has rows for {config.unpadded_vocab_size:,} pieces, the base tokenizer has "
            f"{tokenizer.vocab_size:,}: give the tokenizer that the model was trained with"
        )


def _mean(base_BD: Tensor) -> Tensor:
    return torch.cat([columns.float().mean(dim=0) for columns in base_BD.split(_COLUMNS, dim=1)])


def _deviation(base_BD: Tensor) -> Tensor:
    return torch.cat([columns.float().std(dim=0) for columns in base_BD.split(_COLUMNS, dim=1)])
