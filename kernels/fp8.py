"""E4M3 codes of matrices, and the power-of-two scales that they are multiples of: value = code * scale.

E4M3 has 4 bits of exponent and 3 of mantissa: the largest value is 448, and values from 2^-6 up keep a relative precision of
1/16 (subnormals reach down to 2^-9). A scale is the smallest power of two that brings a row's largest value to at most 448. A
power of two moves exponents and rounds nothing, so codes can be scaled again without a second rounding, except where they
underflow.

A row with NaN or infinity gets the scale NaN and NaN codes throughout; no other row sees it.

Products on Hopper read both factors along the summed dimension. The products of a backward pass sum over the rows, so the same
codes exist a second time, transposed, padded with zeros to a multiple of 16 rows.

Shapes: T tokens (rows), K columns, P = T rounded up to a multiple of 16.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.configurations import configuration
from kernels.launch import launch, operator, runs_triton, unit_stride

E4M3 = torch.float8_e4m3fn
# torch._scaled_mm on CUDA takes matrices whose sizes are multiples of this.
MULTIPLE = 16
_LARGEST = 448.0
# A scale's exponent in float32: adding _CARRY to a value's bits raises its exponent if its mantissa is above 448 = 1.75 * 2^8.
_CARRY, _EXPONENT_BITS, _SHIFT = 0x1FFFFF, 23, 8


class Codes(NamedTuple):
    """The codes of rows, and each row's scale."""

    code_TK: Tensor  # float8_e4m3fn, contiguous
    scale_T: Tensor  # float32


def row_codes(value_TK: Tensor) -> Codes:
    """Codes with a scale for each row."""
    return Codes(*(_row_codes if runs_triton(value_TK) else _row_codes_eager)(value_TK))


def column_codes(value_TK: Tensor, scale_T: Tensor) -> Tensor:
    """The codes of `row_codes`, from the same rows and their scales, transposed: [K, P]."""
    if runs_triton(value_TK):
        return _column_codes(value_TK, scale_T)
    return transposed(encoded(value_TK, scale_T[:, None]))


def shifted_columns(grad: Codes, input_scale_T: Tensor) -> tuple[Tensor, Tensor]:
    """The left factor of a weight's gradient, sum over t of (grad_t scale_t) (input_t input_scale_t)^T.

    The scales cannot leave the sum, so they enter the codes: each row is divided by C / (scale_t input_scale_t), a power of two
    that is at least 1, with C the largest product of both scales over the rows.

    Returns: (codes [K, P]; float32 [8] whose elements 0 and 4 have the product C, as one float32 may not hold it, and products
        read scales at multiples of 16 bytes).
    """
    step = _shifted_columns if runs_triton(grad.scale_T) else _shifted_columns_eager
    return step(*grad, input_scale_T)


def matrix_codes(value_TK: Tensor, *, rows: bool = True, columns: bool = True) -> tuple[Tensor, Tensor, Tensor]:
    """Codes with one scale for the whole matrix.

    Args: rows, columns: which codes to make; the others are empty.
    Returns: (codes [T, K], the same codes transposed [K, P], the scale: float32 []).
    """
    low, high = torch.aminmax(value_TK)
    scale = scales_of(torch.maximum(-low, high))
    if runs_triton(value_TK):
        return *_matrix_codes(value_TK, scale, rows, columns), scale
    code_TK, nothing = encoded(value_TK, scale), empty_codes(value_TK, 0)
    return code_TK if rows else nothing, transposed(code_TK) if columns else nothing, scale


def scales_of(largest: Tensor) -> Tensor:
    """The scale of rows by their largest absolute value, float32 in any shape."""
    exponent = ((largest.float().view(torch.int32) + _CARRY) >> _EXPONENT_BITS) - _SHIFT
    # The smallest normal number: its reciprocal is finite.
    scale = (exponent.clamp(min=1) << _EXPONENT_BITS).view(torch.float32)
    return scale.masked_fill(~largest.isfinite(), torch.nan)


def encoded(value: Tensor, scale: Tensor) -> Tensor:
    """Codes of values at a scale that broadcasts to them."""
    # Clamped here: a cast on a CPU saturates only from torch 2.12 on.
    return (value.float() / scale).clamp(-_LARGEST, _LARGEST).to(E4M3)


def transposed(code_TK: Tensor) -> Tensor:
    """[K, P]: zeros in the columns that no row fills."""
    tokens, width = code_TK.shape
    out_KP = torch.zeros((width, padded(tokens)), dtype=torch.uint8, device=code_TK.device)
    out_KP[:, :tokens] = code_TK.view(torch.uint8).T
    return out_KP.view(E4M3)


def padded(tokens: int) -> int:
    """P: `tokens`, rounded up to a multiple of 16, and at least 16."""
    return max(1, -(-tokens // MULTIPLE)) * MULTIPLE


def empty_codes(like: Tensor, *shape: int) -> Tensor:
    """Codes without values on the device of `like`."""
    return torch.empty(shape, dtype=E4M3, device=like.device)


def empty_row_codes(rows_TK: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """(codes [T, width], a scale for each row [T] in float32), without values."""
    scale_T = torch.empty(len(rows_TK), dtype=torch.float32, device=rows_TK.device)
    return empty_codes(rows_TK, len(rows_TK), width), scale_T


def _row_codes_eager(value_TK: Tensor) -> tuple[Tensor, Tensor]:
    scale_T = scales_of(value_TK.abs().amax(dim=-1))
    return encoded(value_TK, scale_T[:, None]), scale_T


def _shifted_columns_eager(code_TK: Tensor, scale_T: Tensor, input_scale_T: Tensor) -> tuple[Tensor, Tensor]:
    exponent_T = (scale_T.view(torch.int32) >> _EXPONENT_BITS) + (input_scale_T.view(torch.int32) >> _EXPONENT_BITS)
    largest = torch.cat((exponent_T, exponent_T.new_full((1,), 2))).amax()
    shift_T = torch.exp2((exponent_T - largest).float())
    common = largest - 2 * 127
    half = torch.div(common, 2, rounding_mode="floor")
    pair = torch.stack((half, common - half)).float().exp2()
    return transposed((code_TK.float() * shift_T[:, None]).to(E4M3)), pair.repeat_interleave(4)


@operator("komainu::fp8_row_codes")
def _row_codes(value_TK: Tensor) -> tuple[Tensor, Tensor]:
    value_TK = unit_stride(value_TK)
    return launch_rows(_row_kernel, (value_TK, value_TK.stride(0)), value_TK, value_TK.shape[1], chosen="fp8_rows")


@operator("komainu::fp8_column_codes")
def _column_codes(value_TK: Tensor, scale_T: Tensor) -> Tensor:
    value_TK = unit_stride(value_TK)
    given = (value_TK, scale_T, scale_T, value_TK.stride(0))
    return launch_columns(
        _column_kernel, given, value_TK, value_TK.shape[1], ONE_SCALE=False, EMIT_ROWS=False, EMIT_COLUMNS=True
    )


@operator("komainu::fp8_matrix_codes")
def _matrix_codes(value_TK: Tensor, scale: Tensor, rows: bool, columns: bool) -> tuple[Tensor, Tensor]:
    value_TK = unit_stride(value_TK)
    code_TK = empty_codes(value_TK, *value_TK.shape) if rows else empty_codes(value_TK, 0)
    given = (value_TK, scale, code_TK, value_TK.stride(0))
    emitted = {"EMIT_ROWS": rows, "EMIT_COLUMNS": columns}
    return code_TK, launch_columns(_column_kernel, given, value_TK, value_TK.shape[1], ONE_SCALE=True, **emitted)


def launch_rows(
    kernel: Any,  # of (*given, codes, scales, WIDTH, BLOCK, constants)
    given: Sequence[Any],
    rows_TK: Tensor,  # any tensor with a row for each token, on the device
    width: int,  # WIDTH, the columns that a program holds
    *,
    chosen: str,  # name of the launch configuration
    parts: int = 1,  # rows of codes have parts * width columns
    **constants: Any,
) -> tuple[Tensor, Tensor]:
    """Run a kernel that emits codes and scales, a program a row: ([T, parts * width], [T])."""
    code_TK, scale_T = empty_row_codes(rows_TK, parts * width)
    block, warps = configuration(chosen, rows_TK.device).whole_row(width)
    launch(
        kernel,
        (len(rows_TK),),
        *given,
        code_TK,
        scale_T,
        WIDTH=width,
        BLOCK=block,
        **constants,
        device=rows_TK.device,
        warps=warps,
        fusion=False,
    )
    return code_TK, scale_T


def launch_columns(kernel: Any, given: Sequence[Any], rows_TK: Tensor, width: int, **constants: Any) -> Tensor:
    """Run a kernel that emits transposed codes, tile by tile: [width, P], or empty with the constant EMIT_COLUMNS = False.

    Args:
        kernel: of (*given, codes, T, P / 16, constants), where the constants are WIDTH, ROWS, BLOCK and `constants`.
        rows_TK: any tensor with a row for each token, on the device.
    """
    tokens, device = rows_TK.shape[0], rows_TK.device
    columns = padded(tokens)
    code_KP = empty_codes(rows_TK, width, columns if constants.get("EMIT_COLUMNS", True) else 0)
    config = configuration("fp8_columns", device)
    launch(
        kernel,
        (triton.cdiv(columns, config.rows), triton.cdiv(width, config.block)),
        *given,
        code_KP,
        tokens,
        columns // MULTIPLE,
        WIDTH=width,
        ROWS=config.rows,
        BLOCK=config.block,
        **constants,
        device=device,
        warps=config.warps,
        fusion=False,
    )
    return code_KP


@operator("komainu::fp8_shifted_columns")
def _shifted_columns(code_TK: Tensor, scale_T: Tensor, input_scale_T: Tensor) -> tuple[Tensor, Tensor]:
    device = code_TK.device
    common = torch.empty(8, dtype=torch.float32, device=device)
    largest = torch.empty((), dtype=torch.int32, device=device)
    config = configuration("fp8_largest_scale", device)
    launch(
        _largest_scale_kernel,
        (1,),
        scale_T,
        input_scale_T,
        largest,
        common,
        code_TK.shape[0],
        BLOCK=config.block,
        device=device,
        warps=config.warps,
    )
    return launch_columns(_shift_kernel, (code_TK, scale_T, input_scale_T, largest), code_TK, code_TK.shape[1]), common


@_row_codes.register_fake
def _(value_TK):
    return empty_row_codes(value_TK, value_TK.shape[1])


@_column_codes.register_fake
def _(value_TK, scale_T):
    return empty_codes(value_TK, value_TK.shape[1], padded(value_TK.shape[0]))


@_matrix_codes.register_fake
def _(value_TK, scale, rows, columns):
    tokens, width = value_TK.shape
    code_TK = empty_codes(value_TK, *((tokens, width) if rows else (0,)))
    return code_TK, empty_codes(value_TK, width, padded(tokens) if columns else 0)


@_shifted_columns.register_fake
def _(code_TK, scale_T, input_scale_T):
    return empty_codes(code_TK, code_TK.shape[1], padded(code_TK.shape[0])), scale_T.new_empty(8)


# Steps that the kernels of other operators share: they emit codes instead of rows.


@triton.jit
def bits_of_size(value):
    """The bits of a float32's absolute value: integers in the order of the values, with infinity and NaN as the largest."""
    return value.to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def scale_and_inverse(largest):
    """(scale, 1 / scale) of rows whose largest absolute value has these bits; both NaN where it is not finite."""
    exponent = tl.maximum(((largest + 0x1FFFFF) >> 23) - 8, 1)
    finite = largest < 0x7F800000
    scale = tl.where(finite, exponent << 23, 0x7FC00000).to(tl.float32, bitcast=True)
    return scale, tl.where(finite, (254 - exponent) << 23, 0x7FC00000).to(tl.float32, bitcast=True)


@triton.jit
def encode(value, inverse):
    """The codes of float32 values, given 1 / scale."""
    return tl.clamp(value * inverse, -448.0, 448.0, propagate_nan=tl.PropagateNan.ALL).to(tl.float8e4nv)


@triton.jit
def store_row(value, code, scale, column, inside):
    """Store the codes of one row and its scale. value: float32, 0 outside."""
    row_scale, inverse = scale_and_inverse(tl.max(bits_of_size(value), axis=0))
    tl.store(scale, row_scale)
    tl.store(code + column, encode(value, inverse), mask=inside)


@triton.jit
def store_two_parts(one, other, code, scale, column, inside, DISTANCE: tl.constexpr):
    """Store the codes of both parts of one row, at `column` and DISTANCE behind it, and its scale.

    one, other: float32, 0 outside.
    """
    largest = tl.maximum(tl.max(bits_of_size(one), axis=0), tl.max(bits_of_size(other), axis=0))
    row_scale, inverse = scale_and_inverse(largest)
    tl.store(scale, row_scale)
    tl.store(code + column, encode(one, inverse), mask=inside)
    tl.store(code + column + DISTANCE, encode(other, inverse), mask=inside)


@triton.jit
def inverse_of(scale):
    """1 / scale of a power of two, exactly; NaN of NaN."""
    bits = scale.to(tl.int32, bitcast=True)
    return tl.where(bits < 0x7F800000, (254 << 23) - bits, bits).to(tl.float32, bitcast=True)


@triton.jit
def tile_of(tokens, WIDTH: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """(rows, columns, which of them exist) of this program's tile."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    return row, column, (row < tokens)[:, None] & (column < WIDTH)[None, :]


@triton.jit
def store_columns(codes, target, row, column, groups, WIDTH: tl.constexpr):
    """Store a tile of codes [rows, columns], transposed, into the matrix `target` [WIDTH, 16 groups]."""
    length = groups.to(tl.int64) * 16
    inside = (column < WIDTH)[:, None] & (row < length)[None, :]
    tl.store(target + column[:, None] * length + row[None, :], tl.trans(codes), mask=inside)


@triton.jit
def _row_kernel(
    value,  # [tokens, WIDTH]
    value_stride,  # elements from row to row
    code,  # [tokens, WIDTH]
    scale,  # [tokens] float32
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,  # WIDTH up to a power of two
):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < WIDTH
    x = tl.load(value + row * value_stride + column, mask=inside, other=0.0).to(tl.float32)
    store_row(x, code + row * WIDTH, scale + row, column, inside)


@triton.jit(do_not_specialize=["tokens", "groups"])
def _column_kernel(
    value,  # [tokens, WIDTH]
    scale,  # [tokens] float32, or [] if ONE_SCALE
    code,  # [tokens, WIDTH], written if EMIT_ROWS
    value_stride,  # elements from row to row
    target,  # [WIDTH, 16 groups], written if EMIT_COLUMNS
    tokens,
    groups,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,  # rows of a program's tile
    BLOCK: tl.constexpr,  # columns of a program's tile
    ONE_SCALE: tl.constexpr,
    EMIT_ROWS: tl.constexpr,
    EMIT_COLUMNS: tl.constexpr,
):
    row, column, inside = tile_of(tokens, WIDTH, ROWS, BLOCK)
    at = row.to(tl.int64)[:, None]
    x = tl.load(value + at * value_stride + column[None, :], mask=inside, other=0.0).to(tl.float32)
    if ONE_SCALE:
        codes = encode(x, inverse_of(tl.load(scale)))
    else:
        codes = encode(x, inverse_of(tl.load(scale + row, mask=row < tokens, other=1.0))[:, None])
    if EMIT_ROWS:
        tl.store(code + at * WIDTH + column[None, :], codes, mask=inside)
    if EMIT_COLUMNS:
        store_columns(codes, target, row, column, groups, WIDTH)


@triton.jit(do_not_specialize=["tokens"])
def _largest_scale_kernel(
    scale,  # [tokens] float32
    input_scale,  # [tokens] float32
    largest,  # [] int32: the largest sum of both exponents, as float32 stores them
    common,  # [8] float32: the elements 0 and 4 have the product 2^(largest - 254)
    tokens,
    BLOCK: tl.constexpr,  # rows of a step
):
    peak = tl.full((BLOCK,), 2, tl.int32)
    for first in range(0, tokens, BLOCK):
        row = first + tl.arange(0, BLOCK)
        inside = row < tokens
        one = tl.load(scale + row, mask=inside, other=0.0).to(tl.int32, bitcast=True) >> 23
        other = tl.load(input_scale + row, mask=inside, other=0.0).to(tl.int32, bitcast=True) >> 23
        peak = tl.maximum(peak, one + other)
    exponent = tl.max(peak, axis=0)
    tl.store(largest, exponent)
    place = tl.arange(0, 8)
    half = (exponent - 254) >> 1
    power = tl.where(place < 4, half, exponent - 254 - half)
    tl.store(common + place, ((power + 127) << 23).to(tl.float32, bitcast=True))


@triton.jit(do_not_specialize=["tokens", "groups"])
def _shift_kernel(
    code,  # [tokens, WIDTH]
    scale,  # [tokens] float32
    input_scale,  # [tokens] float32
    largest,  # [] int32, from the kernel above
    target,  # [WIDTH, 16 groups]
    tokens,
    groups,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,  # rows of a program's tile
    BLOCK: tl.constexpr,  # columns of a program's tile
):
    row, column, inside = tile_of(tokens, WIDTH, ROWS, BLOCK)
    x = tl.load(code + row.to(tl.int64)[:, None] * WIDTH + column[None, :], mask=inside, other=0.0).to(tl.float32)
    exponent = tl.load(scale + row, mask=row < tokens, other=0.0).to(tl.int32, bitcast=True) >> 23
    exponent += tl.load(input_scale + row, mask=row < tokens, other=0.0).to(tl.int32, bitcast=True) >> 23
    # Codes are at least 2^-9 and at most 448: a shift by 2^-126 leaves nothing of any of them.
    shift = (tl.maximum(exponent - tl.load(largest), -126) + 127) << 23
    shifted = x * shift.to(tl.float32, bitcast=True)[:, None]
    store_columns(shifted.to(tl.float8e4nv), target, row, column, groups, WIDTH)
