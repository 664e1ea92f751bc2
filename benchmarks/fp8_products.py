"""The three FP8 products of each linear map of a layer, beside bf16, on random numbers: python -m benchmarks.fp8_products"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch

from benchmarks.command import benchmark, check_least
from benchmarks.measure import kernel_seconds, spread
from benchmarks.results import Result, table
from benchmarks.shapes import shape
from engine.environment import choose_device
from kernels.fp8 import row_codes


@dataclass(frozen=True, kw_only=True)
class Fp8ProductSettings:
    """FP8 products of one scale or a scale for each row, with exact or fast accumulation."""

    preset: str = "shisa-7b"
    tokens: int = 16384
    repeats: int = 20
    device: Literal["auto", "cpu", "cuda"] = "auto"
    out: str = ""
    """Result file; default: print only."""

    def __post_init__(self) -> None:
        check_least(self, tokens=16, repeats=1)


def run(settings: Fp8ProductSettings, command: str = "benchmarks.fp8_products.run") -> dict[str, Any]:
    device, config = choose_device(settings.device), shape(settings.preset)
    result = Result("fp8_products", command, device, settings)
    width, inner, query = config.hidden_size, config.intermediate_size, config.num_attention_heads * config.head_dim
    packed = query + 2 * config.num_key_value_heads * config.head_dim
    for name, (o, i) in {
        "qkv": (packed, width),
        "o": (width, query),
        "gate up": (2 * inner, width),
        "down": (width, inner),
    }.items():
        t = settings.tokens
        for product, (m, n, k) in {"output": (t, o, i), "input gradient": (t, i, o), "weight gradient": (o, i, t)}.items():
            left, right = (torch.randn(rows, k, device=device, dtype=torch.bfloat16) for rows in (m, n))
            calls: dict[str, Any] = {"bf16": partial(torch.mm, left, right.T)}
            (left_codes, left_scale), (right_codes, right_scale) = row_codes(left), row_codes(right)
            rowwise = {"scale_a": left_scale[:, None], "scale_b": right_scale[None]}
            for kind, scales in (("tensorwise", {name: scale.amax() for name, scale in rowwise.items()}), ("rowwise", rowwise)):
                for fast in (False, True):
                    given: dict[str, Any] = {**scales, "out_dtype": torch.bfloat16, "use_fast_accum": fast}
                    calls[kind + ", fast" * fast] = partial(torch._scaled_mm, left_codes, right_codes.T, **given)
            for way, call in calls.items():
                speed = spread(
                    [2e-12 * m * n * k / seconds for seconds in kernel_seconds(call, device, repeats=settings.repeats)]
                )
                result.add({"weight": name, "product": product, "way": way, "shape": f"{m} x {n} x {k}", "tflops": speed})
    return result.finish()


def main(argv: Sequence[str] | None = None) -> None:
    columns = ["weight", "product", "way", "shape", "tflops"]
    show = lambda settings, command: print(table(run(settings, command)["rows"], columns))  # noqa: E731
    benchmark(Fp8ProductSettings, show, "fp8_products", argv)


if __name__ == "__main__":
    main()
