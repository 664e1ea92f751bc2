"""New rows learnt from text: the model with the merged vocabulary learns to predict as with the base vocabulary.

The method. A merge keeps the base's merges, so the merged ids of a text are its base ids in groups. The hidden state after a
group is therefore known: it is the base model's state after the group's last sub-piece. Adam trains two things alone: the new
rows of the embedding, so that the model reaches this state from the group's one row, and the new rows of the head, so that
embedding and head together predict the next group. The loss is the relative squared error of the states plus the negative
log-likelihood of the next merged id. All other weights keep their bits.

Source: after Dobler, Elliott and de Melo 2025, "Token Distillation: Attention-aware Input Embeddings For New Tokens",
https://arxiv.org/abs/2505.20133.

Shapes: T merged ids, D width, N predicted ids.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from model.mistral import Mistral, packed_attention
from model.vocabulary.tokenizer import Tokenizer
from model.weights import TensorFolder, load_model, save_model


@dataclass(frozen=True, kw_only=True)
class Distillation:
    """Settings of the distillation. Tokens are counted in the merged tokenizer."""

    tokens: int = 1_000_000
    """Maximal number of tokens to read of the text."""
    context_length: int = 512
    """Maximal length of a part of a document, in tokens."""
    step_tokens: int = 4096
    """Tokens of an optimizer step."""
    rate: float = 0.02
    """Adam's initial learning rate, relative to the root mean square of the base's rows; it falls linearly to 0."""
    device: str = "auto"
    """"auto" is CUDA if there is a GPU, else the CPU."""

    def __post_init__(self) -> None:
        for name in ("tokens", "context_length", "step_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"distillation.{name} = {getattr(self, name)}: must be at least 1")
        if not self.rate > 0:
            raise ValueError(f"distillation.rate = {self.rate}: must be above 0")


def distill(
    folder: str | Path,  # the resized model
    subpieces: Sequence[Sequence[int]],  # for each new piece, its ids in the base tokenizer
    merged: Tokenizer,
    texts: Iterable[str],  # documents
    settings: Distillation,
) -> None:
    """Train the new rows of a resized model folder, in place.

    Memory holds the whole model, in its stored dtype, and gradients of embedding and head: a model of full size needs a GPU.
    Raises: ValueError when the texts have no new piece.
    """
    base_size = merged.vocab_size - len(subpieces)
    groups = [[id] for id in range(base_size)] + [list(ids) for ids in subpieces]
    steps = list(_steps(texts, merged, settings))
    if not any(id >= base_size for step in steps for part in step for id in part):
        raise ValueError("the text to learn new rows from holds none of the new pieces: give text of their language")
    with TensorFolder(folder) as tensors:
        dtype = tensors.dtype("model.norm.weight")
    device = settings.device if settings.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    model = load_model(folder, dtype=dtype, device=device).requires_grad_(False)
    matrices = [model.embed_tokens.weight.requires_grad_(), model.lm_head.weight.requires_grad_()]
    # In float32, as bfloat16 rounds off most of an update.
    masters = [nn.Parameter(matrix.detach()[base_size : merged.vocab_size].float()) for matrix in matrices]
    sizes = [matrix.detach()[:base_size].float().square().mean().sqrt().item() for matrix in matrices]
    optimizer = torch.optim.Adam(
        [{"params": [master], "lr": settings.rate * size} for master, size in zip(masters, sizes, strict=True)],
        betas=(0.9, 0.95),
    )
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=len(steps))
    for parts in steps:
        _loss(model, parts, groups).backward()
        for master, matrix in zip(masters, matrices, strict=True):
            assert matrix.grad is not None
            master.grad = matrix.grad[base_size : merged.vocab_size].float()
            matrix.grad = None
        optimizer.step()
        schedule.step()
        for master, matrix in zip(masters, matrices, strict=True):
            matrix.detach()[base_size : merged.vocab_size].copy_(master.detach())
    save_model(model, folder)


def _steps(texts: Iterable[str], merged: Tokenizer, settings: Distillation) -> Iterator[list[list[int]]]:
    """The parts of documents of each step, as merged ids behind a beginning-of-sequence token."""
    step: list[list[int]] = []
    size = total = 0
    for text in texts:
        ids = merged.encode(text)
        for start in range(0, len(ids), settings.context_length):
            part = [merged.bos_id, *ids[start : start + settings.context_length]][: settings.tokens - total + 1]
            step.append(part)
            size, total = size + len(part), total + len(part) - 1
            if size >= settings.step_tokens or total >= settings.tokens:
                yield step
                step, size = [], 0
            if total >= settings.tokens:
                return
    if step:
        yield step


def _loss(model: Mistral, parts: list[list[int]], groups: list[list[int]]) -> Tensor:
    """Relative squared error of the hidden states, mean over T, plus negative log-likelihood in nats, mean over N."""
    device = model.lm_head.weight.device
    spelled = [[id for group in part for id in groups[group]] for part in parts]
    with torch.no_grad():
        ends_T = torch.tensor([len(groups[id]) for part in parts for id in part], device=device).cumsum(0) - 1
        wanted_TD = _hidden(model, spelled)[ends_T].float()
    hidden_TD = _hidden(model, parts)
    error_T = (hidden_TD.float() - wanted_TD).square().sum(-1) / wanted_TD.square().sum(-1)
    target_T = torch.tensor([id for part in parts for id in (*part[1:], 0)], device=device)
    lasts = torch.tensor([len(part) for part in parts], device=device).cumsum(0) - 1
    weight_T = torch.ones_like(error_T).index_fill(0, lasts, 0.0)
    rows_N = weight_T.nonzero()[:, 0].int()
    nll, _ = model.nll(hidden_TD, target_T, rows_N, weight_T / max(1, len(rows_N)))
    return error_T.mean() + nll


def _hidden(model: Mistral, parts: list[list[int]]) -> Tensor:
    """Final hidden states of packed parts, which do not see one another."""
    device = model.lm_head.weight.device
    bounds = torch.tensor([0, *(len(part) for part in parts)]).cumsum(0).to(device)
    tokens_T = torch.tensor([id for part in parts for id in part], device=device)
    positions_T = torch.cat([torch.arange(len(part), dtype=torch.int32) for part in parts]).to(device)
    return model(tokens_T, positions_T, packed_attention(bounds, model.config.sliding_window))
