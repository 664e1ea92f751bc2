"""Mutants that no test can find out, as they compute the same: module -> {name of the mutant: reason}."""

_PROMOTED = "the other operand is float32 already and promotes it"
_STORED = "the store converts to the type of the result"
_FAST_PATH = "the way without a mask is only quicker: with the mask, whole blocks give the same"

EQUIVALENT: dict[str, dict[str, str]] = {
    "gradient_norm": {
        "_sum_squares_kernel: if (block + 1) * BLOCK <= elements: -> if False:": _FAST_PATH,
        "_sum_squares_kernel: (block + 1) * BLOCK <= elements -> (block + 1) * BLOCK < elements": _FAST_PATH,
        "_total_kernel: tl.sqrt(tl.sum(total, axis=0)).to(tl.float32) -> tl.sqrt(tl.sum(total, axis=0))": _STORED,
    },
    "rms_norm": {
        "_forward_kernel: tl.load(residual + row * residual_stride + column, mask=inside, other=0.0).to(tl.float32) -> "
        "tl.load(residual + row * residual_stride + column, mask=inside, other=0.0)": _PROMOTED,
    },
    "swiglu": {
        "_backward_kernel: tl.load(gate_up + row * row_stride + WIDTH + column, mask=inside).to(tl.float32) -> "
        "tl.load(gate_up + row * row_stride + WIDTH + column, mask=inside)": _PROMOTED,
    },
}
