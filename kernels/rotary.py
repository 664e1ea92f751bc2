"""Rotary position embedding in the rotate-half layout (Su et al. 2021, https://arxiv.org/abs/2104.09864).

Element e of a head (e < E/2) is paired with element e + E/2, as in Hugging Face's Mistral, so weights need no permutation.
The backward pass rotates by the negative angle.

Shapes: T tokens, S heads of a packed query-key-value row (H query, K key, K value), E head size.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels import accumulation_dtype
from kernels.configurations import configuration
from kernels.fp8 import Codes, empty_row_codes, launch_rows, row_codes, store_two_parts
from kernels.launch import launch, operator, runs_triton, unit_stride


class RotaryTable(NamedTuple):
    """Cosine and sine of position times frequency, each float32 [T, E/2]. One table serves all layers of a batch."""

    cos_TE: Tensor
    sin_TE: Tensor


def rotary_table(positions_T: Tensor, head_dim: int, theta: float) -> RotaryTable:
    """The angles of each position, in float32 as published for Mistral: angle(t, e) = t * theta^(-2e / E).

    Args: positions_T integer [T], counted from 0 at the start of each document.
    """
    exponent = torch.arange(0, head_dim, 2, dtype=torch.float32, device=positions_T.device) / head_dim
    angle_TE = positions_T.to(torch.float32)[:, None] * (1.0 / theta**exponent)
    return RotaryTable(angle_TE.cos(), angle_TE.sin())


def rotary_(qkv_TSE: Tensor, table: RotaryTable, rotated_heads: int) -> Tensor:
    """Rotate the first `rotated_heads` heads (queries and keys) of each packed row by its position's angles, in place.

    Args: qkv_TSE of any floating dtype; rotated_heads = H + K. The K value heads behind them do not change.
    Returns: `qkv_TSE`, rotated in float32 and rounded once.
    Raises: RuntimeError for a `qkv_TSE` that is a leaf and requires a gradient.
    """
    return _Rotary.apply(qkv_TSE, *table, rotated_heads)


def rotary_reference_(qkv_TSE: Tensor, table: RotaryTable, rotated_heads: int) -> Tensor:
    qkv_TSE[:, :rotated_heads] = _turned(qkv_TSE[:, :rotated_heads], *table)
    return qkv_TSE


class _Rotary(torch.autograd.Function):
    """Takes the whole packed row, not its parts: autograd cannot follow several views that change in place."""

    @staticmethod
    def forward(ctx, qkv_TSE, cos_TE, sin_TE, rotated_heads):
        ctx.mark_dirty(qkv_TSE)
        ctx.save_for_backward(cos_TE, sin_TE)
        ctx.rotated_heads = rotated_heads
        rotate_(qkv_TSE, RotaryTable(cos_TE, sin_TE), rotated_heads)
        return qkv_TSE

    @staticmethod
    def backward(ctx, grad_TSE):
        rotated_TSE, value_TKE = grad_TSE[:, : ctx.rotated_heads], grad_TSE[:, ctx.rotated_heads :]
        return rotate_back(rotated_TSE, value_TKE[:, :0], value_TKE, RotaryTable(*ctx.saved_tensors)), None, None, None


# Steps of the operator above, and of `norm_qkv`.


def rotate_(qkv_TSE: Tensor, table: RotaryTable, rotated_heads: int) -> None:
    """`rotary_` without autograd, for use inside an autograd.Function.

    Raises: RuntimeError for a `qkv_TSE` that autograd follows.
    """
    if torch.is_grad_enabled() and qkv_TSE.requires_grad:
        raise RuntimeError("rotate_ has no gradient: call rotary_, or rotate_ inside an autograd.Function")
    assert 0 <= rotated_heads <= qkv_TSE.shape[1], f"{rotated_heads} heads of {qkv_TSE.shape[1]}"
    if runs_triton(qkv_TSE):
        _rotate_(qkv_TSE, *table, rotated_heads)
    else:
        rotary_reference_(qkv_TSE, table, rotated_heads)


def rotate_back(grad_query_THE: Tensor, grad_key_TKE: Tensor, grad_value_TKE: Tensor, table: RotaryTable) -> Tensor:
    """The gradient of the packed row before its rotation, in one pass over the gradients of its three parts.

    Queries and keys are rotated by the negative angle, values are copied.

    Args: gradients of the rotated query, the rotated key and the value, of one dtype and any strides: parts of one packed
        tensor, separate tensors or expanded tensors.
    Returns: [T, S, E], contiguous.
    """
    step = _rotate_back if runs_triton(grad_query_THE) else _rotate_back_eager
    return step(grad_query_THE, grad_key_TKE, grad_value_TKE, *table)


def rotate_back_codes(grad_query_THE: Tensor, grad_key_TKE: Tensor, grad_value_TKE: Tensor, table: RotaryTable) -> Codes:
    """E4M3 codes of the rows of `rotate_back` [T, S E], in one pass; the rows themselves are not written."""
    if runs_triton(grad_query_THE):
        return Codes(*_rotate_back_codes(grad_query_THE, grad_key_TKE, grad_value_TKE, *table))
    return row_codes(rotate_back(grad_query_THE, grad_key_TKE, grad_value_TKE, table).flatten(1))


@operator("komainu::rotary_", mutates=("qkv_TSE",))
def _rotate_(qkv_TSE: Tensor, cos_TE: Tensor, sin_TE: Tensor, rotated_heads: int) -> None:
    rows_TSE = unit_stride(qkv_TSE)
    unused = rows_TSE[:, :0]
    _launch(rows_TSE[:, :rotated_heads], unused, unused, cos_TE, sin_TE, rows_TSE, back=False)
    if rows_TSE is not qkv_TSE:
        qkv_TSE.copy_(rows_TSE)


@operator("komainu::rotary_backward")
def _rotate_back(
    grad_query_THE: Tensor, grad_key_TKE: Tensor, grad_value_TKE: Tensor, cos_TE: Tensor, sin_TE: Tensor
) -> Tensor:
    grad_TSE = _packed(grad_query_THE, grad_key_TKE, grad_value_TKE)
    query_THE, key_TKE, value_TKE = map(unit_stride, (grad_query_THE, grad_key_TKE, grad_value_TKE))
    _launch(query_THE, key_TKE, value_TKE, cos_TE, sin_TE, grad_TSE, back=True)
    return grad_TSE


@operator("komainu::rotary_backward_codes")
def _rotate_back_codes(
    grad_query_THE: Tensor, grad_key_TKE: Tensor, grad_value_TKE: Tensor, cos_TE: Tensor, sin_TE: Tensor
) -> tuple[Tensor, Tensor]:
    query_THE, key_TKE, value_TKE = map(unit_stride, (grad_query_THE, grad_key_TKE, grad_value_TKE))
    half = cos_TE.shape[1]
    heads = query_THE.shape[1] + key_TKE.shape[1] + value_TKE.shape[1]
    strides = (2 * half * heads, 2 * half)
    given, constants = _arguments(query_THE, key_TKE, value_TKE, cos_TE, sin_TE, strides, back=True)
    return launch_rows(
        _rotary_kernel, given, query_THE, heads * half, chosen="rotary_codes", parts=2, ROWS=1, CODES=True, **constants
    )


def _packed(query_THE: Tensor, key_TKE: Tensor, value_TKE: Tensor) -> Tensor:
    """An uninitialised packed row with room for these parts."""
    tokens, heads, size = query_THE.shape
    shape = (tokens, heads + key_TKE.shape[1] + value_TKE.shape[1], size)
    return torch.empty(shape, dtype=query_THE.dtype, device=query_THE.device)


def _launch(query_THE, key_TKE, value_TKE, cos_TE, sin_TE, out_TSE, *, back) -> None:
    given, constants = _arguments(query_THE, key_TKE, value_TKE, cos_TE, sin_TE, out_TSE.stride()[:2], back=back)
    tokens, half = cos_TE.shape
    config = configuration("rotary", out_TSE.device)
    launch(
        _rotary_kernel,
        (triton.cdiv(tokens * sum(part.shape[1] for part in (query_THE, key_TKE, value_TKE)), config.rows),),
        *given,
        out_TSE,
        cos_TE,
        WIDTH=half,
        BLOCK=triton.next_power_of_2(half),
        ROWS=config.rows,
        CODES=False,
        **constants,
        device=out_TSE.device,
        warps=config.warps,
        fusion=False,  # as in `launch_rows`
    )


def _arguments(
    query_THE: Tensor,
    key_TKE: Tensor,
    value_TKE: Tensor,
    cos_TE: Tensor,
    sin_TE: Tensor,
    out_strides: Sequence[int],  # elements from token to token, from head to head
    *,
    back: bool,
) -> tuple[tuple[Tensor | int, ...], dict[str, int]]:
    """(first arguments of the kernel, constants)."""
    tokens, _, size = query_THE.shape
    parts = {"QUERY_HEADS": query_THE, "KEY_HEADS": key_TKE, "VALUE_HEADS": value_TKE}
    assert query_THE.dtype == key_TKE.dtype == value_TKE.dtype
    assert cos_TE.shape == sin_TE.shape == (tokens, size // 2), f"table {list(cos_TE.shape)} of {list(query_THE.shape)}"
    strides = [*(stride for part in parts.values() for stride in part.stride()[:2]), *out_strides]
    given: list[Tensor | int] = [*parts.values(), cos_TE.contiguous(), sin_TE.contiguous(), tokens, *strides]
    return tuple(given), {name: part.shape[1] for name, part in parts.items()} | {"HALF": size // 2, "BACK": back}


@_rotate_.register_fake
def _(qkv_TSE, cos_TE, sin_TE, rotated_heads):
    return None


@_rotate_back.register_fake
def _(grad_query_THE, grad_key_TKE, grad_value_TKE, cos_TE, sin_TE):
    return _packed(grad_query_THE, grad_key_TKE, grad_value_TKE)


@_rotate_back_codes.register_fake
def _(grad_query_THE, grad_key_TKE, grad_value_TKE, cos_TE, sin_TE):
    return empty_row_codes(grad_query_THE, _packed(grad_query_THE, grad_key_TKE, grad_value_TKE)[0].numel())


def _rotate_back_eager(grad_query_THE, grad_key_TKE, grad_value_TKE, cos_TE, sin_TE) -> Tensor:
    turned = [_turned(part, cos_TE, -sin_TE) for part in (grad_query_THE, grad_key_TKE)]
    return torch.cat((*turned, grad_value_TKE), dim=1)


def _turned(heads_THE: Tensor, cos_TE: Tensor, sin_TE: Tensor) -> Tensor:
    wide = accumulation_dtype(heads_THE.dtype)
    cos, sin = cos_TE[:, None].to(wide), sin_TE[:, None].to(wide)
    first, second = heads_THE.to(wide).chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(heads_THE.dtype)


@triton.jit(do_not_specialize=["tokens"])
def _rotary_kernel(
    query,  # [tokens, QUERY_HEADS, 2 HALF]
    key,  # [tokens, KEY_HEADS, 2 HALF]
    value,  # [tokens, VALUE_HEADS, 2 HALF]
    cos,  # [tokens, HALF] float32
    sin,  # [tokens, HALF] float32
    tokens,
    query_token_stride,  # elements from token to token
    query_head_stride,  # elements from head to head
    key_token_stride,
    key_head_stride,
    value_token_stride,
    value_head_stride,
    out_token_stride,
    out_head_stride,
    out,  # [tokens, QUERY_HEADS + KEY_HEADS + VALUE_HEADS, 2 HALF], or its codes if CODES
    scale,  # [tokens] float32, written if CODES
    WIDTH: tl.constexpr,  # pairs of a row: a row is one head of one token, or one token if CODES
    BLOCK: tl.constexpr,  # WIDTH up to a power of two
    QUERY_HEADS: tl.constexpr,
    KEY_HEADS: tl.constexpr,
    VALUE_HEADS: tl.constexpr,
    HALF: tl.constexpr,  # pairs of a head
    ROWS: tl.constexpr,  # rows of a program; 1 if CODES
    BACK: tl.constexpr,  # whether to rotate by the negative angle
    CODES: tl.constexpr,
):
    ROTATED: tl.constexpr = QUERY_HEADS + KEY_HEADS
    HEADS: tl.constexpr = QUERY_HEADS + KEY_HEADS + VALUE_HEADS
    if CODES:
        token = tl.program_id(0).to(tl.int64)
        pair = tl.arange(0, BLOCK)
        head = (pair // HALF).to(tl.int64)
        column = pair % HALF
        inside = pair < WIDTH
    else:
        row = (tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS))[:, None]
        token = row // HEADS
        head = row % HEADS
        column = tl.arange(0, BLOCK)[None, :]
        inside = (token < tokens) & (column < WIDTH)
    source = query + token * query_token_stride + head * query_head_stride
    if KEY_HEADS > 0:
        keys = key + token * key_token_stride + (head - QUERY_HEADS) * key_head_stride
        source = tl.where(head < QUERY_HEADS, source, keys)
    if VALUE_HEADS > 0:
        values = value + token * value_token_stride + (head - ROTATED) * value_head_stride
        source = tl.where(head < ROTATED, source, values)
    rotated = inside & (head < ROTATED)
    given = source + column
    first = tl.load(given, mask=inside, other=0.0).to(tl.float32)
    second = tl.load(given + HALF, mask=inside, other=0.0).to(tl.float32)
    angle = token * HALF + column
    c = tl.load(cos + angle, mask=rotated, other=1.0)
    s = tl.load(sin + angle, mask=rotated, other=0.0)
    if BACK:
        s = -s
    # Values are selected, not rotated by 0: an infinite value must not spread to its pair.
    turned_first = tl.where(rotated, first * c - second * s, first).to(query.dtype.element_ty)
    turned_second = tl.where(rotated, second * c + first * s, second).to(query.dtype.element_ty)
    written = out + token * out_token_stride
    place = head * out_head_stride + column
    if CODES:
        # Of rounded values: the same codes as in a pass of their own.
        store_two_parts(turned_first.to(tl.float32), turned_second.to(tl.float32), written, scale + token, place, inside, HALF)
    else:
        tl.store(written + place, turned_first, mask=inside)
        tl.store(written + place + HALF, turned_second, mask=inside)
