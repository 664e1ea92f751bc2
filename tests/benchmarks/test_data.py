"""The data benchmark: packers against their definitions, rows that add up, what runs without optional packages."""

import itertools
import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks import data as benchmark
from benchmarks import lengths as of_length
from benchmarks import measure

TINY = benchmark.DataSettings(
    documents=6, context_length=512, step_size=4096, steps=3, step_seconds=(0.0,), plan_documents=(500,), rounds=2, device="cpu"
)
items = st.integers(1, 40).flatmap(
    lambda capacity: st.tuples(st.lists(st.integers(1, capacity), max_size=60), st.just(capacity))
)


def first_fit_by_definition(lengths, capacity):
    packs = []
    for item, length in enumerate(lengths):
        for pack in packs:
            if sum(lengths[i] for i in pack) + length <= capacity:
                pack.append(item)
                break
        else:
            packs.append([item])
    return packs


def next_fit_by_definition(lengths, capacity):
    packs = []
    for item, length in enumerate(lengths):
        if not packs or sum(lengths[i] for i in packs[-1]) + length > capacity:
            packs.append([])
        packs[-1].append(item)
    return packs


@settings(max_examples=60, deadline=None)
@given(items)
def test_packers_do_what_their_names_say(drawn):
    lengths, capacity = drawn
    assert of_length.first_fit(lengths, capacity) == first_fit_by_definition(lengths, capacity)
    assert of_length.sequential(lengths, capacity) == next_fit_by_definition(lengths, capacity)
    decreasing = of_length.first_fit_decreasing(lengths, capacity)
    expected = first_fit_by_definition(sorted(lengths, reverse=True), capacity)
    assert [[lengths[i] for i in pack] for pack in decreasing] == [
        [sorted(lengths, reverse=True)[i] for i in pack] for pack in expected
    ]
    for packer in of_length.PACKERS.values():
        packs = packer(lengths, capacity)
        assert sorted(itertools.chain(*packs)) == list(range(len(lengths)))
        assert all(sum(lengths[i] for i in pack) <= capacity for pack in packs)


def test_padding_counts_against_utilisation():
    # Rectangles of 2 * 3 and 2 * 4 and 1 * 1 hold 1 + 3 + 4 + 2 + 1 places.
    assert of_length.padded_utilisation([1, 3, 4, 2, 1], 2) == 11 / 15


@pytest.mark.parametrize("distribution", of_length.DISTRIBUTIONS)
def test_samples_have_the_percentiles_that_were_measured(distribution):
    drawn = of_length.sample(distribution, 20_000)
    expected = of_length._PLACES[distribution]
    assert drawn.min() >= expected[0]
    assert drawn.max() <= expected[-1]
    assert np.percentile(drawn, (10, 50, 90)) == pytest.approx([expected[4], expected[8], expected[12]], rel=0.05)


def test_documents_are_cut_as_a_plan_cuts_them():
    assert of_length.segments(np.array([3, 8, 9, 20]), 8) == [3, 8, 8, 1, 8, 8, 4]


@pytest.mark.parametrize("distribution", of_length.DISTRIBUTIONS)
def test_steps_hold_what_fits_in_them_and_nothing_is_lost_between(distribution):
    steps = list(benchmark.steps_of(distribution, TINY))
    assert len(steps) == 3
    assert all(TINY.step_size - 2 * TINY.context_length < sum(step) <= TINY.step_size for step in steps)
    if distribution != "preferences":
        drawn = of_length.segments(of_length.sample(distribution, 1000), TINY.context_length)
        assert list(itertools.chain(*steps)) == drawn[: sum(map(len, steps))]


def test_packing_rows_add_up():
    rows = list(benchmark.pack(TINY))
    assert {row["lengths"] for row in rows} == set(of_length.DISTRIBUTIONS)
    for distribution in of_length.DISTRIBUTIONS:
        some = {row["packer"]: row for row in rows if row["lengths"] == distribution}
        most = some["as few packs as places need"]["utilisation"]
        assert 0 < some["sequential"]["utilisation"] <= some["komainu, best-fit decreasing"]["utilisation"] <= most <= 1
        ours = some["komainu, best-fit decreasing"]
        steps = list(benchmark.steps_of(distribution, TINY))
        packs = sum(map(sum, steps)) / (ours["utilisation"] * ours["capacity"])
        assert packs == pytest.approx(round(packs))
        assert ours["seconds"]["samples"] == TINY.rounds
        assert ours["places_per_second"] == sum(map(sum, steps)) / ours["seconds"]["median"]


def test_tokenising_counts_what_was_prepared(tmp_path):
    rows = list(benchmark.tokenise(TINY, tmp_path))
    prepared = {row["what"]: row for row in rows if row["what"].startswith("prepare")}
    assert set(prepared) == {"prepare text", "prepare conversations", "prepare preferences"}
    for row in prepared.values():
        assert row["records"] == TINY.documents
        assert row["tokens_per_second"] > row["documents_per_second"] > 0
        assert row["seconds"]["samples"] == TINY.rounds
    encoded = [row for row in rows if row["what"] == "encode text"]
    assert [row["provider"] for row in encoded] == ["komainu", "sentencepiece, one core", "tokenizers"]
    assert not any("wrong" in row for row in encoded)
    # All of them encoded the same texts.
    assert len({round(row["tokens_per_second"] * row["seconds"]["median"]) for row in encoded}) == 1


def test_an_encoder_that_differs_is_called_wrong(tmp_path, tiny_tokenizer, monkeypatch):
    tokenizer, texts = benchmark.Tokenizer.load(tiny_tokenizer), ["the cat", "a dog"]

    def other(text):
        return [0] if text == "a dog" else benchmark.Tokenizer.encode_batch(tokenizer, [text])[0]

    monkeypatch.setattr(tokenizer, "encode", other)
    rows = {row["provider"]: row for row in benchmark.encode(tokenizer, "tiny", texts, 1, tmp_path)}
    assert rows["sentencepiece, one core"]["wrong"] == "1 of 2 texts encoded differently"
    assert "wrong" not in rows["tokenizers"]


def test_files_that_are_given_are_what_is_tokenised(tmp_path, tiny_tokenizer):
    file = tmp_path / "two.txt"
    file.write_text("the cat\n\na red dog\n")
    given_files = benchmark.DataSettings(text=(str(file),), tokenizer=str(tiny_tokenizer), rounds=1)
    rows = list(benchmark.tokenise(given_files, tmp_path))
    assert [row["what"] for row in rows] == ["prepare text"] + ["encode text"] * 3
    assert rows[0]["records"] == 2
    assert (rows[0]["source"], rows[0]["tokenizer"]) == ("given", "given")


def test_without_mistrals_tokenizer_one_is_trained(tmp_path, monkeypatch):
    def absent():
        raise ImportError("no mistral_common")

    monkeypatch.setattr(benchmark, "mistral_tokenizer_path", absent)
    tokenizer, name = benchmark.choose_tokenizer(TINY, tmp_path)
    assert name == f"synthetic, {tokenizer.vocab_size} pieces"
    for text in benchmark.synthetic_texts(5, 3):
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_loading_counts_every_token_and_waits_once_a_step(tmp_path):
    rows = list(benchmark.load(TINY, tmp_path, torch.device("cpu")))
    assert [(row["kind"], row["what"]) for row in rows] == [
        (kind, what) for kind in benchmark.KINDS for what in ("make_step", "step_stream")
    ]
    for kind, made, streamed in zip(benchmark.KINDS, rows[::2], rows[1::2], strict=True):
        assert made["steps"] == TINY.steps
        tokens = made["tokens_per_second"] * made["seconds"]["median"]
        # A step holds what begins in it; a dataset of a few pairs strays further.
        assert tokens == pytest.approx(TINY.step_size, rel=0.5 if kind == "preferences" else 0.2)
        assert streamed["wait_seconds"]["samples"] == TINY.steps - 1
        # With steps that take no time, all of it is waiting.
        assert streamed["waiting_share"] == pytest.approx(1.0)


def test_a_plan_is_measured_in_a_process_of_its_own():
    (row,) = benchmark.plan(TINY)
    assert row["documents"] == 500
    # What of the text distribution fills steps of 4,096 places.
    places = of_length.sample("text", 500).sum()
    assert row["steps"] == pytest.approx(places / TINY.step_size, abs=2)
    assert row["peak_gib"] >= row["peak_before_gib"] > 0
    assert row["seconds"]["samples"] == TINY.rounds


def test_a_plan_that_fails_is_a_row_that_says_why(monkeypatch):
    def failing(*arguments, **options):
        raise measure.PartError("cut off after 600 s: it said nothing")

    monkeypatch.setattr(measure, "call_apart", failing)
    (row,) = benchmark.plan(TINY)
    assert row == {"what": "plan", "documents": 500, "missing": "cut off after 600 s: it said nothing"}


def test_call_apart_returns_an_answer_or_says_why_not():
    assert measure.call_apart("json", "loads", {"s": "[1, 2]"}, limit=60) == [1, 2]
    with pytest.raises(measure.PartError, match=r"failed \(exit 1\): .*NotThere"):
        measure.call_apart("json", "NotThere", {}, limit=60)


def test_a_run_writes_after_each_part(monkeypatch, capsys):
    written = []
    monkeypatch.setattr(measure, "write_result", lambda path, content: written.append(json.loads(json.dumps(content))))
    chosen = benchmark.DataSettings(
        parts=("pack", "load"), context_length=512, step_size=4096, steps=2, step_seconds=(), rounds=1, device="cpu", out="file"
    )
    result = benchmark.run(chosen)
    assert [content["complete"] for content in written] == [False, False, True]
    assert [row["part"] for row in result["rows"]] == sorted((row["part"] for row in result["rows"]), reverse=True)
    assert {row["part"] for row in written[0]["rows"]} == {"pack"}
    assert "utilisation" in capsys.readouterr().out


def test_settings_in_code_need_neither_tyro_nor_mistral_common():
    program = """
import sys
for name in ("tyro", "mistral_common", "datasets"):
    sys.modules[name] = None
import benchmarks.checkpoint, benchmarks.kernels
from benchmarks.data import DataSettings, run
run(DataSettings(parts=("tokenise",), documents=3, rounds=1, device="cpu"))
"""
    said = subprocess.run([sys.executable, "-c", program], cwd=measure.ROOT, capture_output=True, text=True, check=True)
    assert "synthetic, " in said.stdout


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"steps": 0}, "steps = 0: must be at least 1"),
        ({"step_size": 100}, "step_size = 100: must be at least context_length = 4096"),
        ({"step_seconds": (-1.0,)}, "must be 0 or more each"),
        ({"plan_documents": (0,)}, "must be at least 1 each"),
    ],
)
def test_wrong_settings_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        benchmark.DataSettings(**change)
