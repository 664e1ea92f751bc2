"""The launches that offline compilation builds: every kernel in the forms that training uses, with Shisa 7B's shapes.

A launch is a function of (dtype, tokens) that calls an operator on tensors without data. QUICK has one launch for each kernel,
in the form with the most code; ALL adds the other forms.
"""

from collections.abc import Callable
from unittest.mock import patch

import torch
import triton

from kernels import TILE, adamw, embedding, fp8, gradient_norm, rms_norm, rotary, row_log_prob, swiglu
from kernels.attention import backward as attention_backward
from kernels.attention import decode as attention_decode
from kernels.attention import decode_rows as attention_decode_rows
from kernels.attention import forward as attention_forward
from kernels.configurations import TABLES, Configuration
from model.config import preset

CONFIG = preset("shisa-7b")
WIDTH, INNER = CONFIG.hidden_size, CONFIG.intermediate_size
HEADS, KV_HEADS, SIZE = CONFIG.num_attention_heads, CONFIG.num_key_value_heads, CONFIG.head_dim
PARTS = (HEADS, KV_HEADS, KV_HEADS)
VOCAB = {"vocab_size": CONFIG.unpadded_vocab_size}
EPS = 1e-5


Launch = Callable[[torch.dtype, int], None]


def empty(*shape, dtype):
    """A tensor without data."""
    return torch.empty(shape, dtype=dtype, device="meta")


def floats(*shape):
    return empty(*shape, dtype=torch.float32)


def adamw_update(parameter, gradient, moments) -> Launch:
    def launch(_, elements):
        remainder = empty(elements, dtype=torch.int16) if parameter == torch.bfloat16 else None
        tensors = [empty(elements, dtype=dtype) for dtype in (gradient, moments, moments)]
        numbers = (1e-4, 0.9, 0.95, 1e-8, 0.1, 1, 0, 0, 0)
        adamw._adamw._init_fn(empty(elements, dtype=parameter), remainder, *tensors, floats(), *numbers)

    return launch


def packed(dtype, tokens):
    """Query, key and value, views of one packed row."""
    return empty(tokens, sum(PARTS), SIZE, dtype=dtype).split(PARTS, dim=1)


def work(tokens):
    """The arguments that describe an attention's work lists, without data; the window grows with the row."""
    tiles = triton.cdiv(tokens, TILE)
    return empty(4 * tiles, 4, dtype=torch.int32), tiles, tiles, 1 + tokens // 2, TILE


def attention(dtype, tokens):
    attention_forward.attention_forward(*packed(dtype, tokens), *work(tokens))


def attention_by_warpgroups(dtype, tokens):
    entry = Configuration(rows=64, block=128, stages=2, warpgroups=True)
    with patch.dict(TABLES[90], attention_forward=entry):
        attention(dtype, tokens)


def attention_gradients(*, passes) -> Launch:
    def launch(dtype, tokens):
        grad, out = (empty(tokens, HEADS, SIZE, dtype=dtype) for _ in range(2))
        with patch.object(attention_backward, "in_one_pass", return_value=passes == 1):
            attention_backward.attention_backward(grad, *packed(dtype, tokens), out, floats(HEADS, tokens), *work(tokens))

    return launch


def decode(tokens) -> Launch:
    def launch(dtype, seen):
        ring = empty(2, CONFIG.sliding_window, KV_HEADS, SIZE, dtype=dtype)
        attention_decode._decode._init_fn(*packed(dtype, tokens), *ring, seen, CONFIG.sliding_window)

    return launch


def decode_rows(dtype, rows):
    rows = min(rows, 2**20)  # no memory holds a cache of more
    query, count = empty(rows, HEADS, SIZE, dtype=dtype), empty(rows, dtype=torch.int32)
    cache = empty(2, rows, CONFIG.sliding_window, KV_HEADS, SIZE, dtype=dtype)
    attention_decode_rows._decode_rows._init_fn(query, *cache, count, CONFIG.sliding_window)


def plain_embedding(dtype, tokens):
    ids, weight = empty(tokens, dtype=torch.int64), empty(CONFIG.vocab_size, WIDTH, dtype=dtype)
    embedding._embedding._init_fn(ids, weight, None, None, None, 0, 0)


def noisy_embedding(dtype, tokens):
    ids, weight = empty(tokens, dtype=torch.int64), empty(CONFIG.vocab_size, WIDTH, dtype=dtype)
    # Keys change at every step; the kernel is compiled for none of them.
    embedding._embedding._init_fn(ids, weight, floats(tokens), ids, ids, 2 * tokens, tokens + 2**31)


def embedding_gradient(dtype, tokens):
    grad = empty(tokens, WIDTH, dtype=dtype)
    embedding._embedding_backward._init_fn(grad, empty(tokens, dtype=torch.int64), CONFIG.vocab_size)


def norm_of_gradients(dtype, elements):
    gradient_norm._norm._init_fn([empty(elements, dtype=dtype), empty(elements, dtype=dtype)])


def norm(dtype, tokens):
    rms_norm._norm._init_fn(empty(tokens, WIDTH, dtype=dtype), empty(WIDTH, dtype=dtype), EPS)


def norm_of_sum(dtype, tokens):
    hidden = empty(tokens, WIDTH, dtype=dtype)
    rms_norm._add_norm._init_fn(hidden, hidden, empty(WIDTH, dtype=dtype), EPS)


def norm_gradients(*, added) -> Launch:
    def launch(dtype, tokens):
        hidden, weight = empty(tokens, WIDTH, dtype=dtype), empty(WIDTH, dtype=dtype)
        rms_norm._norm_backward._init_fn(hidden, hidden if added else None, hidden, weight, floats(tokens))

    return launch


def table(tokens):
    return floats(tokens, SIZE // 2), floats(tokens, SIZE // 2)


def rotation(dtype, tokens):
    rotary._rotate_._init_fn(empty(tokens, sum(PARTS), SIZE, dtype=dtype), *table(tokens), HEADS + KV_HEADS)


def rotation_back(*, in_one_tensor) -> Launch:
    def launch(dtype, tokens):
        apart = [empty(tokens, heads, SIZE, dtype=dtype) for heads in PARTS]
        rotary._rotate_back._init_fn(*(packed(dtype, tokens) if in_one_tensor else apart), *table(tokens))

    return launch


def logits_and_rows(tokens):
    """(float32 logits, targets, rows) of the head."""
    return floats(tokens, CONFIG.vocab_size), empty(tokens, dtype=torch.int64), empty(tokens, dtype=torch.int32)


def statistics(*, entropy=False, gradient=False, scaled=False) -> Launch:
    def launch(dtype, tokens):
        log_prob, log_sum_exp = floats(tokens), floats(tokens)
        row_log_prob.row_statistics(
            *logits_and_rows(tokens),
            log_prob,
            log_sum_exp,
            **VOCAB,
            entropy_T=log_prob if entropy else None,
            gradient_NV=empty(tokens, CONFIG.vocab_size, dtype=dtype) if gradient else None,
            scale_T=log_prob if scaled else None,
        )

    return launch


def gradients_alone(dtype, tokens):
    gradient = empty(tokens, CONFIG.vocab_size, dtype=dtype)
    row_log_prob.row_gradients(*logits_and_rows(tokens), floats(tokens), gradient, floats(tokens), **VOCAB)


def moved_rows(*, scaled) -> Launch:
    def launch(dtype, tokens):
        rows, hidden = empty(tokens, dtype=torch.int32), empty(tokens, WIDTH, dtype=dtype)
        scale = floats(tokens) if scaled else None
        row_log_prob.gather_rows(hidden, rows, scale)
        row_log_prob.scatter_rows(hidden, rows, tokens, scale)

    return launch


def scaled_in_place(dtype, tokens):
    row_log_prob.scale_in_place._init_fn(empty(tokens, WIDTH, dtype=dtype), floats())


def product(dtype, tokens):
    swiglu._swiglu._init_fn(empty(tokens, 2 * INNER, dtype=dtype))


def product_gradients(*, in_place, emit=False) -> Launch:
    def launch(dtype, tokens):
        gate_up, grad = empty(tokens, 2 * INNER, dtype=dtype), empty(tokens, INNER, dtype=dtype)
        if in_place:
            swiglu._swiglu_backward_._init_fn(gate_up, grad, emit)
        else:
            swiglu._swiglu_backward._init_fn(gate_up, grad)

    return launch


def codes(*shape):
    return empty(*shape, dtype=fp8.E4M3)


def row_codes(dtype, tokens):
    fp8._row_codes._init_fn(empty(tokens, sum(PARTS) * SIZE, dtype=dtype))


def rotation_back_codes(dtype, tokens):
    apart = [empty(tokens, heads, SIZE, dtype=dtype) for heads in PARTS]
    rotary._rotate_back_codes._init_fn(*apart, *table(tokens))


def norm_gradient_codes(dtype, tokens):
    hidden, weight = empty(tokens, WIDTH, dtype=dtype), empty(WIDTH, dtype=dtype)
    rms_norm._norm_backward_codes._init_fn(hidden, hidden, hidden, weight, floats(tokens))


def column_codes(dtype, tokens):
    fp8._column_codes._init_fn(empty(tokens, WIDTH, dtype=dtype), floats(tokens))


def matrix_codes(*, rows=True, columns=True) -> Launch:
    def launch(dtype, tokens):
        fp8._matrix_codes._init_fn(empty(tokens, WIDTH, dtype=dtype), floats(), rows, columns)

    return launch


def shifted_columns(_, tokens):
    fp8._shifted_columns._init_fn(codes(tokens, 2 * INNER), floats(tokens), floats(tokens))


def norm_codes(*, added) -> Launch:
    def launch(dtype, tokens):
        hidden, weight = empty(tokens, WIDTH, dtype=dtype), empty(WIDTH, dtype=dtype)
        if added:
            rms_norm._add_norm_codes._init_fn(hidden, hidden, weight, EPS)
        else:
            rms_norm._norm_codes._init_fn(hidden, weight, EPS)

    return launch


def norm_columns(dtype, tokens):
    hidden, weight = empty(tokens, WIDTH, dtype=dtype), empty(WIDTH, dtype=dtype)
    rms_norm._norm_columns._init_fn(hidden, weight, floats(tokens), floats(tokens))


def product_codes(dtype, tokens):
    swiglu._swiglu_codes._init_fn(empty(tokens, 2 * INNER, dtype=dtype))


def product_columns(dtype, tokens):
    swiglu._swiglu_columns._init_fn(empty(tokens, 2 * INNER, dtype=dtype), floats(tokens))


def product_gradient_codes(dtype, tokens):
    swiglu._swiglu_backward_codes._init_fn(empty(tokens, 2 * INNER, dtype=dtype), empty(tokens, INNER, dtype=dtype))


BF16, FP32 = torch.bfloat16, torch.float32
# Triton has E4M3 from sm_89 on.
FP8_QUICK: dict[str, Launch] = {
    "fp8, rows": row_codes,
    "fp8, columns": column_codes,
    "fp8, weight": matrix_codes(),
    "fp8, shifted columns": shifted_columns,
    "fp8, norm of a sum": norm_codes(added=True),
    "fp8, norm of a sum, gradients": norm_gradient_codes,
    "fp8, columns of a norm": norm_columns,
    "fp8, rotation back": rotation_back_codes,
    "fp8, swiglu": product_codes,
    "fp8, columns of swiglu": product_columns,
    "fp8, swiglu, gradients": product_gradient_codes,
}
QUICK: dict[str, Launch] = {
    "adamw": adamw_update(BF16, BF16, BF16),
    "attention": attention,
    "attention, gradients in two passes": attention_gradients(passes=2),
    "attention, one new token": decode(1),
    "attention, a new token of each row": decode_rows,
    "embedding with noise": noisy_embedding,
    "embedding, gradient": embedding_gradient,
    "gradient norm": norm_of_gradients,
    "norm of a sum": norm_of_sum,
    "norm of a sum, gradients": norm_gradients(added=True),
    "rotation back": rotation_back(in_one_tensor=False),
    "head, all statistics and gradients": statistics(entropy=True, gradient=True, scaled=True),
    "head, moved rows": moved_rows(scaled=True),
    "head, scaled in place": scaled_in_place,
    "swiglu": product,
    "swiglu, gradients in place": product_gradients(in_place=True, emit=True),
}
QUICK |= FP8_QUICK
FP8: dict[str, Launch] = FP8_QUICK | {
    "fp8, weight, rows": matrix_codes(columns=False),
    "fp8, weight, columns": matrix_codes(rows=False),
    "fp8, norm": norm_codes(added=False),
}
ALL: dict[str, Launch] = (
    QUICK
    | FP8
    | {
        "adamw, float32 moments": adamw_update(BF16, BF16, FP32),
        "adamw, float32 gradients": adamw_update(BF16, FP32, FP32),
        "adamw, all float32": adamw_update(FP32, FP32, FP32),
        "attention, gradients in one pass": attention_gradients(passes=1),
        "attention by warpgroups": attention_by_warpgroups,
        "attention, a few new tokens": decode(20),
        "embedding without noise": plain_embedding,
        "norm": norm,
        "norm, gradients": norm_gradients(added=False),
        "rotation": rotation,
        "rotation back, packed": rotation_back(in_one_tensor=True),
        "head, statistics": statistics(entropy=True),
        "head, log-probs alone": statistics(),
        "head, with gradients": statistics(gradient=True),
        "head, with scaled gradients": statistics(gradient=True, scaled=True),
        "head, gradients alone": gradients_alone,
        "head, moved rows unscaled": moved_rows(scaled=False),
        "swiglu, gradients": product_gradients(in_place=False),
        "swiglu, gradients in place alone": product_gradients(in_place=True),
    }
)
