"""Pairs from an endpoint, a file and a folder."""

import gzip
import json
import re

import pytest

from engine.data.records import read_pair
from engine.inference import endpoint
from recipes import pairs
from tests.engine.inference.servers import FakeServer

pytest.importorskip("openai", reason="openai comes with the extra eval")
pytest.importorskip("rapidfuzz", reason="rapidfuzz comes with the extra eval")

GOOD = "The number {} follows, as counting goes on by one each time."


@pytest.fixture(autouse=True)
def _short_waits(monkeypatch):
    monkeypatch.setattr(endpoint, "FIRST_WAIT", 0.01)


def write(path, records) -> None:
    path.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records), encoding="utf-8")


def read(path) -> list[dict]:
    data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    return [json.loads(line) for line in data.splitlines()]


def number(body: dict) -> int:
    return int(body["messages"][-1]["content"].split()[-1].rstrip("?"))


def call(tmp_path, *options: str, out: str = "pairs.jsonl") -> None:
    pairs.main(["--paths", f"{tmp_path}/prompts.jsonl", "--out", f"{tmp_path}/{out}", *options])


def sides(server, *names: str) -> list[str]:
    return [word for name in names for word in (f"--{name}.url", server.url, f"--{name}.model", name, f"--{name}.timeout", "5")]


def test_chosen_and_rejected_from_endpoints_become_pairs_that_training_reads(tmp_path, capsys):
    write(tmp_path / "prompts.jsonl", [{"prompt": f"What comes after {i}?"} for i in range(30)])

    def answer(body):
        i = number(body)
        if body["model"] == "chosen":
            return {3: "", 4: "Weiß nicht, das ist nicht so einfach und die Frage ist schwer.", 5: GOOD.format(6) * 40}.get(
                i, GOOD.format(i + 1)
            )
        return {6: GOOD.format(7), 7: GOOD.format(8).replace("each", "every")}.get(i, f"I do not know what follows after {i}.")

    with FakeServer(answer=answer) as server:
        call(tmp_path, *sides(server, "chosen", "rejected"), "--chosen.system", "Answer in a sentence.")
    rows, dropped = read(tmp_path / "pairs.jsonl"), read(tmp_path / "pairs.dropped.jsonl.gz")
    assert len(rows) == 25
    for row in rows:
        pair = read_pair(row)
        i = int(pair.prompt[-1]["content"].split()[-1].rstrip("?"))
        assert (pair.chosen, pair.rejected) == (GOOD.format(i + 1), f"I do not know what follows after {i}.")
        assert row["made"]["chosen"] == "chosen"
    assert {row["place"].rpartition(":")[2]: row["reasons"][0].partition(":")[0] for row in dropped} == {
        "4": "empty answer",
        "5": "wrong language",
        "6": "outlier in length",
        "7": "equal answers",
        "8": "nearly equal answers",
    }
    # A system message steers one model and is not part of the pair.
    systems = {body["model"]: body["messages"][0]["content"] for body, *_ in server.log if len(body["messages"]) == 2}
    assert systems == {"chosen": "Answer in a sentence."}
    said = capsys.readouterr().out
    assert "25 pairs of 30 prompts" in said
    assert "dropped 1: outlier in length; first:" in said
    assert "the longer one in 100% of the pairs" in said


def test_the_files_answers_are_chosen_and_a_folders_own_are_rejected(tmp_path, tiny_model, capsys):
    records = [
        {"prompt": f"the cat sees {word}", "completion": "the red dog and it runs"} for word in ("a", "it", "dog", "cat")
    ]
    write(tmp_path / "prompts.jsonl", [*records, {"prompt": "no answer here"}])
    options = ("--rejected.model", str(tiny_model), "--rejected.max-tokens", "8", "--rejected.device", "cpu")
    call(tmp_path, *options, "--cut", "keep")
    said = capsys.readouterr().out
    assert "skipped 1: no chosen answer in the record" in said
    rows = read(tmp_path / "pairs.jsonl") + [row["pair"] for row in read(tmp_path / "pairs.dropped.jsonl.gz")]
    assert len(rows) == 4
    for row in rows:
        assert row["chosen"] == "the red dog and it runs"
        assert row["made"]["rejected"] == str(tiny_model)
    before = (tmp_path / "pairs.jsonl").read_bytes()
    call(tmp_path, *options, "--cut", "keep")
    assert (tmp_path / "pairs.jsonl").read_bytes() == before
    assert "0 new answers" in capsys.readouterr().out


def test_cut_answers_are_dropped_or_kept_as_told(tmp_path):
    write(tmp_path / "prompts.jsonl", [{"prompt": f"the cat {i}", "completion": "the red dog and it runs"} for i in range(3)])
    with FakeServer() as server:
        options = (*sides(server, "rejected"), "--rejected.max-tokens", "5", "--rejected.temperature", "0")
        with pytest.raises(SystemExit, match=r"no pair is left; the dropped file"):
            call(tmp_path, *options)
        assert [row["reasons"] for row in read(tmp_path / "pairs.dropped.jsonl.gz")] == [["cut off (rejected)"]] * 3
        call(tmp_path, *options, "--cut", "keep", "--overwrite")
    assert len(read(tmp_path / "pairs.jsonl")) == 3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ((), r"give chosen\.model, rejected\.model or both"),
        (("--rejected.url", "http://127.0.0.1:1/v1"), r"rejected\.url needs rejected\.model"),
        (("--rejected.model", "m", "--most-similar", "2"), r"most_similar = 2\.0"),
        (("--rejected.model", "nowhere"), r"nowhere"),
    ],
)
def test_wrong_settings_are_named(tmp_path, options, message, capsys):
    write(tmp_path / "prompts.jsonl", [{"prompt": "a", "completion": "b"}])
    with pytest.raises(SystemExit) as ended:
        call(tmp_path, *options)
    said = str(ended.value) + " ".join(capsys.readouterr().err.split())
    assert re.search(message, said)
