"""Embedding look-up with NEFTune noise (Jain et al. 2023, https://arxiv.org/abs/2310.05914).

In training, NEFTune adds uniform noise on (-1, 1) times alpha / sqrt(L D) to each token's embedding. L is the length of the
token's document: the length of the packed row would make the noise several times too weak.

The kernel draws the noise where it adds it, by Philox. Kernel and reference give the same bits. The weight's gradient sums the
occurrences of a token in the order of the row, so it is the same in every run.

Shapes: T tokens, V vocabulary, D width.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from kernels import accumulation_dtype
from kernels.configurations import configuration
from kernels.launch import launch, operator, runs_triton, unit_stride
from kernels.philox import NEFTUNE, WORD, key_of, philox, philox_words, uniform_symmetric


@dataclass(frozen=True, eq=False)
class EmbeddingNoise:
    """NEFTune noise of one micro-batch, keyed by each token's identity, not by its place in the batch."""

    alpha: float  # the paper's scale: 5, 10 or 15
    seed: int  # the run's seed; its low 32 bits are used
    step: int  # the optimizer step; its low 32 bits are used
    document_T: Tensor  # int64, stable id of the document
    position_T: Tensor  # int64, position in the whole document, below 2^32
    length_T: Tensor  # int64, tokens of the whole document

    def scale_T(self, width: int) -> Tensor:
        """alpha / sqrt(L D) of each token, float32. Float64 roots and quotients give the same bits on every device."""
        alpha = torch.tensor(self.alpha, dtype=torch.float64)
        return (alpha / (self.length_T.to(torch.float64) * width).sqrt()).to(torch.float32)


def embedding(tokens_T: Tensor, weight_VD: Tensor, noise: EmbeddingNoise | None = None) -> Tensor:
    """Rows of the embedding matrix, plus NEFTune noise if given.

    Args: tokens_T integer, 0 <= token < V. weight_VD floating.
    Returns: [T, D] in the dtype of `weight_VD`. Noise is added in float32 and the sum rounded once; it has no gradient.
    Raises: IndexError for a token outside the matrix. On CUDA an assertion on the device fails instead, later, because the host
        does not wait.
    """
    if not runs_triton(weight_VD):
        return embedding_reference(tokens_T, weight_VD, noise)
    if noise is None:
        return _embedding(tokens_T, weight_VD, None, None, None, 0, 0)
    key = key_of(NEFTUNE, noise.seed, noise.step)
    return _embedding(tokens_T, weight_VD, noise.scale_T(weight_VD.shape[1]), noise.document_T, noise.position_T, *key)


def embedding_reference(tokens_T: Tensor, weight_VD: Tensor, noise: EmbeddingNoise | None = None) -> Tensor:
    hidden_TD = F.embedding(tokens_T.to(torch.int64), weight_VD)
    if noise is None:
        return hidden_TD
    wide = hidden_TD.to(accumulation_dtype(hidden_TD.dtype))
    return (wide + noise_reference(noise, weight_VD.shape[1])).to(hidden_TD.dtype)


def noise_reference(noise: EmbeddingNoise, width: int) -> Tensor:
    """The noise, float32 [T, D].

    Column 4 n + w of a token comes from word w of the counter (n, position, low half of the document, high half) under the key
    of (NEFTUNE, seed, step).
    """
    group = torch.arange((width + 3) // 4, dtype=torch.int64, device=noise.position_T.device)[None, :]
    document_T = noise.document_T.to(torch.int64)[:, None]
    position_T = noise.position_T.to(torch.int64)[:, None]
    counter = (group, position_T, document_T & WORD, (document_T >> 32) & WORD)
    words = philox(counter, key_of(NEFTUNE, noise.seed, noise.step))
    uniform_TD = uniform_symmetric(torch.stack(words, dim=-1).flatten(1)[:, :width])
    return uniform_TD * noise.scale_T(width)[:, None]


@operator("komainu::embedding")
def _embedding(
    tokens_T: Tensor,
    weight_VD: Tensor,
    scale_T: Tensor | None,
    document_T: Tensor | None,
    position_T: Tensor | None,
    key_low: int,  # words of `key_of`
    key_high: int,
) -> Tensor:
    rows, width = weight_VD.shape
    device = weight_VD.device
    config = configuration("embedding", device)
    tokens_T, weight_VD = _ids(tokens_T), unit_stride(weight_VD)
    _check_tokens(tokens_T, rows)
    out_TD = torch.empty((len(tokens_T), width), dtype=weight_VD.dtype, device=device)
    noise = [tokens_T] * 3
    if scale_T is not None and document_T is not None and position_T is not None:
        noise = [scale_T.contiguous(), _ids(document_T), _ids(position_T)]
    # A program draws whole groups of four columns.
    block = max(4, min(config.block, triton.next_power_of_2(width)))
    launch(
        _forward_kernel,
        (len(tokens_T), triton.cdiv(width, block)),
        tokens_T,
        weight_VD,
        *noise,
        out_TD,
        weight_VD.stride(0),
        key_low,
        key_high,
        WIDTH=width,
        BLOCK=block,
        NOISY=scale_T is not None,
        device=device,
        warps=config.warps,
        fusion=False,
    )
    return out_TD


@operator("komainu::embedding_backward")
def _embedding_backward(grad_TD: Tensor, tokens_T: Tensor, rows: int) -> Tensor:
    tokens, width = grad_TD.shape
    config = configuration("embedding_backward", grad_TD.device)
    sorted_T, order_T = torch.sort(_ids(tokens_T), stable=True)
    grad_TD = unit_stride(grad_TD)
    grad_VD = torch.zeros((rows, width), dtype=grad_TD.dtype, device=grad_TD.device)
    block = min(config.block, triton.next_power_of_2(width))
    launch(
        _backward_kernel,
        (tokens, triton.cdiv(width, block)),
        grad_TD,
        sorted_T,
        order_T,
        grad_VD,
        tokens,
        grad_TD.stride(0),
        WIDTH=width,
        BLOCK=block,
        ROWS=config.rows,
        device=grad_TD.device,
        warps=config.warps,
    )
    return grad_VD


def _ids(tensor_T: Tensor) -> Tensor:
    return tensor_T.to(torch.int64).contiguous()


def _check_tokens(tokens_T: Tensor, rows: int) -> None:
    """Refuse tokens outside the matrix: they would read foreign memory. On CUDA the message omits the token, without a wait."""
    valid = ((tokens_T >= 0) & (tokens_T < rows)).all()
    problem = f"is no row of the embedding matrix: it must be from 0 to {rows - 1}"
    if tokens_T.is_cuda:
        torch._assert_async(valid, f"a token {problem}")
    elif tokens_T.device.type == "cpu" and not valid:
        wrong = tokens_T[(tokens_T < 0) | (tokens_T >= rows)][0]
        raise IndexError(f"token {int(wrong)} {problem}")


@_embedding.register_fake
def _(tokens_T, weight_VD, scale_T, document_T, position_T, key_low, key_high):
    return torch.empty((tokens_T.shape[0], weight_VD.shape[1]), dtype=weight_VD.dtype, device=weight_VD.device)


@_embedding_backward.register_fake
def _(grad_TD, tokens_T, rows):
    return torch.empty((rows, grad_TD.shape[1]), dtype=grad_TD.dtype, device=grad_TD.device)


def _save(ctx, inputs, output) -> None:
    ctx.save_for_backward(inputs[0])
    ctx.rows = inputs[1].shape[0]


def _differentiate(ctx, grad_TD):
    return None, _embedding_backward(grad_TD, *ctx.saved_tensors, ctx.rows), None, None, None, None, None


_embedding.register_autograd(_differentiate, setup_context=_save)


# The key's words have fixed types and no specialised values, so that a new step compiles nothing.
@triton.jit(do_not_specialize=["key_low", "key_high"])
def _forward_kernel(
    tokens,  # [T] int64
    weight,  # [V, WIDTH]
    scale,  # [T] float32; this and the next two are read if NOISY
    document,  # [T] int64
    position,  # [T] int64
    out,  # [T, WIDTH]
    weight_stride,  # elements from row to row
    key_low: tl.int64,
    key_high: tl.int64,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,  # columns of a program
    NOISY: tl.constexpr,
):
    place = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < WIDTH
    token = tl.load(tokens + place)
    hidden = tl.load(weight + token * weight_stride + column, mask=inside, other=0.0)
    if NOISY:
        group = tl.program_id(1) * (BLOCK // 4) + tl.arange(0, BLOCK // 4)
        number = tl.load(document + place)
        key = (tl.cast(key_high, tl.int64) << 32) | key_low
        position_word = tl.load(position + place).to(tl.int32)
        word = philox_words(key, group, position_word, number.to(tl.int32), (number >> 32).to(tl.int32))
        # `uniform_symmetric` of kernels.philox, from the signed upper 24 bits.
        uniform = ((word.to(tl.int32, bitcast=True) >> 8).to(tl.float32) + 0.5) * 1.1920928955078125e-07
        hidden = hidden.to(tl.float32) + uniform * tl.load(scale + place)
    tl.store(out + place * WIDTH + column, hidden.to(out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["tokens"])
def _backward_kernel(
    grad,  # [tokens, WIDTH]
    sorted_tokens,  # [tokens] int64
    order,  # [tokens] int64: place in the row of each sorted token
    grad_weight,  # [V, WIDTH], zeros
    tokens,
    grad_stride,  # elements from row to row
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,  # columns of a program
    ROWS: tl.constexpr,  # occurrences of a step
):
    place = tl.program_id(0).to(tl.int64)
    token = tl.load(sorted_tokens + place)
    before = tl.load(sorted_tokens + place - 1, mask=place > 0, other=-1)
    # The first occurrence of a token sums the gradients of all its occurrences.
    if token != before:
        column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        inside = column < WIDTH
        total = tl.zeros((BLOCK,), dtype=tl.float32)
        found = ROWS
        while found == ROWS:
            at = place + tl.arange(0, ROWS)
            same = at < tokens
            same = same & (tl.load(sorted_tokens + at, mask=same, other=-1) == token)
            source = tl.load(order + at, mask=same, other=0)
            rows = grad + source[:, None] * grad_stride + column[None, :]
            total += tl.sum(tl.load(rows, mask=same[:, None] & inside[None, :], other=0.0).to(tl.float32), axis=0)
            found = tl.sum(same.to(tl.int32), axis=0)
            place += ROWS
        tl.store(grad_weight + token * WIDTH + column, total.to(grad_weight.dtype.element_ty), mask=inside)
