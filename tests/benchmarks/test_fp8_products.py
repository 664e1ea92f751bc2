"""FP8 products: every shape, product, scaling and way of adding is measured."""

import json

import pytest

from benchmarks import fp8_products
from benchmarks.fp8_products import Fp8ProductSettings


@pytest.mark.slow
def test_each_product_of_each_weight_is_measured_in_five_ways(tmp_path, capsys):
    out = tmp_path / "products.json"
    fp8_products.main(["--preset", "tiny", "--tokens", "16", "--repeats", "1", "--device", "cpu", "--out", str(out)])
    result = json.loads(out.read_text())
    assert result["complete"]
    rows = result["rows"]
    ways = {row["way"] for row in rows}
    assert ways == {"bf16", "tensorwise", "tensorwise, fast", "rowwise", "rowwise, fast"}
    assert len(rows) == 4 * 3 * len(ways)
    shapes = {(row["weight"], row["product"]): row["shape"] for row in rows}
    assert shapes["gate up", "output"] == "16 x 384 x 64"
    assert shapes["down", "input gradient"] == "16 x 192 x 64"
    assert shapes["qkv", "weight gradient"] == "128 x 64 x 16"
    assert all(row["tflops"]["median"] > 0 for row in rows)
    assert "rowwise, fast" in capsys.readouterr().out


def test_the_card_measures_shisa_7bs_shapes_by_default():
    assert (Fp8ProductSettings().preset, Fp8ProductSettings().tokens) == ("shisa-7b", 16384)
