"""Embedding and head rows for the pieces that a merge added.

Shapes: N new pieces, D width, B rows of the base, V rows with padding.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal, get_args

import torch
from torch import Tensor

from model.config import MistralConfig, read_config, write_config
from model.vocabulary.merge import split_pieces
from model.vocabulary.tokenizer import Tokenizer, write_tokenizer_folder
from model.weights import TensorFolder, write_tensors

Method = Literal["weighted", "mean", "random"]
Side = Literal["input", "head"]

ROW_MULTIPLE = 128  # rows of embedding and head, for the matrix units
_EMBEDDING, _HEAD = "model.embed_tokens.weight", "lm_head.weight"
_CHUNK = 1024  # new rows computed at a time

# Each further sub-piece counts 4/5 of the one before. No polynomial with coefficients -1, 0, 1 has the root 4/5, so two
# orders of the same sub-pieces never get equal weights; and the sixteenth still counts 3.5 %, more than bf16 rounds off.
_DECAY = 0.8
_NOISE = 0.01  # of a typical row's length


def padded_size(pieces: int) -> int:
    """Rows of embedding and head for a number of pieces: the next multiple of 128."""
    return -(-pieces // ROW_MULTIPLE) * ROW_MULTIPLE


def new_rows(
    base_BD: Tensor, subpieces: Sequence[Sequence[int]], side: Side, *, method: Method = "weighted", seed: int = 0
) -> Tensor:
    """Rows for new pieces from the base's rows of the sub-pieces that spelled them before.

    `weighted`: a mean weighted by place, as long as the sub-pieces' rows are. In the head the first sub-piece weighs
    most (the new piece must win where that one won), in the input the last (what follows has been predicted from it).
    A plain mean gives pieces of the same sub-pieces in another order (です and すで) equal rows, which nothing tells
    apart before training; repetitions (ああ and あああ) have equal means with any weights, so noise of 1 % of a typical row
    is added. `mean`: the plain mean. `random`: normal with the mean and deviation that each column of the base has.

    Args:
        base_BD: the base's rows, without padding, of any float dtype.
        subpieces: for each new piece, its ids in the base tokenizer.
        side: which matrix the rows are for.
        method: see above.
        seed: of noise and random rows; input and head draw apart.

    Returns:
        float32 [N, D].
    """
    if method not in get_args(Method):
        raise ValueError(f"method = {method!r}: must be one of {', '.join(get_args(Method))}")
    generator = torch.Generator().manual_seed(2 * seed + (side == "head"))
    rows_ND = torch.empty(len(subpieces), base_BD.shape[1])
    if method == "random":
        rows_ND.normal_(generator=generator)
        return rows_ND.mul_(_deviation(base_BD)).add_(_mean(base_BD))
    noise = _NOISE * torch.linalg.vector_norm(base_BD, dim=1, dtype=torch.float32).median() / base_BD.shape[1] ** 0.5
    by_length: dict[int, list[int]] = {}
    for row, ids in enumerate(subpieces):
        by_length.setdefault(len(ids), []).append(row)
    for length, members in by_length.items():
        weights = _weights(length, side) if method == "weighted" else [1 / length] * length
        for start in range(0, len(members), _CHUNK):
            chosen = members[start : start + _CHUNK]
            ids_NL = torch.tensor([list(subpieces[row]) for row in chosen])
            total_ND = torch.zeros(len(chosen), base_BD.shape[1])
            norm_N = torch.zeros(len(chosen))
            for place, weight in enumerate(weights):
                part_ND = base_BD[ids_NL[:, place]].float()
                total_ND += weight * part_ND
                norm_N += weight * torch.linalg.vector_norm(part_ND, dim=1)
            if method == "weighted":
                length_N = torch.linalg.vector_norm(total_ND, dim=1).clamp_min(torch.finfo(torch.float32).tiny)
                total_ND *= (norm_N / length_N)[:, None]
            rows_ND[chosen] = total_ND
    if method == "weighted":
        rows_ND += noise * torch.randn(rows_ND.shape, generator=generator)
    return rows_ND


def resize_rows(
    base_BD: Tensor, subpieces: Sequence[Sequence[int]], side: Side, *, method: Method = "weighted", seed: int = 0
) -> Tensor:
    """The base's rows, bit for bit, then `new_rows`, then padding to a multiple of 128: [V, D] in the base's dtype.

    Padding rows are the mean of the base's rows: of a middling score beside any hidden state, should a reader forget to
    exclude them.
    """
    pieces = len(base_BD) + len(subpieces)
    rows_VD = base_BD.new_empty(padded_size(pieces), base_BD.shape[1])
    rows_VD[: len(base_BD)] = base_BD
    rows_VD[len(base_BD) : pieces] = new_rows(base_BD, subpieces, side, method=method, seed=seed)
    rows_VD[pieces:] = _mean(base_BD)
    return rows_VD


def resize_model(
    source: str | Path, folder: str | Path, base: Tokenizer, merged: Tokenizer, *, method: Method = "weighted", seed: int = 0
) -> MistralConfig:
    """Write a Hugging Face model folder with rows for the merged tokenizer, and that tokenizer, into an existing folder.

    Streams: beside one shard, no more than one matrix is in memory. All other weights, and the base's rows, keep their bits.
    `unpadded_vocab_size` in config.json says where padding begins, and generation_config.json keeps it from being sampled.

    Returns:
        The configuration of the new model.

    Raises:
        ValueError: the rows of the model do not match the base tokenizer, the merged tokenizer does not extend the base,
            the weights have several dtypes. See `TensorFolder` for damaged folders.
    """
    config = read_config(source)
    check_rows(config, base, source)
    subpieces = split_pieces(base, merged)
    resized = replace(config, vocab_size=padded_size(merged.vocab_size), unpadded_vocab_size=merged.vocab_size)
    sides: dict[str, Side] = {_EMBEDDING: "input", _HEAD: "head"}
    with TensorFolder(source) as tensors:
        names = [name for name in tensors.names if not name.endswith("rotary_emb.inv_freq")]
        dtype = tensors.tensor("model.norm.weight").dtype

        def tensor_of(name: str) -> Tensor:
            tensor = tensors.tensor(name)
            if tensor.dtype != dtype:
                raise ValueError(
                    f"{source}: {name} is {tensor.dtype} where other weights are {dtype}: export the model in one dtype first"
                )
            if name not in sides:
                return tensor
            return resize_rows(tensor[: base.vocab_size], subpieces, sides[name], method=method, seed=seed)

        shapes = {name: tensors.shape(name) for name in names}
        for name in sides:
            if shapes.get(name) != (config.vocab_size, config.hidden_size):
                raise ValueError(
                    f"{source}: {name} has shape {list(shapes.get(name, ()))}, "
                    f"config.json asks for {[config.vocab_size, config.hidden_size]}"
                )
            shapes[name] = (resized.vocab_size, resized.hidden_size)
        write_tensors(folder, shapes, dtype, tensor_of)
    write_config(folder, resized, dtype)
    write_tokenizer_folder(folder, merged.model_bytes)
    return resized


def check_rows(config: MistralConfig, tokenizer: Tokenizer, source: str | Path) -> None:
    """Check that a model's rows are those of a tokenizer: one for each piece, and at most padding behind them.

    Raises:
        ValueError: they are not.
    """
    padding = config.vocab_size - tokenizer.vocab_size
    named = config.unpadded_vocab_size not in (config.vocab_size, tokenizer.vocab_size)
    if named or not 0 <= padding < ROW_MULTIPLE:
        raise ValueError(
            f"{source}: the model has rows for {config.unpadded_vocab_size:,} pieces, the base tokenizer has "
            f"{tokenizer.vocab_size:,}: give the tokenizer that the model was trained with"
        )


def _weights(length: int, side: Side) -> list[float]:
    falling = [_DECAY**place for place in range(length)]
    return [weight / sum(falling) for weight in (falling if side == "head" else reversed(falling))]


def _mean(base_BD: Tensor) -> Tensor:
    return base_BD.mean(dim=0, dtype=torch.float32)


def _deviation(base_BD: Tensor) -> Tensor:
    return base_BD.float().std(dim=0)
