"""Documents that are too long: skipped, cut or split; and the filter by language."""

import json

import numpy as np
import pytest

from engine.data.dataset import TokenDataset
from engine.data.languages import check_language, is_in, share
from engine.data.prepare import describe, prepare
from engine.data.too_long import parts_of_text
from model.vocabulary.chat import encode_chat
from model.vocabulary.tokenizer import Tokenizer, mistral_tokenizer_path


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.load(mistral_tokenizer_path())


@pytest.fixture
def documents(tmp_path, tokenizer):
    """documents(kind, records, **settings) -> (ids, trained) of each document, and the report."""

    def make(kind, records, **settings):
        path = tmp_path / "in.jsonl"
        path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
        report = prepare([str(path)], tmp_path / "out", tokenizer=tokenizer, kind=kind, overwrite=True, **settings)
        dataset = TokenDataset.open(tmp_path / "out")
        return [(dataset.tokens(n).tolist(), dataset.trained(n).tolist()) for n in range(len(dataset))], report

    return make


def talk(*contents, system=None):
    head = [] if system is None else [{"role": "system", "content": system}]
    return head + [{"role": ("user", "assistant")[n % 2], "content": text} for n, text in enumerate(contents)]


def words(count: int, word: str = "word") -> str:
    return " ".join([word] * count)


@pytest.mark.parametrize("length", range(2, 40))
def test_a_split_text_predicts_every_token_once(length):
    ids = [1, *range(10, 10 + length - 2), 2]
    parts = parts_of_text(ids, 7, "split") if length > 7 else [ids]
    assert [id for part in parts for id in part[1:]] == ids[1:]
    assert all(part[0] == 1 and 2 <= len(part) <= 7 for part in parts)


def test_long_texts(documents, tokenizer):
    texts = [{"text": words(5)}, {"text": words(50, "one two")}]
    whole = [[1, *tokenizer.encode(record["text"]), 2] for record in texts]
    skipped, report = documents("text", texts, max_length=40)
    assert [ids for ids, _ in skipped] == whole[:1]
    assert report["skipped"]["longer than max_length = 40"]["count"] == 1
    cut, report = documents("text", texts, max_length=40, too_long="cut")
    assert [ids for ids, _ in cut] == [whole[0], whole[1][:40]]
    assert "longer than max_length = 40: 1 cut" in describe(report)
    split, report = documents("text", texts, max_length=40, too_long="split")
    assert [ids for ids, _ in split] == [whole[0], *parts_of_text(whole[1], 40, "split")]
    assert report["too_long"] == {"split": 1, "parts": len(split) - 1}


def test_a_long_conversation_is_split_between_exchanges_behind_its_system_message(documents, tokenizer):
    exchanges = [(words(6, f"q{n}"), words(6, f"a{n}")) for n in range(7)]
    messages = talk(*(text for exchange in exchanges for text in exchange), system="Be brief.")
    found, report = documents("conversations", [{"messages": messages}], max_length=100, too_long="split")
    assert all(len(ids) <= 100 for ids, _ in found)
    begin, parts = 0, []
    for ids, _ in found:
        size = next(
            size
            for size in range(1, 8)
            if encode_chat(tokenizer, messages[:1] + messages[1 + 2 * begin : 1 + 2 * (begin + size)]).ids == ids
        )
        # One more exchange would not fit.
        following = messages[:1] + messages[1 + 2 * begin : 1 + 2 * (begin + size + 1)]
        assert begin + size == 7 or len(encode_chat(tokenizer, following).ids) > 100
        begin += size
        parts.append(size)
    assert begin == 7
    assert report["too_long"] == {"split": 1, "parts": len(parts)}
    assert report["roles"] == {"system": len(parts), "user": 7, "assistant": 7}
    cut, report = documents("conversations", [{"messages": messages}], max_length=100, too_long="cut")
    assert cut == found[:1]
    assert report["too_long"] == {"cut": 1}
    with pytest.raises(ValueError, match="longer than max_length = 100"):
        documents("conversations", [{"messages": messages}], max_length=100)


def test_an_exchange_that_is_too_long_by_itself_loses_its_answers_end(documents, tokenizer):
    long = talk("short", words(80), "q", "a")
    question = talk(words(80), "answer")
    whole = encode_chat(tokenizer, long[:2])
    found, report = documents(
        "conversations", [{"messages": long}, {"messages": question}, {"messages": long[2:]}], max_length=50, too_long="split"
    )
    assert found[0] == (whole.ids[:50], whole.trained[:50])
    assert [ids for ids, _ in found[1:]] == [encode_chat(tokenizer, long[2:]).ids] * 2
    assert report["too_long"] == {"split": 2, "parts": 3, "cut": 1}
    assert report["skipped"]["question longer than max_length = 50"]["count"] == 1


def test_answers_of_weight_0_stay_untrained_in_every_part(documents):
    messages = talk(*(words(6, f"t{n}") for n in range(8)))
    messages[1]["weight"] = messages[3]["weight"] = 0
    found, _ = documents("conversations", [{"messages": messages}], max_length=60, too_long="split")
    # The first part has no trained answer left, and is no document.
    trained = [np.array(ids)[told].tolist() for ids, told in found]
    assert 0 < len(found) < 4
    whole, _ = documents("conversations", [{"messages": messages}])
    assert [id for part in trained for id in part] == np.array(whole[0][0])[whole[0][1]].tolist()


def test_long_pairs_are_cut_in_their_answers_alone(documents):
    pairs = [
        {"prompt": "p", "chosen": words(60), "rejected": "no"},
        {"prompt": words(60), "chosen": "yes", "rejected": "no"},
        {"prompt": "p", "chosen": words(60) + " x", "rejected": words(60) + " y"},
    ]
    found, report = documents("preferences", pairs, max_length=50, too_long="cut")
    assert [len(ids) for ids, _ in found] == [50, len(found[1][0])]
    assert report["too_long"] == {"cut": 1}
    assert {reason: skip["count"] for reason, skip in report["skipped"].items()} == {
        "prompt longer than max_length = 50": 1,
        "identical chosen and rejected": 1,
    }


@pytest.mark.parametrize(
    ("kind", "settings", "message"),
    [
        ("text", {"too_long": "cut"}, "too_long = 'cut' has no effect without max_length"),
        ("text", {"too_long": "drop", "max_length": 5}, "too_long = 'drop': must be one of skip, cut, split"),
        ("preferences", {"too_long": "split", "max_length": 5}, "a pair cannot be split"),
        ("text", {"language": "jaa"}, "language = 'jaa': did you mean 'ja'"),
        ("text", {"language": "en"}, "letters tell latin, not English"),
    ],
)
def test_settings_that_cannot_be_meant_are_refused(documents, kind, settings, message):
    with pytest.raises(ValueError, match=message):
        documents(kind, [{"text": "a"}], **settings)


@pytest.mark.parametrize(
    ("text", "language"),
    [
        ("東京はどこですか。", "ja"),
        ("それはPythonのコードです。", "ja"),
        ("```python\nimport long_english_module\n```\nこれです", "ja"),
        ("我们去北京。", "zh"),
        ("서울은 어디입니까?", "ko"),
        ("Where is the café?", "latin"),
        ("Где Москва?", "cyrl"),
    ],
)
def test_languages_are_told_apart_by_script(text, language):
    known = ("ja", "zh", "ko", "latin", "cyrl")
    assert [name for name in known if is_in(text, name)] == [language]
    check_language(language)


def test_a_text_without_letters_is_in_no_language():
    assert share("123 !?", "latin") == 0
    assert not is_in("123 !?", "latin")


def test_the_filter_reads_what_user_and_assistant_say(documents):
    records = [
        {"messages": talk("日本の首都は？", "東京です。", system="You are a helpful and quite verbose assistant.")},
        {"messages": talk("Where?", "In Tokyo.")},
    ]
    found, report = documents("conversations", records, language="ja")
    assert len(found) == 1
    (reason, skip), *others = report["skipped"].items()
    assert (reason, skip["count"], skip["detail"]) == ("not in the language 'ja'", 1, "'Where?\\nIn Tokyo.'")
    assert not others
    with pytest.raises(ValueError, match=r"no record can be used; the last: .*not in the language 'zh'"):
        documents("conversations", records, language="zh")
