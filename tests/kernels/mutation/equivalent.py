"""Mutants that no test can detect, because they compute the same: module -> {name of the mutant: reason}."""

_PROMOTED = "the other operand is float32 already and promotes it"
_STORED = "the store converts to the type of the result"
_QUICKER = "the condition only saves time: without it the masks give the same"
_HIDDEN = "the value is never stored, or is replaced where it is masked"

EQUIVALENT: dict[str, dict[str, str]] = {
    "attention/backward": {
        "_key_kernel: if start >= end: -> if False:": _QUICKER,
        "_key_kernel: start >= end -> start > end": _QUICKER,
        "_query_kernel: if start >= end: -> if False:": _QUICKER,
        "_query_kernel: start >= end -> start > end": _QUICKER,
        "_query_kernel: tl.load(log_sum_exp + at, mask=inside, other=float('inf')) -> "
        "tl.load(log_sum_exp + at, mask=inside, other=0)": _HIDDEN,
    },
    "attention/decode": {
        "_split_kernel: (first_row + TILE - 1) // GROUP -> first_row + TILE - 1": _QUICKER,
    },
    "attention/tiles": {
        "sections: end - shift - window -> end - shift": _QUICKER,
    },
    "embedding": {
        "_backward_kernel: tl.load(sorted_tokens + at, mask=same, other=-1) -> "
        "tl.load(sorted_tokens + at, mask=same, other=0)": _HIDDEN,
    },
    "gradient_norm": {
        "_sum_squares_kernel: if (block + 1) * BLOCK <= elements: -> if False:": _QUICKER,
        "_sum_squares_kernel: (block + 1) * BLOCK <= elements -> (block + 1) * BLOCK < elements": _QUICKER,
        "_total_kernel: tl.sqrt(tl.sum(total, axis=0)).to(tl.float32) -> tl.sqrt(tl.sum(total, axis=0))": _STORED,
    },
    "rms_norm": {
        "_forward_kernel: tl.load(weight + column, mask=inside, other=0.0).to(tl.float32) -> "
        "tl.load(weight + column, mask=inside, other=0.0)": _PROMOTED,
        "_forward_kernel: tl.load(residual + row * residual_stride + column, mask=inside, other=0.0).to(tl.float32) -> "
        "tl.load(residual + row * residual_stride + column, mask=inside, other=0.0)": _PROMOTED,
    },
    "row_log_prob": {
        "_move_kernel: x.to(tl.float32) -> x": _PROMOTED,
        "_row_kernel: d > 0 -> d >= 0": "where the difference is 0, both choices are the same sum",
        "_row_kernel: if ENTROPY: -> if True: (number 2)": _QUICKER,
        "_row_kernel: tl.load(logits + column, mask=column < COLUMNS, other=nothing) -> "
        "tl.load(logits + column, mask=column < COLUMNS, other=0)": _HIDDEN,
    },
    "swiglu": {
        "_backward_kernel: tl.load(gate_up + row * row_stride + WIDTH + column, mask=inside).to(tl.float32) -> "
        "tl.load(gate_up + row * row_stride + WIDTH + column, mask=inside)": _PROMOTED,
        "_backward_kernel: tl.load(grad + row * grad_stride + column, mask=inside).to(tl.float32) -> "
        "tl.load(grad + row * grad_stride + column, mask=inside)": _PROMOTED,
        "_forward_kernel: tl.load(gate_up + row * row_stride + WIDTH + column, mask=inside).to(tl.float32) -> "
        "tl.load(gate_up + row * row_stride + WIDTH + column, mask=inside)": _PROMOTED,
    },
}
