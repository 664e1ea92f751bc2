"""AdamW: what to compile offline, and mutants."""

import torch

from kernels import adamw
from tests.kernels.cases import empty


def update(parameter, gradient, moments):
    """A launch for bfloat16 or float32 parameters, gradients and moments."""

    def launch(_, elements):
        remainder = empty(elements, dtype=torch.int16) if parameter == torch.bfloat16 else None
        tensors = [empty(elements, dtype=dtype) for dtype in (gradient, moments, moments)]
        numbers = (1e-4, 0.9, 0.95, 1e-8, 0.1, 1, 0, 0, 0)
        adamw._adamw._init_fn(empty(elements, dtype=parameter), remainder, *tensors, empty(dtype=torch.float32), *numbers)

    return launch


LAUNCHES = {
    "adamw": update(torch.bfloat16, torch.bfloat16, torch.float32),
    "adamw float32 gradients": update(torch.bfloat16, torch.float32, torch.float32),
    "adamw bfloat16 moments": update(torch.bfloat16, torch.bfloat16, torch.bfloat16),
    "adamw float32": update(torch.float32, torch.float32, torch.float32),
}
MUTANTS = [
    ("tl.load(gradient_scale) < 0", "tl.load(gradient_scale) < -2"),
    ("block = tl.program_id(0).to(tl.int64)", "block = tl.program_id(0)"),
    ("start = block * BLOCK - SHIFT", "start = block * BLOCK"),
    ("first_group + block * (BLOCK // 4)", "first_group + block * BLOCK"),
    ("if (start >= 0) & (start + BLOCK <= elements):", "if start + BLOCK <= elements:"),
    ("(offset >= 0) & (offset < elements)", "(offset >= 0) & (offset < elements - 1)"),
    ("_load(gradient + offset, inside) * tl.load(gradient_scale)", "_load(gradient + offset, inside)"),
    ("first += (grad - first) * first_weight", "first += grad * first_weight"),
    ("_load(exp_avg_sq + offset, inside) * second_decay", "_load(exp_avg_sq + offset, inside)"),
    ("to(tl.int32) - (low >> 15)", "to(tl.int32)"),
    ("tl.sqrt_rn(second) + eps", "tl.sqrt_rn(second + eps)"),
    ("master = master * decay - change", "master = master - change"),
    ("(bits & 0x7FFFFFFF) > 0x7F800000", "(bits & 0x7FFFFFFF) >= 0x7F800000"),
    ("rounded = tl.where(nan, 0x7FC0, (bits + 0x8000) >> 16)", "rounded = (bits + 0x8000) >> 16"),
    ("0x7FC0, (bits + 0x8000)", "0x7FC0, (bits + 0x7FFF)"),
    ("tl.interleave(tl.interleave(word0, word2), tl.interleave(word1, word3))",
     "tl.interleave(tl.interleave(word0, word1), tl.interleave(word2, word3))"),
    ("(group >> 32).to(tl.uint32)", "(group >> 31).to(tl.uint32)"),
    ("_round(second, noise >> 16)", "_round(second, noise & 0xFFFF)"),
    ("tl.where((bits & 0x7FFFFFFF) < 0x7F800000, bits + noise.to(tl.int32), bits)", "(bits + noise.to(tl.int32))"),
]  # fmt: skip
