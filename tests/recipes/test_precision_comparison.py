"""Held-out losses in three precisions: real runs of two steps, the differences, and the drawing."""

import json

import pytest
import torch

from engine.settings.toml import read_table, to_toml
from recipes.precision_comparison import PRECISIONS, draw, lines_of, main, rows_of

LOSSES = {"base": {"float32": [2.0, 4.0], "bfloat16": [2.002, 4.0], "fp8": [2.01, 3.984]}}


@pytest.fixture
def config(tiny_settings, tmp_path):
    """Writes a configuration with the changes; returns its path."""

    def write(**changes):
        path = tmp_path / "base.toml"
        path.write_text(to_toml(tiny_settings("pretrain", tmp_path / "unused", steps=2, **changes)))
        return str(path)

    return write


@pytest.mark.slow
def test_runs_in_every_precision_start_alike_and_are_compared(config, tmp_path, capsys):
    main([config(), "--fp8.bf16-first", "0", "--out", str(tmp_path / "out"), "--seeds", "3"])
    result = json.loads((tmp_path / "out" / "comparison.json").read_text())
    losses = {row["precision"]: row["losses"] for row in result["rows"]}
    assert result["complete"]
    assert result["settings"]["seeds"] == [3]
    assert result["settings"]["configurations"]["base"]["steps"] == 2
    assert result["command"].startswith("python -m recipes.precision_comparison ")
    assert result["machine"]["torch"] == torch.__version__
    assert list(losses) == list(PRECISIONS)
    assert len({tuple(values) for values in losses.values()}) >= 3
    for values in losses.values():
        assert values == pytest.approx(losses["float32"], rel=0.01)
    for precision, dtype, products in (("bfloat16", "bfloat16", "dtype"), ("fp8", "bfloat16", "fp8")):
        text = (tmp_path / "out" / f"base-{precision}-3" / "config.toml").read_text()
        assert f'dtype = "{dtype}"' in text
        assert f'precision = "{products}"' in text
    peak = {name: read_table(tmp_path / "out" / f"base-{name}-3" / "config.toml")["schedule"]["peak"] for name in PRECISIONS}
    assert peak == {name: pytest.approx((1.01 if name == "faster" else 1.0) * peak["float32"]) for name in PRECISIONS}
    assert (tmp_path / "out" / "comparison.svg").is_file()
    assert "fp8" in capsys.readouterr().out


def test_differences_are_relative_to_float32_with_the_same_seed():
    exact, bfloat16, fp8 = rows_of(LOSSES)
    assert "difference" not in exact
    assert bfloat16["differences"] == pytest.approx([0.001, 0.0])
    assert fp8["differences"] == pytest.approx([0.005, -0.004])
    assert fp8["loss"] == pytest.approx(2.997)
    assert fp8["difference"] == pytest.approx(0.0005)
    assert fp8["largest"] == pytest.approx(0.005)
    assert lines_of([fp8])[-1].split() == ["base", "fp8", "2.9970", "+0.050%", "+0.500%"]


def test_a_comparison_that_was_cut_off_has_rows_for_the_precisions_that_ran():
    rows = rows_of({"base": {"float32": [2.0, 4.0], "bfloat16": [2.002], "fp8": []}})
    assert [row["precision"] for row in rows] == ["float32", "bfloat16"]
    assert rows[1]["differences"] == pytest.approx([0.001])


def test_the_drawing_has_a_point_for_each_run_and_the_target(tmp_path):
    pytest.importorskip("matplotlib")
    draw(rows_of(LOSSES), tmp_path / "comparison.svg")
    text = (tmp_path / "comparison.svg").read_text()
    assert "held-out loss, difference to float32, %" in text
    assert "fp8" in text


def test_a_run_without_a_held_out_set_is_refused(config, tmp_path):
    with pytest.raises(SystemExit, match="heldout is empty: name prepared folders to compare losses on"):
        main([config(heldout=[]), "--out", str(tmp_path / "out"), "--seeds", "0"])
