"""New conversations from a server in this process that writes topics, instructions and answers."""

import gzip
import hashlib
import json
import random
import re
from collections import Counter

import pytest

from engine.data.records import read_conversation
from engine.inference import endpoint
from recipes import generate
from tests.engine.inference.servers import FakeServer

pytest.importorskip("openai", reason="openai comes with the extra eval")
pytest.importorskip("datasketch", reason="datasketch comes with the extra data")

ENGLISH_WORDS = (
    "river garden engine letter winter market bridge doctor ticket mirror candle orange pocket rabbit silver window yellow "
    "hammer island jacket kettle ladder mountain needle office pepper quarter ribbon saddle temple umbrella violin"
)
JAPANESE_WORDS = (
    "山道 川岸 庭園 手紙 冬空 市場 鉄橋 医者 切符 鏡台 蝋燭 蜜柑 兎小屋 銀貨 窓枠 黄色 金槌 離島 上着 薬缶 梯子 針箱 役所 胡椒 "
    "四半期 絹糸 神殿 雨傘 楽器 図書館 海辺 牧場"
)


@pytest.fixture(autouse=True)
def _short_waits(monkeypatch):
    monkeypatch.setattr(endpoint, "FIRST_WAIT", 0.01)


def name_of(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def instruction(seed: str, japanese: bool) -> str:
    """A text of drawn words, unlike any other."""
    drawn = random.Random(seed)
    if japanese:
        return f"{'と'.join(drawn.sample(JAPANESE_WORDS.split(), 8))}についての質問です。"
    return f"What is it about the {' and the '.join(drawn.sample(ENGLISH_WORDS.split(), 8))}?"


def writing(body: dict) -> str:
    """Topics and instructions that follow from the request, in the language asked for."""
    prompt = body["messages"][-1]["content"]
    if found := re.match(r"Name (\d+) topics", prompt):
        return "\n".join(f"{i + 1}. topic {name_of(prompt + str(i))}" for i in range(int(found[1])))
    if found := re.search(r"^Write (\d+) requests", prompt, re.MULTILINE):
        return "\n###\n".join(instruction(f"{prompt} {i}", "Japanese" in prompt) for i in range(int(found[1])))
    return (
        "これは便利なものです。いろいろな場面で使えます。"
        if "Japanese" in body["messages"][0]["content"]
        else "It is a tool of many uses."
    )


def config(tmp_path, url: str, lines: str = "") -> str:
    (tmp_path / "generate.toml").write_text(
        f'out = "{tmp_path}/new.jsonl"\nlanguages = ["ja", "en"]\n{lines or "per_topic = 3"}\n'
        '[[categories]]\nname = "cooking"\ncount = 7\nabout = "food and drink"\n[[categories]]\nname = "travel"\ncount = 4\n'
        f'[writer]\nmodel = "w"\nurl = "{url}"\ntimeout = 5\n'
    )
    return f"{tmp_path}/generate.toml"


def read(path) -> list[dict]:
    data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    return [json.loads(line) for line in data.splitlines()]


def test_every_quota_is_filled_and_no_more(tmp_path, capsys):
    with FakeServer(answer=writing) as server:
        generate.main([config(tmp_path, server.url)])
    rows = read(tmp_path / "new.jsonl")
    assert Counter((row["made"]["category"], row["made"]["language"]) for row in rows) == {
        ("cooking", "ja"): 7,
        ("cooking", "en"): 7,
        ("travel", "ja"): 4,
        ("travel", "en"): 4,
    }
    questions = [read_conversation(row)[0]["content"] for row in rows]
    assert len(set(questions)) == 22
    for row in rows:
        assert ("質問" in row["messages"][0]["content"]) == (row["made"]["language"] == "ja")
    # 3 + 2 topics a language, an instruction request for each, an answer for each.
    kinds = Counter(body["messages"][-1]["content"].split()[0] for body, *_ in server.log if len(body["messages"]) == 1)
    assert kinds == {"Name": 4, "Category:": 10}
    assert len(server.log) == 4 + 10 + 22
    assert all(
        "food and drink" in body["messages"][0]["content"] for body, *_ in server.log if "cooking" in str(body["messages"][0])
    )
    assert "22 conversations" in capsys.readouterr().out


def test_what_does_not_pass_is_dropped_and_asked_for_anew(tmp_path, capsys):
    def answer(body):
        said = writing(body)
        prompt = body["messages"][-1]["content"]
        if len(body["messages"]) == 1:
            # An instruction in the wrong language.
            first = "Leave out" not in prompt and "Japanese" in prompt and "travel" in prompt and prompt.startswith("Category")
            return said + "\n###\n" + instruction("x", japanese=False) if first else said
        bad = int(name_of(prompt), 16) % 4
        if "Japanese" in body["messages"][0]["content"]:
            return {0: "", 1: "The answer is that it is a tool of very many uses."}.get(bad, said)
        return said

    with FakeServer(answer=answer) as server:
        generate.main([config(tmp_path, server.url)])
    rows, dropped = read(tmp_path / "new.jsonl"), read(tmp_path / "new.dropped.jsonl.gz")
    assert Counter(row["made"]["language"] for row in rows) == {"ja": 11, "en": 11}
    reasons = Counter(row["reasons"][0].partition(":")[0] for row in dropped)
    assert {"empty answer", "answer leaks", "instruction in a wrong language"} <= set(reasons)
    asked = [body["messages"][0]["content"] for body, *_ in server.log]
    assert any("Leave out these topics, which are taken:\ntopic" in prompt for prompt in asked)
    assert "dropped" in capsys.readouterr().out


def test_a_writer_that_repeats_itself_ends_with_what_is_missing(tmp_path, capsys):
    def answer(body):
        prompt = body["messages"][-1]["content"]
        return "one topic" if prompt.startswith("Name") else writing(body)

    with FakeServer(answer=answer) as server:
        generate.main([config(tmp_path, server.url, "per_topic = 3\nrounds = 3")])
    said = capsys.readouterr().out
    assert len(read(tmp_path / "new.jsonl")) == 12
    assert "missing 4 of 7: cooking in Japanese" in said
    assert "missing 1 of 4: travel in English" in said


def test_near_duplicates_known_questions_and_items_of_benchmarks_are_left_out(tmp_path):
    known = instruction("known", japanese=False)
    item = "In which year did the old harbour of the northern town freeze over for the first time since records began?"
    (tmp_path / "known.jsonl").write_text(json.dumps({"prompt": known, "completion": "It is."}) + "\n")
    (tmp_path / "benchmark.jsonl").write_text(json.dumps({"question": item, "answer": "1881"}) + "\n")
    planted = [known.replace("What is it", "What was it"), f"Please answer. {item}", f"{known} "]

    def answer(body):
        prompt = body["messages"][-1]["content"]
        said = writing(body)
        return "\n###\n".join([*planted, said, said]) if prompt.startswith("Category") and "English" in prompt else said

    lines = f'per_topic = 12\nknown = ["{tmp_path}/known.jsonl"]\nbenchmarks = ["{tmp_path}/benchmark.jsonl"]'
    with FakeServer(answer=answer) as server:
        path = config(tmp_path, server.url, lines)
        generate.main([path, "--languages", "en"])
    rows, dropped = read(tmp_path / "new.jsonl"), read(tmp_path / "new.dropped.jsonl.gz")
    assert len({row["messages"][0]["content"] for row in rows}) == len(rows) == 11
    reasons = Counter(row["reasons"][0].partition(":")[0] for row in dropped)
    assert reasons["holds an item of a benchmark"] >= 2
    assert reasons["near-duplicate"] >= 4
    assert not {row["messages"][0]["content"] for row in rows} & {text.strip() for text in planted}


def test_another_model_may_answer(tmp_path):
    with FakeServer(answer=writing) as server:
        path = config(tmp_path, server.url)
        generate.main([path, "--answerer.model", "a", "--answerer.url", server.url, "--answerer.max-tokens", "77"])
    models = Counter((body["model"], body["max_tokens"]) for body, *_ in server.log)
    assert models == {("w", 2048): 14, ("a", 77): 22}


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ('known = ["nowhere.jsonl"]', r"nowhere\.jsonl: no such file"),
        ('benchmarks = ["nowhere.jsonl"]', r"nowhere\.jsonl: no such file"),
        ("rounds = 0", r"rounds = 0: must be at least 1"),
        ("max_cost = 1.0", r"max_cost needs the prices .* writer\.price_in"),
    ],
)
def test_wrong_settings_are_named(tmp_path, lines, message):
    with pytest.raises(SystemExit, match=message):
        generate.main([config(tmp_path, "http://127.0.0.1:1/v1", lines)])
