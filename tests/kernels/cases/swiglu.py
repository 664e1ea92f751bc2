"""SwiGLU: what to compile offline, and mutants."""

from kernels import swiglu
from tests.kernels.cases import CONFIG, empty


def forward(dtype, tokens):
    swiglu._swiglu._init_fn(empty(tokens, 2 * CONFIG.intermediate_size, dtype=dtype))


def backward(dtype, tokens):
    packed = empty(tokens, 2 * CONFIG.intermediate_size, dtype=dtype)
    grad = empty(tokens, CONFIG.intermediate_size, dtype=dtype)
    swiglu._swiglu_backward._init_fn(packed, grad)
    swiglu._swiglu_backward_._init_fn(packed, grad, True)
    swiglu._swiglu_backward_._init_fn(packed, grad, False)


LAUNCHES = {"swiglu": forward, "swiglu backward": backward}
MUTANTS = [
    ("(program // blocks).to(tl.int64)", "program // blocks"),
    ("(program % blocks) * BLOCK", "(program % blocks) * WIDTH"),
    ("product = gate * tl.sigmoid(gate) * up", "product = tl.sigmoid(gate) * up"),
    ("product.to(out.dtype.element_ty), mask=inside", "product.to(out.dtype.element_ty), mask=column < WIDTH - 1"),
    ("(1 + gate * (1 - share))", "(1 + gate * share)"),
    ("grad_up = g * gate * share", "grad_up = g * share"),
    ("tl.load(grad + row * grad_stride", "tl.load(grad + row * row_stride"),
    ("target = grad_gate_up + row * grad_gate_up_stride", "target = grad_gate_up + row * 2 * WIDTH"),
    ("tl.store(target + WIDTH,", "tl.store(target,"),
    ("(gate * share * up).to(product", "(gate * share * grad_up).to(product"),
]
