"""Texts with a few words changed are found, other real texts pass; benchmark items are found in the texts that hold them."""

import gzip
import json
import random
import re
from contextlib import suppress

import pytest

from engine.data.records import Unusable, read_conversation
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


def conversations(shared_data, name: str) -> list[str]:
    """The different conversations of a set that hold text on every side."""
    found = {}
    for record in records(shared_data / "sft" / f"{name}.jsonl.gz"):
        with suppress(Unusable):
            found["\n".join(turn["content"] for turn in read_conversation(record))] = None
    return list(found)


def is_distinct(own: list[str], earlier: list[list[str]]) -> bool:
    """Whether more than 5 % of the words differ, rounded to whole words, from every earlier text, by an exact alignment."""
    from rapidfuzz.distance import Levenshtein

    return all(Levenshtein.distance(own, other) > 0.05 * max(len(own), len(other)) + 0.5 for other in earlier)


WHOLE = ("en_alpaca", "en_t0_prompt_completion", "en_sharegpt", "ja_alpaca", "ja_sharegpt")
PARTS = [
    ("ja_alpaca", 300),
    ("en_t0_prompt_completion", 600),
    *(pytest.param(name, None, marks=pytest.mark.slow) for name in WHOLE),
]


@pytest.mark.parametrize(("name", "most"), PARTS)
def test_planted_near_duplicates_are_found_and_distinct_real_conversations_kept(shared_data, name, most):
    pytest.importorskip("datasketch")
    texts = conversations(shared_data, name)[:most]
    seen, draw = NearDuplicates(), random.Random(1)
    lost = [number for number, text in enumerate(texts) if seen.seen(text, str(number)) is not None]
    words = [re.findall("[a-z0-9]+|[\u3041-\u9fff]", text.lower()) for text in texts]
    distinct = [number for number in lost if is_distinct(words[number], words[:number])]
    assert len(distinct) <= 0.005 * len(texts)
    kept = [text for number, text in enumerate(texts) if number not in set(lost) and len(WORD.findall(text)) >= 20]
    planted = draw.sample(kept, min(len(kept), (most or 3000) // 3))
    found = [seen.seen(changed(text, draw), "planted") for text in planted]
    assert sum(name is not None for name in found) >= 0.95 * len(planted)


PASSAGE = (
    "The lighthouse was built in 1874 by Thomas Stevenson. It stands on a rock that the sea covers at high water. "
    "Two keepers lived there until 1971, when the lamp was made automatic. A boat brought coal, oil and letters every week."
)


@pytest.mark.parametrize(
    ("change", "repeats"),
    [
        (("every week", "each week"), True),
        (("a rock that the sea covers", "a rock which the sea covers"), True),
        (("Two keepers", "two Keepers,"), True),
        (("1971", "1981"), False),
        (("was made", "was not made"), False),
        (("Thomas Stevenson", "Robert Louis"), False),
        (("Who built it?\nThomas Stevenson", "What came by boat?\nCoal, oil and letters"), False),
        (("Who built it?", "How many people lived on the rock?"), False),
    ],
)
def test_a_word_may_differ_but_not_a_question_a_number_a_name_or_a_negation(change, repeats):
    pytest.importorskip("datasketch")
    text = f"{PASSAGE}\nWho built it?\nThomas Stevenson"
    seen = NearDuplicates()
    assert seen.seen(text, "a") is None
    assert change[0] in text
    assert (seen.seen(text.replace(*change), "b") == "a") is repeats


def test_japanese_questions_on_one_passage_are_distinct_and_a_particle_is_no_difference():
    pytest.importorskip("datasketch")
    passage = "富士山は静岡県と山梨県にまたがる火山で、高さは三千七百メートルを超えます。古くから多くの人が登りました。"
    again = passage.replace("多くの人が", "多くの人も")
    seen = NearDuplicates()
    assert seen.seen(f"質問: 標高はいくつですか。\n{passage}\n三千七百メートル", "a") is None
    assert seen.seen(f"質問: どの県にありますか。\n{passage}\n静岡県と山梨県", "b") is None
    assert seen.seen(f"質問: 標高はいくつですか。\n{again}\n三千七百メートル", "c") == "a"


def test_a_short_request_with_another_word_is_another_request():
    pytest.importorskip("datasketch")
    for one, other in (
        ("日本の戦国時代について説明してください。", "日本の江戸時代について説明してください。"),
        ("Name a red fruit.", "Name a red bird."),
    ):
        seen = NearDuplicates()
        assert [seen.seen(text, text) for text in (one, other, one)] == [None, None, one]


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
