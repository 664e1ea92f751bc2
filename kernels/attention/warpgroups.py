"""Attention by ranges of keys, forward, with warps of different duties on Hopper (Shah et al. 2024,
https://arxiv.org/abs/2407.08608). In Gluon, an experimental part of Triton.

`kernels.attention.forward` computes the same within rounding, and is the default until this has been measured. The field
`warpgroups` of the configuration "attention_forward" chooses.

A program owns up to 64 queries of two query heads that share a key/value head. One warp, the producer, loads blocks of keys and
values by TMA into slots of shared memory. Two warpgroups, the consumers, have a query head each and read the same slots, so a
loaded block serves 128 rows of scores. While one consumer computes exponentials, products of the other can run.

**Within a consumer.** A step starts the scores of block i and behind them the product of block i - 1 with its values. The
exponentials of block i run beside this product. The assembler allows two products in flight only where nothing touches their
sums in between: so a step waits for its product before it rescales the sum, and starts nothing before.

**Slots.** Block n of a program lies in slot n % SLOTS. A slot's barrier `full` completes when its bytes have arrived, `empty`
when both consumers have read it. Who waits for a barrier names the parity of the phase that must be over.

**Values behind a range's end.** They may be another document's and not finite, and 0 times NaN is NaN. TMA has loaded them, so
consumers overwrite them by zeros before the product. Both write the same bits, so neither waits for the other.

Shapes: T tokens, H query heads, K key/value heads, E head size.
"""

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from kernels.attention.tiles import (
    LOG2_E,
    NO_PEAK,
    describable,
    heads_side_by_side,
    own_range,
    own_tile,
    rows_and_parts,
    sections,
    softmax_step,
)
from kernels.configurations import configuration
from kernels.launch import launch

# Triton before 3.7 has another name for it.
load_tile = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared
# Query heads of a program, a consumer for each.
PAIR = gl.constexpr(2)
# Registers of a thread: all that 3 x 128 threads may have, of which the producer hands most to the consumers.
REGISTERS, CONSUMERS_REGISTERS, PRODUCERS_REGISTERS = 168, gl.constexpr(240), gl.constexpr(24)


def can_run(query_THE: Tensor, key_TKE: Tensor, value_TKE: Tensor, tile: int) -> bool:
    """Whether the kernel takes these tensors and lists.

    It needs values of 2 bytes, heads of 64 or 128, an even number of query heads for each key/value head, rows that TMA can
    read, and tiles of at least the 64 rows that a warpgroup multiplies.
    """
    _, heads, size = query_THE.shape
    rows, _ = rows_and_parts(tile, configuration("attention_forward", query_THE.device))
    described = all(describable(heads_side_by_side(tensor)) for tensor in (query_THE, key_TKE, value_TKE))
    paired = heads // key_TKE.shape[1] % PAIR.value == 0
    return query_THE.itemsize == 2 and size in (64, 128) and paired and described and rows >= 64


def forward_by_warpgroups(
    query_THE: Tensor,
    key_TKE: Tensor,
    value_TKE: Tensor,
    work: Tensor,
    query_tiles: int,
    ranges: int,  # row of the lists where ranges begin
    window: int,
    tile: int,
    out_THE: Tensor,  # result, contiguous
    log_sum_exp_HT: Tensor,  # result, float32, contiguous
) -> None:
    """`kernels.attention.forward.attention_forward` of tensors for which `can_run`."""
    config = configuration("attention_forward", work.device)
    tokens, heads, size = query_THE.shape
    rows, parts = rows_and_parts(tile, config)
    launch(
        _forward_kernel,
        (query_tiles * parts * heads // PAIR.value,),
        _described(query_THE, rows),
        _described(key_TKE, config.block),
        _described(value_TKE, config.block),
        work,
        ranges,
        tokens,
        window,
        size**-0.5 * LOG2_E.value,
        out_THE,
        log_sum_exp_HT,
        HEADS=heads,
        GROUP=heads // key_TKE.shape[1],
        SIZE=size,
        PARTS=parts,
        ROWS=rows,
        BLOCK=config.block,
        SLOTS=config.stages,
        device=work.device,
        warps=4,
        registers=REGISTERS,
    )


def _described(tensor: Tensor, rows: int) -> TensorDescriptor:
    tensor = heads_side_by_side(tensor)
    tokens, heads, size = tensor.shape
    dtype = gl.bfloat16 if tensor.dtype == torch.bfloat16 else gl.float16
    layout = gl.NVMMASharedLayout.get_default_for([rows, size], dtype)
    return TensorDescriptor(tensor, [tokens, heads * size], [tensor.stride(0), 1], [rows, size], layout)


@gluon.jit(do_not_specialize=["ranges", "tokens", "window"])
def _forward_kernel(
    query,  # [tokens, HEADS SIZE]: a descriptor of [ROWS, SIZE]
    key,  # [tokens, HEADS / GROUP SIZE]: a descriptor of [BLOCK, SIZE]
    value,  # likewise
    work,  # [rows, 4] int32: the work lists
    ranges,  # row of `work` where ranges begin
    tokens,
    window,
    scale_log2,  # SIZE^(-1/2) log2(e)
    out,  # [tokens, HEADS, SIZE]
    log_sum_exp,  # [HEADS, tokens] float32
    HEADS: gl.constexpr,  # query heads
    GROUP: gl.constexpr,  # query heads for each key/value head, an even number
    SIZE: gl.constexpr,  # elements of a head
    PARTS: gl.constexpr,  # programs for a tile of the lists and a pair of heads
    ROWS: gl.constexpr,  # queries of a program
    BLOCK: gl.constexpr,  # keys of a step
    SLOTS: gl.constexpr,  # blocks of keys, and of values, that are loaded or read at once
):
    pair, start, end, first_range, last_range = own_tile(gl.program_id(0), work, 0, HEADS // PAIR, ROWS, PARTS)
    # A part of a short tile may have no queries.
    if start >= end:
        last_range = first_range
    part = (work, ranges, start, end, first_range, last_range, window)
    queries = gl.allocate_shared_memory(query.dtype, [PAIR, ROWS, SIZE], query.layout)
    keys = gl.allocate_shared_memory(key.dtype, [SLOTS, BLOCK, SIZE], key.layout)
    values = gl.allocate_shared_memory(value.dtype, [SLOTS, BLOCK, SIZE], value.layout)
    loaded = gl.allocate_shared_memory(gl.int64, [PAIR, 1], mbarrier.MBarrierLayout())
    key_full = gl.allocate_shared_memory(gl.int64, [SLOTS, 1], mbarrier.MBarrierLayout())
    key_empty = gl.allocate_shared_memory(gl.int64, [SLOTS, 1], mbarrier.MBarrierLayout())
    value_full = gl.allocate_shared_memory(gl.int64, [SLOTS, 1], mbarrier.MBarrierLayout())
    value_empty = gl.allocate_shared_memory(gl.int64, [SLOTS, 1], mbarrier.MBarrierLayout())
    for consumer in gl.static_range(PAIR):
        mbarrier.init(loaded.index(consumer), count=1)
    for slot in gl.static_range(SLOTS):
        mbarrier.init(key_full.index(slot), count=1)
        mbarrier.init(key_empty.index(slot), count=PAIR)
        mbarrier.init(value_full.index(slot), count=1)
        mbarrier.init(value_empty.index(slot), count=PAIR)
    # TMA must see the barriers as they are now.
    fence_async_shared()
    slots = (queries, keys, values, loaded, key_full, key_empty, value_full, value_empty)
    result = (tokens, scale_log2, out, log_sum_exp, pair)
    gl.warp_specialize(
        [
            (_first_consumer, (part, slots, result, HEADS)),
            (_second_consumer, (part, slots, result, HEADS)),
            (_producer, (part, slots, query, key, value, pair, GROUP)),
        ],
        [4, 1],
        [CONSUMERS_REGISTERS, PRODUCERS_REGISTERS],
    )


@gluon.jit
def _producer(part, slots, query, key, value, pair, GROUP: gl.constexpr):
    """Load the queries of both heads, then the blocks of keys and values in their order."""
    work, ranges, start, end, first_range, last_range, window = part
    queries, keys, values, loaded, key_full, key_empty, value_full, value_empty = slots
    SLOTS: gl.constexpr = keys.shape[0]
    BLOCK: gl.constexpr = keys.shape[1]
    SIZE: gl.constexpr = keys.shape[2]
    for consumer in gl.static_range(PAIR):
        mbarrier.expect(loaded.index(consumer), query.block_type.nbytes)
        load_tile(query, [start, (pair * PAIR + consumer) * SIZE], loaded.index(consumer), queries.index(consumer))
    column = pair * PAIR // GROUP * SIZE
    number = 0
    for listed in range(first_range, last_range):
        kv_start, kv_end, _ = own_range(work, ranges + listed, start, end, window)
        for first in range(kv_start, kv_end, BLOCK):
            slot = number % SLOTS
            # Parity 1 counts as over before the first completion: a new slot is empty.
            over = ((number // SLOTS) & 1) ^ 1
            mbarrier.wait(key_empty.index(slot), over)
            mbarrier.expect(key_full.index(slot), key.block_type.nbytes)
            load_tile(key, [first, column], key_full.index(slot), keys.index(slot))
            mbarrier.wait(value_empty.index(slot), over)
            mbarrier.expect(value_full.index(slot), value.block_type.nbytes)
            load_tile(value, [first, column], value_full.index(slot), values.index(slot))
            number += 1


@gluon.jit
def _first_consumer(part, slots, result, HEADS: gl.constexpr):
    _consumer(part, slots, result, HEADS, 0)


@gluon.jit
def _second_consumer(part, slots, result, HEADS: gl.constexpr):
    _consumer(part, slots, result, HEADS, 1)


@gluon.jit
def _consumer(part, slots, result, HEADS: gl.constexpr, CONSUMER: gl.constexpr):
    """Attention of the program's queries of one head."""
    start, end, first_range, last_range, window = part[2], part[3], part[4], part[5], part[6]
    queries, keys, values, loaded, key_full, key_empty, value_full, value_empty = slots
    tokens, scale, out, log_sum_exp, pair = result
    SLOTS: gl.constexpr = keys.shape[0]
    BLOCK: gl.constexpr = keys.shape[1]
    SIZE: gl.constexpr = keys.shape[2]
    ROWS: gl.constexpr = queries.shape[1]
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK, 16])
    RESULT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, SIZE, 16])
    FACTOR: gl.constexpr = gl.DotOperandLayout(0, RESULT, 2)
    row = start + gl.arange(0, ROWS, gl.SliceLayout(1, SCORES))
    column = gl.arange(0, BLOCK, gl.SliceLayout(0, SCORES))
    total = gl.zeros([ROWS], gl.float32, gl.SliceLayout(1, SCORES))
    peak = gl.full([ROWS], NO_PEAK, gl.float32, gl.SliceLayout(1, SCORES))
    nothing = gl.zeros([ROWS, BLOCK], gl.float32, SCORES)
    acc = gl.zeros([ROWS, SIZE], gl.float32, RESULT)
    blocks = _blocks(part, BLOCK)
    q = queries.index(CONSUMER)
    mbarrier.wait(loaded.index(CONSUMER), 0)
    if blocks > 0:
        mbarrier.wait(key_full.index(0), 0)
        started = warpgroup_mma(q, keys.index(0).permute((1, 0)), nothing, use_acc=False, is_async=True)
        scores = warpgroup_mma_wait(0, deps=(started,))
        mbarrier.arrive(key_empty.index(0), count=1)
        place = _next_block(part, (first_range - 1, 0, 0, 0, 0, 0, 0, 0), BLOCK)
        scores = _visible(scores, row, column, place, window)
        total, peak, weights, _ = softmax_step(total, peak, scores, scale)
        factor = gl.convert_layout(weights.to(q.dtype), FACTOR)
        for number in range(1, blocks):
            slot = number % SLOTS
            before = (number - 1) % SLOTS
            mbarrier.wait(value_full.index(before), ((number - 1) // SLOTS) & 1)
            _cut(values.index(before), place)
            mbarrier.wait(key_full.index(slot), (number // SLOTS) & 1)
            # The assembler keeps both in flight only while nothing else touches their sums.
            started = warpgroup_mma(q, keys.index(slot).permute((1, 0)), nothing, use_acc=False, is_async=True)
            running = warpgroup_mma(factor, values.index(before), acc, is_async=True)
            scores = warpgroup_mma_wait(1, deps=(started,))
            mbarrier.arrive(key_empty.index(slot), count=1)
            place = _next_block(part, place, BLOCK)
            scores = _visible(scores, row, column, place, window)
            total, peak, weights, kept = softmax_step(total, peak, scores, scale)
            acc = warpgroup_mma_wait(0, deps=(running,))
            mbarrier.arrive(value_empty.index(before), count=1)
            acc = acc * gl.convert_layout(kept, gl.SliceLayout(1, RESULT))[:, None]
            factor = gl.convert_layout(weights.to(q.dtype), FACTOR)
        last = (blocks - 1) % SLOTS
        mbarrier.wait(value_full.index(last), ((blocks - 1) // SLOTS) & 1)
        _cut(values.index(last), place)
        acc = warpgroup_mma(factor, values.index(last), acc)
    # Only padding sees nothing, and it has no ranges. A sum of weights that is 0 or NaN is no sign of it.
    padding = first_range == last_range
    divisor = gl.where(padding, 1.0, total)
    lse = gl.where(padding, float("-inf"), (peak * scale + gl.log2(divisor)) / LOG2_E)
    head = pair * PAIR + CONSUMER
    gl.store(log_sum_exp + gl.cast(head, gl.int64) * tokens + row, lse, mask=row < end)
    # Through shared memory, from which rows are written 16 bytes at a time. Nobody reads the queries any more.
    q.store((acc / gl.convert_layout(divisor, gl.SliceLayout(1, RESULT))[:, None]).to(q.dtype))
    WRITTEN: gl.constexpr = gl.BlockedLayout([1, 8], [256 // SIZE, SIZE // 8], [4, 1], [1, 0])
    local = gl.arange(0, ROWS, gl.SliceLayout(1, WRITTEN))
    element = gl.arange(0, SIZE, gl.SliceLayout(0, WRITTEN))
    at = out + gl.cast(start, gl.int64) * (HEADS * SIZE) + head * SIZE
    inside = (local < end - start)[:, None] & (element < SIZE)[None, :]
    gl.store(at + local[:, None] * (HEADS * SIZE) + element[None, :], q.load(WRITTEN), mask=inside)


@gluon.jit
def _blocks(part, BLOCK: gl.constexpr):
    """The number of blocks of all ranges."""
    work, ranges, start, end, first_range, last_range, window = part
    blocks = 0
    for listed in range(first_range, last_range):
        kv_start, kv_end, _ = own_range(work, ranges + listed, start, end, window)
        blocks += gl.cdiv(gl.maximum(kv_end - kv_start, 0), BLOCK)
    return blocks


@gluon.jit
def _next_block(part, place, BLOCK: gl.constexpr):
    """The block after a block: (range, block of the range, first key, end of the range, its shift, and its three sections:
    blocks of the range, first whole block, end of whole blocks)."""
    work, ranges, start, end, window = part[0], part[1], part[2], part[3], part[6]
    listed, block, first, kv_end, shift, blocks, left, whole = place
    block += 1
    first += BLOCK
    # Ranges that this part of the tile does not see are empty.
    while block >= blocks:
        listed += 1
        block = 0
        first, kv_end, shift = own_range(work, ranges + listed, start, end, window)
        _, left, whole, blocks = sections(start, end, first, kv_end, shift, window, BLOCK)
    return listed, block, first, kv_end, shift, blocks, left, whole


@gluon.jit
def _visible(scores, row, column, place, window):
    """The scores, with -inf where a query does not see a key. Only blocks at a range's ends pay for the mask."""
    block, first, kv_end, shift, left, whole = place[1], place[2], place[3], place[4], place[6], place[7]
    if (block < left) | (block >= whole):
        key = first + column
        distance = (row - shift)[:, None] - key[None, :]
        scores = gl.where((distance >= 0) & (distance < window) & (key < kv_end)[None, :], scores, float("-inf"))
    return scores


@gluon.jit
def _cut(values, place):
    """Overwrite values behind the range's end by zeros."""
    first, kv_end = place[2], place[3]
    BLOCK: gl.constexpr = values.shape[0]
    SIZE: gl.constexpr = values.shape[1]
    ROWS: gl.constexpr = 16
    CUT: gl.constexpr = gl.BlockedLayout([1, 8], [256 // SIZE, SIZE // 8], [4, 1], [1, 0])
    if first + BLOCK > kv_end:
        for piece in gl.static_range(BLOCK // ROWS):
            rest = kv_end - first - piece * ROWS
            if rest < ROWS:
                rows = values.slice(piece * ROWS, ROWS)
                inside = gl.arange(0, ROWS, gl.SliceLayout(1, CUT)) < rest
                rows.store(gl.where(inside[:, None], rows.load(CUT), 0.0).to(values.dtype))
        # Products and TMA see stores only behind a fence.
        fence_async_shared()
