"""Rows chosen by score, margin, source and prompt, written as they are; on the form of ultrafeedback_binarized."""

import json
import random

import pytest

from engine.data.records import read_pair
from engine.data.sources import RECORD_SUFFIXES, find_sources
from recipes import select


def row(number: int, chosen: float | None, rejected: float = 2.0, source: str = "a", prompt: str | None = None) -> dict:
    """A row in the form of HuggingFaceH4/ultrafeedback_binarized, with a source."""
    asked = prompt or f"Question {number}?"
    said = [{"role": "user", "content": asked}, {"role": "assistant", "content": f"Good {number}."}]
    worse = [said[0], {"role": "assistant", "content": f"Bad {number}."}]
    scores = {"score_chosen": chosen, "score_rejected": rejected}
    return {
        "prompt": asked,
        "prompt_id": f"{number:064x}",
        "chosen": said,
        "rejected": worse,
        "messages": said,
        **scores,
        "source": source,
    }


def write(path, rows) -> str:
    path.write_text("".join(json.dumps(record) + "\n" for record in rows), encoding="utf-8")
    return str(path)


def read(path) -> list[dict]:
    [source] = find_sources([str(path)], RECORD_SUFFIXES)
    return [record.value for record in source.records("line")]


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz", ".parquet"])
def test_the_rule_of_the_card_keeps_the_rows_of_at_least_9_as_they_were(tmp_path, suffix):
    if suffix == ".parquet":
        pytest.importorskip("pyarrow")
    draw = random.Random(1)
    rows = [row(number, draw.choice([5.0, 8.5, 9.0, 9.5, 10.0])) for number in range(200)]
    out = tmp_path / f"best{suffix}"
    select.main([write(tmp_path / "a.jsonl", rows), "--where", "score_chosen >= 9", "--out", str(out)])
    assert read(out) == [record for record in rows if record["score_chosen"] >= 9]
    assert read_pair(read(out)[0]).chosen.startswith("Good")


def test_margin_top_of_each_source_and_repeated_prompts(tmp_path, capsys):
    rows = [
        row(0, 9.0, 8.9),
        row(1, 7.0, source="b"),
        row(2, 8.0, source="b"),
        row(3, 8.0, source="b"),
        row(4, 6.0),
        row(5, 9.0, prompt="Question 4?"),
        row(6, None),
    ]
    out = tmp_path / "out.jsonl"
    select.main([write(tmp_path / "a.jsonl", rows), "--least-margin", "0.5", "--top", "2", "--out", str(out)])
    assert [record["prompt_id"] for record in read(out)] == [rows[number]["prompt_id"] for number in (2, 3, 5)]
    said = capsys.readouterr().out
    for reason in ("margin below 0.5", "below the best 2 of its source", "repeated prompt", "no number in 'score_chosen'"):
        assert f"left out 1: {reason}" in said
    assert "a.jsonl:7" in said


def test_near_duplicates_of_an_earlier_row_are_left_out(tmp_path):
    pytest.importorskip("datasketch")
    text = "Please write a short story about a lonely fisherman who finds a strange bottle on the beach one cold morning."
    rows = [row(0, 9.0, prompt=text), row(1, 9.5, prompt=text.replace("cold", "warm")), row(2, 9.0)]
    for record in rows[:2]:
        record["chosen"][1]["content"] = record["messages"][1]["content"] = text[::-1]
    out = tmp_path / "out.jsonl"
    select.main([write(tmp_path / "a.jsonl", rows), "--near-duplicates", "--out", str(out)])
    assert [record["prompt_id"] for record in read(out)] == [rows[0]["prompt_id"], rows[2]["prompt_id"]]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--where", "score_chosen => 9"], "as in 'score_chosen >= 9'"),
        (["--where", "score_chosen >= 11"], "no row is left of 1: 1 not score_chosen >= 11 (first"),
        (["--top", "0"], "must be at least 1"),
    ],
)
def test_faults_of_the_user_are_named_and_nothing_is_written(tmp_path, capsys, options, said):
    with pytest.raises(SystemExit) as ended:
        select.main([write(tmp_path / "a.jsonl", [row(0, 9.0)]), *options, "--out", str(tmp_path / "out.jsonl")])
    assert said in str(ended.value) + " ".join(capsys.readouterr().err.replace("│", " ").split())
    assert [path.name for path in tmp_path.iterdir()] == ["a.jsonl"]
