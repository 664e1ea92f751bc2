"""The operations on models that pass through, on a small one; what compares the ends finds what a wrong one would have done."""

from dataclasses import asdict

import pytest
import torch
from safetensors.torch import load_file, save_file

from benchmarks import streaming
from benchmarks.streaming import MATRICES, StreamingSettings
from model.vocabulary.export import write_tokenizer_folder
from model.vocabulary.merge import merge
from model.vocabulary.tokenizer import mistral_tokenizer_path


@pytest.fixture(scope="module")
def passed(tmp_path_factory):
    """(folder of all, settings) after each operation."""
    root = tmp_path_factory.mktemp("streaming")
    pieces = ["です", "ます", "した", "する"]
    write_tokenizer_folder(root / "tokenizer", merge(mistral_tokenizer_path().read_bytes(), pieces, len(pieces)).model_bytes)
    settings = asdict(StreamingSettings(tokenizer=str(root / "tokenizer"), preset="tiny", layers=1))
    streaming.make(settings, str(root / "source"), "")
    rows = {
        name: getattr(streaming, name)(settings, str(root / source), str(root / target))
        for name, source, target in (
            ("copy", "source", "copied"), ("import_folder", "source", "imported"), ("resize", "imported", "resized"),
            ("export_folder", "resized", "exported"),
        )
    }  # fmt: skip
    return root, settings, rows


def test_every_weight_comes_through(passed):
    root, settings, rows = passed
    for row in rows.values():
        assert 0.005 < row["gb_read"] < 0.05
        assert row["gb_written"] >= row["gb_read"] * 0.99
    found = streaming.compare(settings, str(root / "source"), str(root / "exported"))
    assert found == {"rows": 32128, "changed_weights": 0, "changed_base_rows": 0, "equal_new_rows": 0}


@pytest.mark.parametrize(
    ("name", "row", "expected"),
    [
        ("model.layers.0.mlp.up_proj.weight", 3, "changed_weights"),
        (MATRICES[0], 31999, "changed_base_rows"),
        (MATRICES[1], 32001, "equal_new_rows"),
    ],
)
def test_what_does_not_come_through_is_counted(passed, name, row, expected):
    root, settings, _ = passed
    [file] = (root / "exported").glob("*.safetensors")
    whole = load_file(file)
    wrong = whole[name].clone()
    wrong[row] = wrong[row - 1] if expected == "equal_new_rows" else torch.ones_like(wrong[row])
    try:
        save_file(whole | {name: wrong}, file, metadata={"format": "pt"})
        found = streaming.compare(settings, str(root / "source"), str(root / "exported"))
    finally:
        save_file(whole, file, metadata={"format": "pt"})
    assert found.pop(expected) == 1
    found.pop("rows")
    assert not any(found.values())
