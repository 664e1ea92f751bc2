"""The rows of the benchmark of new rows from runs whose losses are known, and the texts that it cuts."""

import gzip
import json
import math
from pathlib import Path

import pytest

from benchmarks.resize import BASE, Bench, ResizeBenchSettings, _part
from model.vocabulary.merge import merge
from model.vocabulary.tokenizer import Tokenizer, mistral_tokenizer_path

TEXTS = {"ja": "東京の先生です。", "en": "The cat sees a red dog."}


@pytest.fixture
def bench(tmp_path, monkeypatch):
    """A benchmark over two documents of each language whose runs are not trained but have cost 1 nat a token, then 0.5."""
    data = tmp_path / "data"
    data.mkdir()
    for language, text in TEXTS.items():
        for part in ("train", "heldout"):
            (data / f"{language}_{part}.txt.gz").write_bytes(gzip.compress(f"{text}\n\n{text}{text}".encode()))

    def trained(_, settings):
        lines = [
            {"step": 0, "eval/ja_heldout/loss": 1.0, "eval/en_heldout/loss": 1.0},
            {"step": 1, "tokens": 100}, {"step": 2, "tokens": 50},
            {"step": 2, "eval/ja_heldout/loss": 0.5, "eval/en_heldout/loss": 0.5},
        ]  # fmt: skip
        Path(settings.out).mkdir(parents=True)
        (Path(settings.out) / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)))

    monkeypatch.setattr(Bench, "_trained", trained)
    monkeypatch.setattr(Bench, "resized", lambda *_: tmp_path)
    base = mistral_tokenizer_path().read_bytes()
    monkeypatch.setattr(Bench, "merged", Tokenizer(merge(base, ["です", "東京"], 2).model_bytes))
    return Bench(ResizeBenchSettings(folder=str(tmp_path / "made"), data=str(data), more_steps=2, evaluate_every=2))


@pytest.mark.parametrize("name", [BASE, "weighted"])
def test_bits_are_those_of_all_tokens_over_all_characters(bench, name, tmp_path):
    rows = list(bench.rows(name, tmp_path))
    tokenizer = bench.base if name == BASE else bench.merged
    assert [(row["after"], row["steps"], row["tokens"]) for row in rows] == [("resizing", 0, 0), ("2 steps", 2, 150)]
    for language, text in TEXTS.items():
        # Each document's tokens and its end are predicted.
        predicted = sum(len(tokenizer.encode(document)) + 1 for document in (text, text + text))
        for row, nats in zip(rows, (1.0, 0.5), strict=True):
            assert row[f"bits_per_character_{language}"] == pytest.approx(nats * predicted / (3 * len(text)) / math.log(2))
    # 6 operations a weight and token in the matrices, and those of attention.
    shape = bench.settings.config
    weights = shape.parameters - (2 * 4 + 1) * 64 - 32000 * 64
    assert 6 * weights < rows[1]["tflop"] * 1e12 / 150 < 6 * weights * 1.1
    assert rows[0]["tflop"] == 0


def test_distillation_is_paid_for(bench, tmp_path):
    weighted, distilled = (next(bench.rows(name, tmp_path))["tflop"] for name in ("weighted", "distilled"))
    assert weighted == 0
    learnt = TEXTS["ja"] * 2
    merged, base = (len(tokenizer.encode(learnt)) for tokenizer in (bench.merged, bench.base))
    blocks = bench._place_flops(bench.base, head=False) / 3
    assert distilled * 1e12 == pytest.approx(merged * bench._place_flops(bench.merged) + base * blocks)


def test_texts_are_the_beginnings_of_as_many_documents_as_it_takes():
    documents = [str(digit) * 100 for digit in range(10)]
    texts = _part(documents, 250, seed=0, longest=60)
    assert [len(text) for text in texts] == [60] * 5
    assert len({text[0] for text in texts}) == 5
    assert texts == _part(documents, 250, seed=0, longest=60)
    assert _part(documents, 250, seed=1, longest=60) != texts
