"""The floors of a step's parts, against the costs of the operators, which are written apart."""

import dataclasses
import sys

import pytest
import torch

from benchmarks.operators import OPERATORS
from benchmarks.operators.operator import Cost, Sizes
from benchmarks.own import open_job, steps_of
from benchmarks.parts import draw, least, parts_of
from benchmarks.train import TrainBenchSettings, make_job
from engine.observe.profile import CATEGORIES

CPU = torch.device("cpu")
TOKENS = 48


@pytest.fixture
def step(tmp_path):
    """A step of one document in one micro-batch."""
    return steps_of(open_job(make_job(TrainBenchSettings(sequence=TOKENS, dtype="float32", rounds=1), CPU, tmp_path)), 1)[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_floors_are_those_of_the_operators(step, dtype):
    config = TrainBenchSettings().config
    (batch,) = step.batches
    assert batch.tokens == TOKENS
    sizes = Sizes.of(config, TOKENS)
    item, layers = dtype.itemsize, config.num_hidden_layers

    def cost(name, *directions):
        case = OPERATORS[name].case(sizes, dtype, CPU)
        if name == "embedding":
            case = dataclasses.replace(case, constants={"tokens": batch.tokens_T[:TOKENS]})
        return sum((OPERATORS[name].cost(case, direction) for direction in directions), Cost(0))

    both = ("forward", "backward")
    found = least(config, step, dtype, 8)
    blocks = layers * (2 * cost("add_rms_norm", *both).bytes + cost("swiglu", *both).bytes)
    # Queries and keys, read and written, forward and backward.
    rotated = layers * 4 * TOKENS * (sizes.heads + sizes.kv_heads) * sizes.head_dim * item
    small = 3 * (2 * layers + 1) * sizes.width * item + 2 * 8 * TOKENS  # norms' scales, ids
    ours = blocks + rotated + cost("rms_norm", *both).bytes + cost("embedding", *both).bytes - small
    assert found["our operators"].bytes == ours
    elements = sum(torch.Size(shape).numel() for shape in sizes.layer)
    state = (cost("adamw", "update").bytes + cost("gradient_norm", "forward").bytes - 4) / elements
    assert found["optimizer"].bytes == state * config.parameters
    # Backward, attention's scores are kept here and made again there: six products and seven.
    assert found["attention"].operations == layers * cost("sliding_window_attention", *both).operations * 6 / 7
    head = 3 * 2 * TOKENS * sizes.width * config.unpadded_vocab_size
    matrices = sum(torch.Size(shape).numel() for shape in sizes.layer if len(shape) == 2)
    assert found["products"].operations == layers * 3 * 2 * TOKENS * matrices + head


def test_fp8_halves_operations_and_makes_codes_of_rows_and_weights(step):
    config = TrainBenchSettings().config
    sizes = Sizes.of(config, TOKENS)
    wide, narrow = (least(config, step, torch.bfloat16, 8, layers) for layers in (0, 1))
    matrices = sum(torch.Size(shape).numel() for shape in sizes.layer if len(shape) == 2)
    assert wide["products"].operations - narrow["products"].operations == 3 * TOKENS * matrices
    assert wide["attention"] == narrow["attention"]
    # Two norms forward, SwiGLU forward and backward (gate and up), queries and keys backward: a byte less of each element.
    rows = 2 * sizes.width + 3 * sizes.feed_forward + (sizes.heads + sizes.kv_heads) * sizes.head_dim
    assert narrow["our operators"].bytes - wide["our operators"].bytes == 3 * matrices - TOKENS * rows


def test_moments_on_the_host_move_over_another_bus(step):
    config = TrainBenchSettings().config
    bytes_of = [least(config, step, torch.bfloat16, moments)["optimizer"].bytes for moments in (8, 4, 0)]
    assert [moved / config.parameters for moved in bytes_of] == [2 * 2 + 2 * (4 + moments) for moments in (8, 4, 0)]


def test_each_rank_has_its_share_and_what_nobody_must_do_has_no_floor():
    answers = {
        "ceilings": {"product_flops": 100.0, "copy_bytes": 10.0},
        "breakdown": {"products": 3.0, "optimizer": 4.0, "waiting": 1.0},
    }
    costs = [{"products": Cost(1, 300), "optimizer": Cost(40)}, {"products": Cost(1, 500), "optimizer": Cost(40)}]
    found = parts_of(answers, costs, ranks=2)
    assert found["products"] == {"share": 3 / 8, "ms": 3000, "floor_ms": 2000, "percent_of_limit": pytest.approx(200 / 3)}
    assert found["optimizer"] == {"share": 0.5, "ms": 4000, "floor_ms": 2000, "percent_of_limit": 50}
    assert found["waiting"] == {"share": 1 / 8, "ms": 1000, "floor_ms": 0, "percent_of_limit": None}
    assert "missing" in parts_of({"ceilings": answers["ceilings"]}, costs, 1)
    assert parts_of({"ceilings": {"missing": "cut off"}}, costs, 1) == {"missing": "cut off"}


def row(**fields):
    parts = {name: {"share": 0.1, "ms": 2.0, "floor_ms": 1.0, "percent_of_limit": 50.0} for name in CATEGORIES[:4]}
    parts |= {name: {"share": 0.1, "ms": 1.0, "floor_ms": 0.0, "percent_of_limit": None} for name in CATEGORIES[4:]}
    return {"name": "komainu", "parts": parts, **fields}


def test_each_row_is_drawn_with_what_differs(tmp_path):
    figure = pytest.importorskip("matplotlib.figure")
    drawn = []
    save = figure.Figure.savefig
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(figure.Figure, "savefig", lambda self, *a, **k: (drawn.append(self), save(self, *a, **k)))
        draw([row(ranks=1), row(ranks=2)], ["ranks"], "Quick CPU", tmp_path / "parts.svg")
    assert "<svg" in (tmp_path / "parts.svg").read_text()
    (whole,) = drawn
    assert [panel.get_title() for panel in whole.axes] == ["komainu, ranks 1", "komainu, ranks 2"]
    for panel in whole.axes:
        assert [bar.get_width() for bar in panel.patches] == [1.0] * 4 + [0.0] * 3 + [2.0] * 4 + [1.0] * 3
        assert [text.get_text() for text in panel.texts] == [" 50 %"] * 4 + [""] * 3


def test_without_matplotlib_one_line_says_so(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    draw([row()], [], "Quick CPU", tmp_path / "parts.svg")
    assert capsys.readouterr().out == "matplotlib is not installed: no parts.svg (pip install matplotlib)\n"
    assert not list(tmp_path.iterdir())
