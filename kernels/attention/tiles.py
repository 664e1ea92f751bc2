"""Tiles of attention: the steps that the forward, backward and decode kernels share, on the host and on the device.

A program owns a tile of queries (or keys) of one head. It walks through the ranges of keys that the work lists give it, BLOCK
keys at a time. Kernels read rows by descriptors (TMA) where the chip and the memory layout allow them, else through pointers.

Shapes: T tokens, E head size.
"""

from collections.abc import Sequence
from typing import Any

import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from kernels.configurations import Configuration, configuration
from kernels.launch import INTERPRETED, launch

IN_INTERPRETER = tl.constexpr(INTERPRETED)
LOG2_E = tl.constexpr(1.4426950408889634)
# The peak before the first score. It is finite, so that a block in which a row sees nothing leaves this row unchanged.
NO_PEAK = tl.constexpr(-1.0e30)


@triton.constexpr_function
def columns(size: int) -> int:
    """Columns of a head's tile: a power of two of at least 16, which matrix products need."""
    return max(16, triton.next_power_of_2(size))


def heads_side_by_side(tensor: Tensor) -> Tensor:
    """[T, heads, E] as kernels take it: any stride between tokens, contiguous inside a token. Copied only where it is not."""
    contiguous = tensor.stride(2) == 1 and (tensor.shape[1] == 1 or tensor.stride(1) == tensor.shape[2])
    return tensor if contiguous else tensor.contiguous()


def launch_tiles(
    kernel: Any,
    name: str,  # of the kernel's configuration
    tiles: int,  # tiles of the lists that `by_tile` is cut into
    work: Tensor,  # the work lists
    ranges: int,  # row of the lists where ranges begin
    window: int,
    tile: int,  # rows of a tile of the lists
    *,
    by_tile: Sequence[Tensor],  # [T, heads, E]: a program reads its own tile of each
    by_block: Sequence[Tensor],  # [T, heads, E]: a program walks through these in blocks
    rest: Sequence[Tensor | int | float | None],
    blocks_by_pointer: bool = False,  # `by_block` never as descriptors
    **constants: Any,
) -> None:
    """Start a kernel with one program for each head of `by_tile` and tile, or part of a tile.

    The kernel's arguments are: `by_tile` as pointers, `by_block` (as descriptors if DESCRIPTORS, else as pointers), their
    strides from token to token, work, ranges, tokens, window, scale_log2, `rest`, `constants`, and the constants below.
    """
    config = configuration(name, work.device)
    rows, parts = rows_and_parts(tile, config)
    by_tile = [heads_side_by_side(tensor) for tensor in by_tile]
    by_block = [heads_side_by_side(tensor) for tensor in by_block]
    described = config.descriptors and not blocks_by_pointer and all(describable(tensor) for tensor in by_block)
    (tokens, heads, size), others = by_tile[0].shape, by_block[0].shape[1]
    launch(
        kernel,
        (tiles * parts * heads,),
        *by_tile,
        *(_described(tensor, config.block) if described else tensor for tensor in by_block),
        *(tensor.stride(0) for tensor in (*by_tile, *by_block)),
        work,
        ranges,
        tokens,
        window,
        size**-0.5 * LOG2_E.value,
        *rest,
        HEADS=heads,
        GROUP=max(heads, others) // min(heads, others),
        SIZE=size,
        TILE=rows,
        PARTS=parts,
        BLOCK=config.block,
        DESCRIPTORS=described,
        **constants,
        device=work.device,
        warps=config.warps,
        stages=config.stages,
    )


def rows_and_parts(tile: int, config: Configuration) -> tuple[int, int]:
    """(rows of a program, programs for a tile of the work lists). Rows are a power of two of at least 16."""
    whole = max(16, triton.next_power_of_2(tile))
    rows = min(whole, config.rows)
    return rows, whole // rows


def describable(tensor: Tensor) -> bool:
    """Whether TMA can read [T, heads, E] as a matrix of T rows: aligned rows, and heads as wide as a kernel's tile."""
    tokens, _, size = tensor.shape
    aligned = tensor.stride(0) * tensor.itemsize % 16 == 0 and tensor.data_ptr() % 16 == 0
    return tokens > 0 and aligned and size == columns(size)


def _described(tensor: Tensor, rows: int) -> TensorDescriptor:
    tokens, heads, size = tensor.shape
    return TensorDescriptor(tensor, [tokens, heads * size], [tensor.stride(0), 1], [rows, size])


@triton.jit
def own_tile(
    number,  # of the program
    work,  # [rows, 4] int32: the work lists
    first_tile,  # row of the first tile
    HEADS: tl.constexpr,
    TILE: tl.constexpr,  # rows of a program
    PARTS: tl.constexpr,  # programs for a tile of the lists
):
    """(head, start, end, first range, end of ranges) of this program's part of a tile; start >= end for an empty part."""
    # The heads of a tile run next to each other in time, because they read the same rows.
    part = number // HEADS
    tile = work + (first_tile + part // PARTS) * 4
    start = tl.load(tile) + part % PARTS * TILE
    end = tl.minimum(tl.load(tile + 1), start + TILE)
    return number % HEADS, start, end, tl.load(tile + 2), tl.load(tile + 3)


@triton.jit
def own_range(work, number, start, end, window):
    """(start, end, shift) of range `number` of keys, narrowed to the keys that queries [start, end) see."""
    found = work + number * 4
    shift = tl.load(found + 2)
    return tl.maximum(tl.load(found), start - shift - window + 1), tl.minimum(tl.load(found + 1), end - shift), shift


@triton.jit
def sections(start, end, kv_start, kv_end, shift, window, BLOCK: tl.constexpr):
    """Bounds of a range's three sections, in blocks of keys, for queries [start, end).

    Section 0: the window's edge cuts the block for some query. Section 1: every query sees the whole block. Section 2: the
    diagonal or the range's end cuts the block. Only blocks of section 1 are certain to lie inside the range. The other sections
    mask their scores, and zero the rows behind the range's end that a product sums over: they may be another document's, and
    a weight of 0 times NaN is NaN.
    """
    blocks = tl.cdiv(tl.maximum(kv_end - kv_start, 0), BLOCK)
    # The last query sees no key before this block.
    left = tl.cdiv(tl.maximum(end - shift - window - kv_start, 0), BLOCK)
    whole = tl.maximum(tl.minimum(start - shift + 1, kv_end) - kv_start, 0) // BLOCK
    left = tl.minimum(left, blocks)
    return 0, left, tl.maximum(left, whole), blocks


@triton.jit
def within(distance, window):
    """0 <= distance < window, in one comparison: read without a sign, a negative distance lies beyond any window."""
    return distance.to(tl.uint32, bitcast=True) < tl.cast(window, tl.uint32)


@triton.jit
def load_rows(
    source,  # [T, heads, SIZE]: a descriptor, or a pointer
    stride,  # elements from token to token
    head,
    first,  # the first row
    limit,  # rows from here on are zeros, or by descriptor whatever memory holds
    ROWS: tl.constexpr,
    SIZE: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
):
    """Rows [first, first + ROWS) of a head: [ROWS, columns(SIZE)]."""
    if DESCRIPTORS:
        rows = source.load([first, head * SIZE])
    else:
        row = first + tl.arange(0, ROWS)
        column = tl.arange(0, columns(SIZE))
        inside = (row < limit)[:, None] & (column < SIZE)[None, :]
        offset = tl.cast(head, tl.int64) * SIZE + row.to(tl.int64)[:, None] * stride + column[None, :]
        rows = tl.load(source + offset, mask=inside, other=0.0)
    return rows


@triton.jit
def cut(rows, first, limit, ROWS: tl.constexpr, DESCRIPTORS: tl.constexpr):
    """What `load_rows` gave, with zeros from row `limit` on: as the factor of a product that sums over rows.

    The tile goes through registers, so only blocks that may cross a range's end are cut.
    """
    if DESCRIPTORS:
        rows = tl.where((first + tl.arange(0, ROWS) < limit)[:, None], rows, 0.0)
    return rows


@triton.jit
def wait_for(
    number,  # a pointer to int32, written by other programs
    awaited,  # int32
):
    """Wait until `number` is `awaited`, and return it: what its writer stored before, every thread may then load.

    Every thread looks for itself, in PTX: Triton does not load ahead in a loop around a loop, and so none around this wait. The
    interpreter runs programs one after the other, so that there the number must be right already.
    """
    if IN_INTERPRETER:
        found = tl.load(number)
        tl.assume(found == awaited)
    else:
        found = tl.inline_asm_elementwise(
            """{
            .reg .pred other;
            look:
            ld.acquire.gpu.global.s32 $0, [$1];
            setp.ne.s32 other, $0, $2;
            @other bra look;
            }""",
            "=&r,l,r",
            [number, awaited],
            dtype=tl.int32,
            is_pure=False,
            pack=1,
        )
    return found


@triton.jit
def announce(
    number,  # a pointer to int32
    value,  # int32
):
    """Set `number` to `value` after all that this program has stored: for a program that waits for it."""
    if IN_INTERPRETER:
        tl.store(number, value)
    else:
        # In PTX, because Triton does not load ahead in a loop with a barrier.
        tl.inline_asm_elementwise(
            """{
            .reg .pred first;
            .reg .u32 thread;
            bar.sync 0;
            mov.u32 thread, %tid.x;
            setp.eq.u32 first, thread, 0;
            @first st.release.gpu.global.s32 [$1], $2;
            mov.u32 $0, 0;
            }""",
            "=&r,l,r",
            [number, value],
            dtype=tl.int32,
            is_pure=False,
            pack=1,
        )


@triton.jit
def stored_rows(
    target,  # [T, HEADS, SIZE], contiguous
    first,  # the first row
    limit,  # rows from here on are left out
    head,
    ROWS: tl.constexpr,
    HEADS: tl.constexpr,
    SIZE: tl.constexpr,
):
    """(pointers, mask) of rows [first, first + ROWS) of a head: [ROWS, columns(SIZE)]."""
    row = tl.arange(0, ROWS)
    column = tl.arange(0, columns(SIZE))
    # One address for the tile and constant distances from it: an address for each row would take registers.
    base = target + tl.cast(first, tl.int64) * (HEADS * SIZE) + head * SIZE
    return base + (row[:, None] * (HEADS * SIZE) + column[None, :]), (row < limit - first)[:, None] & (column < SIZE)[None, :]


@triton.jit
def store_rows(
    target,  # [T, HEADS, SIZE], contiguous
    values,  # [ROWS, columns(SIZE)]
    first,  # the first row
    limit,  # rows from here on are not stored
    head,
    ROWS: tl.constexpr,
    HEADS: tl.constexpr,
    SIZE: tl.constexpr,
):
    """Store rows of a head. Never by descriptor: that would overwrite the first rows of the tile behind a short tile."""
    at, inside = stored_rows(target, first, limit, head, ROWS, HEADS, SIZE)
    tl.store(at, values.to(target.dtype.element_ty), mask=inside)


@triton.jit
def softmax_step(total, peak, scores, scale):
    """Take a block of scores into a running softmax: (sum of weights, peak, weights of the block, factor of earlier weights).

    total, peak: sum of weights and largest score of each row so far. scale: of the scores, times log2(e).
    """
    raised = tl.maximum(peak, tl.max(scores, axis=1))
    kept = tl.exp2((peak - raised) * scale)
    weights = tl.exp2(scores * scale - (raised * scale)[:, None])
    return total * kept + tl.sum(weights, axis=1), raised, weights, kept
