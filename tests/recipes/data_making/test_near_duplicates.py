"""Texts with a few words changed are found, other real texts pass; benchmark items are found in the texts that hold them."""

import gzip
import json
import random
import re

import pytest

from engine.data.records import read_conversation
from recipes.data_making.near_duplicates import Benchmarks, NearDuplicates, tokens

WORD = re.compile("[\u3041-\u3096]{2}|[\u4e00-\u9fff]{2}|[\u30a1-\u30ff]{3}|[A-Za-z]+")


SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in ("jmmlu_test", "hellaswag_val", "jsquad_valid")]
SETS = ["gsm8k_test", "jcommonsenseqa_valid", "mt_bench_ja", *SLOW]


def records(path) -> list[dict]:
    with gzip.open(path, "rt", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def changed(text: str, draw: random.Random) -> str:
    """The text with 5 % of its words exchanged for words of another text."""
    words = list(WORD.finditer(text))
    for word in sorted(draw.sample(words, max(1, round(0.05 * len(words)))), key=lambda word: -word.start()):
        text = text[: word.start()] + draw.choice(["翡翠", "zebra", "quickly"]) + text[word.end() :]
    return text


def test_planted_near_duplicates_are_found_and_distinct_real_conversations_kept(shared_data):
    pytest.importorskip("datasketch")
    conversations = [read_conversation(record) for record in records(shared_data / "sft" / "ja_sharegpt.jsonl.gz")[:800]]
    texts = list(dict.fromkeys("\n".join(turn["content"] for turn in turns) for turns in conversations))
    seen, draw = NearDuplicates(), random.Random(1)
    lost = [text for number, text in enumerate(texts) if seen.seen(text, str(number)) is not None]
    assert len(lost) <= 0.005 * len(texts)
    planted = [text for text in texts[:200] if len(WORD.findall(text)) >= 20]
    found = [seen.seen(changed(text, draw), f"planted {number}") for number, text in enumerate(planted)]
    assert sum(name is not None for name in found) >= 0.95 * len(planted)


def test_the_name_of_the_earlier_text_is_given_and_a_text_repeats_itself():
    pytest.importorskip("datasketch")
    seen = NearDuplicates()
    assert seen.seen("One two three four five six.", "a") is None
    assert seen.seen("Another text about something else.", "b") is None
    assert seen.seen("one two, three four five six", "c") == "a"
    assert seen.seen("", "d") is None
    assert seen.seen("", "e") == "d"


@pytest.mark.parametrize("name", SETS)
def test_every_planted_item_of_a_benchmark_is_found(shared_data, name):
    path = shared_data / "bench" / f"{name}.jsonl.gz"
    benchmarks = Benchmarks()
    assert benchmarks.add([str(path)]) == len(records(path))
    for record in random.Random(1).sample(records(path), 60):
        item = record.get("question") or record.get("ctx") or record["turns"][0]
        assert benchmarks.find(f"Before it.\n{item}\nそのあと。") is not None, item


def test_real_conversations_that_are_no_benchmark_are_not_found(shared_data):
    benchmarks = Benchmarks()
    for name in ("gsm8k_test", "jcommonsenseqa_valid"):
        benchmarks.add([str(shared_data / "bench" / f"{name}.jsonl.gz")])
    conversations = [read_conversation(record) for record in records(shared_data / "sft" / "ja_sharegpt.jsonl.gz")[:500]]
    found = [benchmarks.find("\n".join(turn["content"] for turn in turns)) for turns in conversations]
    assert sum(place is not None for place in found) <= 2


def test_the_form_of_a_benchmark_tells_nothing_and_short_items_must_stand_whole():
    form = "Please choose the one correct answer to the following question about the common knowledge of the world: "
    benchmarks = Benchmarks()
    benchmarks.add_items([(f"bench:{number}", f"{form}{number} or {number + 1}?") for number in range(200)])
    benchmarks.add_items([("short:1", "How many legs has a spider?"), ("tiny:1", "Who?")])
    assert benchmarks.find(form + "what is a cat?") is None
    assert benchmarks.find(form + "17 or 18?") == "bench:17"
    assert benchmarks.find("Tell me: how many legs has a spider") == "short:1"
    assert benchmarks.find("Tell me how many legs has a cow") is None
    assert benchmarks.find("Who is it?") is None
    assert benchmarks.find("Tell me.\nWho?") == "tiny:1"


def test_a_file_without_items_is_refused_by_name(tmp_path):
    path = tmp_path / "bench.jsonl"
    path.write_text('{"text": "Hello."}\n', encoding="utf-8")
    with pytest.raises(ValueError, match=r"bench.jsonl: no text in any of the fields"):
        Benchmarks().add([str(path)])


def test_tokens_are_words_and_japanese_characters():
    assert tokens("Ｈｅｌｌｏ, 世界へ 1,000!") == ["hello", "世", "界", "へ", "1", "000"]
