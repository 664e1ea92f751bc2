"""The parts of a training step beside their floors, which `benchmarks/README.md` defines."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.operators.operator import Cost
from benchmarks.results import label
from engine.data.batch import Step
from engine.estimate.flops import step_flops, training_flops
from model.config import MistralConfig


def least(
    config: MistralConfig,
    step: Step,  # whole, unpadded
    dtype: torch.dtype,  # of the parameters
    moments: int,  # bytes of a parameter's two moments in the device's memory
    fp8_layers: int = 0,  # whose operations count half
) -> dict[str, Cost]:
    """The least that the parts of a step compute and move, of all ranks together; other parts have no floor."""
    products = training_flops(config, tokens=step.tokens, rows=step.trained, pairs=0, fp8_layers=fp8_layers)
    width, inner, layers = config.hidden_size, config.intermediate_size, config.num_hidden_layers
    rotated = (config.num_attention_heads + config.num_key_value_heads) * config.head_dim
    # Elements of a token, forward and backward. Every norm but the first adds the residual: 4 and 4 of the width, the first 2
    # and 3. Rotation in place: 2 and 2. SwiGLU: 3 and 5 of the inner width. Embedding: a row is written, its gradient read.
    token = (2 * layers * 8 + 5 + 2) * width + layers * (4 * rotated + 8 * inner)
    # The embedding reads each row that occurs in a micro-batch; its gradient is dense.
    rows = sum(len(batch.tokens_T[: batch.tokens].unique()) for batch in step.batches) + config.vocab_size
    # In FP8, what goes into a product is a code of one byte: the results of norms and SwiGLU, the gradients that SwiGLU and
    # rotation write. A weight is read and its code written once.
    weights = training_flops(config, tokens=1, rows=0, pairs=0) // 6 // layers
    fp8 = (dtype.itemsize + 1) * weights - (dtype.itemsize - 1) * step.tokens * (2 * width + 3 * inner + rotated)
    # Norm and update each read the gradient; the parameter, the rest of its master and its moments are read and written.
    state = 2 * dtype.itemsize + 2 * (4 + moments)
    return {
        "products": Cost(0, products),
        "attention": Cost(0, step_flops(config, step, fp8_layers) - products),
        "our operators": Cost(dtype.itemsize * (token * step.tokens + rows * width) + fp8_layers * fp8),
        "optimizer": Cost(state * config.parameters),
    }


def parts_of(
    answers: Mapping[str, Mapping[str, Any]],  # of a worker: "ceilings", "breakdown"
    costs: Sequence[Mapping[str, Cost]],  # of each profiled step, from `least`
    ranks: int,
) -> Mapping[str, Any]:
    """{part: its share of the step, milliseconds and floor on one rank, floor / time in per cent (None without a floor)}."""
    for answer in answers.values():
        if "missing" in answer:
            return answer
    if "breakdown" not in answers:
        return {"missing": "not profiled: a peer, or not asked for"}
    rates, total, found = answers["ceilings"], sum(answers["breakdown"].values()), {}
    for name, spent in answers["breakdown"].items():
        cost = sum((step[name] for step in costs if name in step), Cost(0))
        floor = max(cost.bytes / rates["copy_bytes"], cost.operations / rates["product_flops"]) / len(costs) / ranks
        found[name] = {"share": spent / total, "ms": 1e3 * spent, "floor_ms": 1e3 * floor}
        found[name]["percent_of_limit"] = 100 * floor / spent if floor and spent else None
    return found


def draw(rows: Sequence[Mapping[str, Any]], axes: Sequence[str], device: str, file: Path) -> None:
    """Draw the parts of each row: a bar for the floor, a bar for what was measured. Without matplotlib, one line says so.

    axes: fields that differ between rows, for the titles.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        print(f"matplotlib is not installed: no {file.name} (pip install matplotlib)")
        return
    figure = Figure(figsize=(8, 3.6 * len(rows)), layout="constrained")
    for panel, row in zip(figure.subplots(len(rows), squeeze=False)[:, 0], rows, strict=True):
        for key, shift, colour in (("floor_ms", -0.2, "#a9b4bd"), ("ms", 0.2, "#0b6e99")):
            heights = [place + shift for place in range(len(row["parts"]))]
            bars = panel.barh(heights, [part[key] for part in row["parts"].values()], 0.4, color=colour)
            bars.set_label("measured, with the percentage of the limit" if key == "ms" else "floor")
        percents = [part["percent_of_limit"] for part in row["parts"].values()]
        panel.bar_label(bars, ["" if percent is None else f" {percent:.0f} %" for percent in percents])
        panel.set_yticks(range(len(row["parts"])), row["parts"])
        panel.invert_yaxis()
        panel.margins(x=0.15)
        panel.set(title=label({name: row[name] for name in ("name", *axes)}), xlabel=f"ms of a step, {device}")
        panel.legend()
    figure.savefig(file, metadata={"Date": None})
