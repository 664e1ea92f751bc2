"""Mutants that no test can detect, because they compute the same: module -> {name of the mutant: reason}."""

_PROMOTED = "the other operand is float32 already and promotes it"
_STORED = "the store converts to the type of the result"
_QUICKER = "the condition only saves time: without it the masks give the same"
_WIDENED = "the value lies within a row, which fits 32 bits, and the operand that it is added to has 64"
_FEW_SPLITS = "splits times rows is at most the rows of all programs that a chip runs at once, which fits 32 bits"
_ZEROS = "the rows behind the range's end are zeros, whatever their weight"
_NO_ROWS = "the rows behind the last are zeros, whatever their scale"
_HIDDEN = "the value is never stored, or is replaced where it is masked"
_MASKED = "the bound only decides which blocks are masked: those that it moves are masked needlessly, and give the same"
_MORE = "the tokens that the bound adds are masked"
_BEFORE = "a range with a shift is a prefix, which ends before the queries that continue it, whatever the shift"
_NO_KEYS = "without a key the peak is NO_PEAK, which weighs nothing beside a split with keys"
_NO_GPU = "mutants run in the interpreter, where the condition is true"
_VAST = "heads times tokens passes 32 bits only where the queries of a row take more than 64 GB"

EQUIVALENT: dict[str, dict[str, str]] = {
    "adamw": {
        "_adamw_kernel: if (start >= 0) & (start + BLOCK <= elements): -> if False:": _QUICKER,
        "_adamw_kernel: start >= 0 -> start > 0": _QUICKER,
        "_adamw_kernel: start + BLOCK <= elements -> start + BLOCK < elements": _QUICKER,
        "_round: bits & 2147483647 < 2139095040 -> bits & 2147483647 <= 2139095040": (
            "the low bits of infinity are 0, so that 16 random bits carry nothing into its high half"
        ),
    },
    "attention/backward": {
        "_key_kernel: if start >= end: -> if False:": _QUICKER,
        "_key_kernel: start >= end -> start > end": _QUICKER,
        "_query_kernel: if start >= end: -> if False:": _QUICKER,
        "_query_kernel: start >= end -> start > end": _QUICKER,
        "_query_kernel: if section != 1: -> if True:": _QUICKER,
        "_query_kernel: if section != 1: -> if True: (number 2)": _QUICKER,
        "_delta_kernel: g.to(tl.float32) -> g": _PROMOTED,
        "_delta_kernel: o.to(tl.float32) -> o": _PROMOTED,
        "_delta_kernel: head.to(tl.int64) -> head": _VAST,
        "_query_kernel: head.to(tl.int64) -> head": _VAST,
        "_key_kernel: head.to(tl.int64) -> head": _VAST,
        "_key_kernel: tl.cast(tokens, tl.int64) -> tokens": _VAST,
        "_key_kernel: tl.load(log_sum_exp + base + row, mask=inside, other=float('inf')) -> "
        "tl.load(log_sum_exp + base + row, mask=inside, other=0)": _ZEROS,
    },
    "attention/decode": {
        "_split_kernel: (first_row + TILE - 1) // GROUP -> first_row + TILE - 1": _QUICKER,
        "_split_kernel: (tl.program_id(0) % KV_HEADS).to(tl.int64) -> tl.program_id(0) % KV_HEADS": _WIDENED,
        "_split_kernel: tl.minimum((first_row + TILE - 1) // GROUP + 1, tokens) -> "
        "tl.maximum((first_row + TILE - 1) // GROUP + 1, tokens)": _MORE,
        "_split_kernel: seen + first_row // GROUP -> seen": _MORE,
        "_split_kernel: seen + first_row // GROUP - window + 1 -> seen + first_row // GROUP - window": _MORE,
        "_split_kernel: high - low -> high": "longer splits, of which fewer have keys, cover the same tokens",
        "_split_kernel: split.to(tl.int64) -> split": _WIDENED,
        "_split_kernel: tl.where(total > 0, peak * scale + tl.log2(divisor), float('-inf')) -> "
        "peak * scale + tl.log2(divisor)": _NO_KEYS,
        "_combine_kernel: rows.to(tl.int64) -> rows": _FEW_SPLITS,
        "_combine_kernel: rows.to(tl.int64) -> rows (number 2)": _FEW_SPLITS,
    },
    "attention/decode_rows": {
        "_rows_kernel: (tl.program_id(0) % KV_HEADS).to(tl.int64) -> tl.program_id(0) % KV_HEADS": _WIDENED,
        "_rows_kernel: split.to(tl.int64) -> split": _FEW_SPLITS,
        "_rows_kernel: tl.where(total > 0, peak * scale + tl.log2(divisor), float('-inf')) -> "
        "peak * scale + tl.log2(divisor)": _NO_KEYS,
        "_rows_kernel: total > 0 -> total >= 0 (number 2)": _NO_KEYS,
    },
    "attention/forward": {
        "_forward_kernel: if start >= end: -> if False:": _QUICKER,
        "_forward_kernel: start >= end -> start > end": _QUICKER,
        "_forward_kernel: head.to(tl.int64) -> head": _VAST,
        "_forward_kernel: if section != 1: -> if True:": _QUICKER,
        "_forward_kernel: if section != 1: -> if True: (number 2)": _QUICKER,
    },
    "attention/tiles": {
        "cut: if DESCRIPTORS: -> if True:": _QUICKER,
        "own_range: end - shift -> end": _BEFORE,
        "own_range: start - shift - window + 1 -> start - shift - window": _MORE,
        "sections: tl.minimum(left, blocks) -> tl.maximum(left, blocks)": _MASKED,
        "sections: kv_end - kv_start -> kv_end": _MORE,
        "sections: end - shift - window - kv_start -> end - shift - window": _MASKED,
        "sections: start - shift + 1 -> start - shift": _MASKED,
        "sections: end - shift -> end": _MASKED,
        "sections: tl.maximum(tl.minimum(start - shift + 1, kv_end) - kv_start, 0) -> "
        "tl.minimum(tl.minimum(start - shift + 1, kv_end) - kv_start, 0)": _MASKED,
        "sections: start - shift -> start": _BEFORE,
        "load_rows: tl.cast(head, tl.int64) -> head": _WIDENED,
        "sections: end - shift - window -> end - shift": _QUICKER,
        "wait_for: if IN_INTERPRETER: -> if True:": _NO_GPU,
        "announce: if IN_INTERPRETER: -> if True:": _NO_GPU,
    },
    "embedding": {
        "_forward_kernel: (word.to(tl.int32, bitcast=True) >> 8).to(tl.float32) -> word.to(tl.int32, bitcast=True) >> 8": (
            "the sum of an integer and 0.5 is float32 already"
        ),
        "_backward_kernel: same & (tl.load(sorted_tokens + at, mask=same, other=-1) == token) -> "
        "tl.load(sorted_tokens + at, mask=same, other=-1) == token": "a masked load gives -1, which is no token",
        "_backward_kernel: tl.load(sorted_tokens + at, mask=same, other=-1) -> "
        "tl.load(sorted_tokens + at, mask=same, other=0)": _HIDDEN,
    },
    "fp8": {
        "inverse_of: bits < 2139095040 -> bits <= 2139095040": "a scale is a power of two or NaN, never infinity",
        "_column_kernel: tl.load(value + at * value_stride + column[None, :], mask=inside, other=0.0).to(tl.float32) -> "
        "tl.load(value + at * value_stride + column[None, :], mask=inside, other=0.0)": _PROMOTED,
        "_column_kernel: tl.load(scale + row, mask=row < tokens, other=1.0) -> "
        "tl.load(scale + row, mask=row < tokens, other=0)": _NO_ROWS,
        "_shift_kernel: tl.load(code + row.to(tl.int64)[:, None] * WIDTH + column[None, :], mask=inside, other=0.0)"
        ".to(tl.float32) -> tl.load(code + row.to(tl.int64)[:, None] * WIDTH + column[None, :], mask=inside, "
        "other=0.0)": _PROMOTED,
    },
    "gradient_norm": {
        "_sum_squares_kernel: if (block + 1) * BLOCK <= elements: -> if False:": _QUICKER,
        "_sum_squares_kernel: (block + 1) * BLOCK <= elements -> (block + 1) * BLOCK < elements": _QUICKER,
        "_total_kernel: tl.sqrt(tl.sum(total, axis=0)).to(tl.float32) -> tl.sqrt(tl.sum(total, axis=0))": _STORED,
    },
    "rms_norm": {
        "_columns_kernel: tl.load(total + row.to(tl.int64)[:, None] * total_stride + column[None, :], mask=inside, other=0.0)"
        ".to(tl.float32) -> tl.load(total + row.to(tl.int64)[:, None] * total_stride + column[None, :], mask=inside, "
        "other=0.0)": _PROMOTED,
        "_columns_kernel: tl.load(weight + column, mask=column < WIDTH, other=0.0).to(tl.float32) -> "
        "tl.load(weight + column, mask=column < WIDTH, other=0.0)": _PROMOTED,
        "_columns_kernel: (x * s[:, None] * w[None, :]).to(total.dtype.element_ty).to(tl.float32) -> "
        "(x * s[:, None] * w[None, :]).to(total.dtype.element_ty)": _PROMOTED,
        "_columns_kernel: tl.load(code_scale + row, mask=row < tokens, other=1.0) -> "
        "tl.load(code_scale + row, mask=row < tokens, other=0)": _NO_ROWS,
        "_backward_kernel: program.to(tl.int64) -> program": (
            "a chip runs a few hundred programs, whose sums of one row each fit 32 bits"
        ),
        "_backward_kernel: tl.load(weight + column, mask=inside, other=0.0).to(tl.float32) -> "
        "tl.load(weight + column, mask=inside, other=0.0)": _PROMOTED,
        "_backward_kernel: tl.load(grad + row * grad_stride + column, mask=inside, other=0.0).to(tl.float32) -> "
        "tl.load(grad + row * grad_stride + column, mask=inside, other=0.0)": _PROMOTED,
        "_backward_kernel: tl.load(total + row * total_stride + column, mask=inside, other=0.0).to(tl.float32) -> "
        "tl.load(total + row * total_stride + column, mask=inside, other=0.0)": _PROMOTED,
        "_backward_kernel: tl.load(grad_total + row * grad_total_stride + column, mask=inside, other=0.0).to(tl.float32) -> "
        "tl.load(grad_total + row * grad_total_stride + column, mask=inside, other=0.0)": _PROMOTED,
        "_forward_kernel: tl.load(weight + column, mask=inside, other=0.0).to(tl.float32) -> "
        "tl.load(weight + column, mask=inside, other=0.0)": _PROMOTED,
        "_forward_kernel: tl.load(residual + row * residual_stride + column, mask=inside, other=0.0).to(tl.float32) -> "
        "tl.load(residual + row * residual_stride + column, mask=inside, other=0.0)": _PROMOTED,
    },
    "rotary": {
        "_rotary_kernel: tl.load(given, mask=inside, other=0.0).to(tl.float32) -> "
        "tl.load(given, mask=inside, other=0.0)": _PROMOTED,
        "_rotary_kernel: tl.load(given + HALF, mask=inside, other=0.0).to(tl.float32) -> "
        "tl.load(given + HALF, mask=inside, other=0.0)": _PROMOTED,
        "_rotary_kernel: if KEY_HEADS > 0: -> if True:": _QUICKER,
        "_rotary_kernel: KEY_HEADS > 0 -> KEY_HEADS >= 0": _QUICKER,
        "_rotary_kernel: if VALUE_HEADS > 0: -> if True:": _QUICKER,
        "_rotary_kernel: VALUE_HEADS > 0 -> VALUE_HEADS >= 0": _QUICKER,
        "_rotary_kernel: tl.load(cos + angle, mask=rotated, other=1.0) -> tl.load(cos + angle, mask=rotated, other=0)": _HIDDEN,
    },
    "row_log_prob": {
        "_move_kernel: x.to(tl.float32) -> x": _PROMOTED,
        "_row_kernel: d > 0 -> d >= 0": "where the difference is 0, both choices are the same sum",
        "_row_kernel: if ENTROPY: -> if True: (number 2)": _QUICKER,
        "_row_kernel: tl.load(logits + column, mask=column < COLUMNS, other=nothing) -> "
        "tl.load(logits + column, mask=column < COLUMNS, other=0)": _HIDDEN,
    },
    "swiglu": {
        "_codes_kernel: tl.load(gate_up + row * row_stride + WIDTH + column, mask=inside, other=0.0).to(tl.float32) -> "
        "tl.load(gate_up + row * row_stride + WIDTH + column, mask=inside, other=0.0)": _PROMOTED,
        "_codes_kernel: tl.load(gate_up + row * row_stride + column, mask=inside, other=0.0) -> "
        "tl.load(gate_up + row * row_stride + column)": (
            "behind the gate stands the same row's up: it meets an up of 0, and where it is not finite, the row is NaN anyway"
        ),
        "_columns_kernel: tl.load(at + WIDTH, mask=inside, other=0.0).to(tl.float32) -> "
        "tl.load(at + WIDTH, mask=inside, other=0.0)": _PROMOTED,
        "_columns_kernel: (gate * tl.sigmoid(gate) * up).to(gate_up.dtype.element_ty).to(tl.float32) -> "
        "(gate * tl.sigmoid(gate) * up).to(gate_up.dtype.element_ty)": _PROMOTED,
        "_columns_kernel: tl.load(scale + row, mask=row < tokens, other=1.0) -> "
        "tl.load(scale + row, mask=row < tokens, other=0)": _NO_ROWS,
        "_backward_kernel: tl.load(gate_up + row * row_stride + WIDTH + column, mask=inside).to(tl.float32) -> "
        "tl.load(gate_up + row * row_stride + WIDTH + column, mask=inside)": _PROMOTED,
        "_backward_kernel: tl.load(grad + row * grad_stride + column, mask=inside).to(tl.float32) -> "
        "tl.load(grad + row * grad_stride + column, mask=inside)": _PROMOTED,
        "_forward_kernel: tl.load(gate_up + row * row_stride + WIDTH + column, mask=inside).to(tl.float32) -> "
        "tl.load(gate_up + row * row_stride + WIDTH + column, mask=inside)": _PROMOTED,
    },
}
