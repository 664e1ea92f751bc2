"""Translations that went wrong are found and right ones pass: on real pairs outside the tables' own, and by hand."""

import gzip
import hashlib
import json
import random

import pytest

from recipes.data_making.rules import REASONS, check
from tests.recipes.data_making.corruptions import CORRUPTIONS

SOURCE = (
    "The function returns the number of files. If the directory does not exist, an error is raised. "
    "See https://example.org/files for the 3 options of `list_files()`."
)
TARGET = (
    "この関数はファイルの数を返します。ディレクトリが存在しない場合は、エラーが送出されます。"
    "`list_files()` の 3 つのオプションについては https://example.org/files を参照してください。"
)


def reasons(source: str, target: str, **options) -> list[str]:
    return [finding.reason for finding in check(source, target, **options) if finding.certain]


@pytest.fixture(scope="module")
def heldout(shared_data) -> list[tuple[str, str]]:
    """Real pairs that the lexicon and the lengths were not learnt from."""
    with gzip.open(shared_data / "eval" / "parallel_docs.jsonl.gz", "rt", encoding="utf-8") as file:
        records = map(json.loads, file)
        return [(row["en"], row["ja"]) for row in records if int(hashlib.md5(row["en"].encode()).hexdigest(), 16) % 2]


def found(pairs, kind, seed=1) -> tuple[int, int]:
    """(found, made): the corruptions of a kind."""
    draw, others = random.Random(seed), [target for _, target in pairs]
    spoilt = [(source, CORRUPTIONS[kind](source, target, draw, others)) for source, target in pairs]
    verdicts = [bool(reasons(source, target)) for source, target in spoilt if target is not None]
    return sum(verdicts), len(verdicts)


def test_few_right_translations_are_called_wrong_and_most_seeded_faults_are_found(heldout):
    pairs = heldout[:300]
    alarms = sum(bool(reasons(source, target)) for source, target in pairs)
    assert alarms <= 0.03 * len(pairs)
    for kind in CORRUPTIONS:
        caught, made = found(pairs, kind)
        # Standard deviation at 95 % of 60 texts: 2.8 points.
        assert caught >= 0.89 * made, (kind, caught, made)


@pytest.mark.slow
def test_on_all_heldout_pairs_alarms_are_under_2_percent_and_95_percent_of_each_fault_are_found(heldout):
    alarms = sum(bool(reasons(source, target)) for source, target in heldout)
    assert alarms <= 0.02 * len(heldout)
    counts = {kind: found(heldout, kind) for kind in CORRUPTIONS}
    assert all(caught >= 0.95 * made for caught, made in counts.values()), counts


def test_a_right_translation_has_no_reasons():
    assert check(SOURCE, TARGET) == []


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (("3 つ", "4 つ"), "number changed"),
        (("list_files()", "list_file()"), "code altered"),
        (("https://example.org/files", "こちら"), "URL dropped"),
        (("ディレクトリが存在しない場合は、エラーが送出されます。", ""), "sentence left out"),
        (("参照してください。", "参"), "cut off"),
        (("エラーが送出されます。", "エラーが送出されます。" * 3), "repeated"),
        (("この関数は", "以下は日本語訳です：\nこの関数は"), "preamble"),
        (("この関数はファイルの数を返します。", "申し訳ありませんが、お答えできません。"), "refusal"),
        (("ディレクトリが", "디렉토리が"), "wrong language"),
        ((TARGET, SOURCE), "not translated"),
        ((TARGET, " "), "empty"),
        (
            (TARGET, "日本の首都は東京です。人口はおよそ千四百万人で、世界でも最大級の都市です。"),
            "answered instead of translated",
        ),
    ],
)
def test_each_fault_has_its_reason(change, reason):
    spoilt = TARGET.replace(*change)
    assert reason in reasons(SOURCE, spoilt)
    assert reason in REASONS


def test_a_text_with_the_name_of_japan_passes():
    assert reasons("The capital of Japan is Tokyo.", "日本の首都は東京です。") == []
    assert reasons("Return the file in Japan.", "日本にあるファイルを返します。") == []


@pytest.mark.parametrize(
    ("source", "target"),
    [
        ("There are 1,000 files and twelve errors.", "１０００個のファイルと12個のエラーがあります。"),
        ("It costs 1.5 million yen.", "それは150万円かかります。"),
        ("Released on October 3, 2019.", "2019年10月3日にリリースされました。"),
        ("Two of the three arguments are optional.", "三つの引数のうち二つは省略できます。"),
    ],
)
def test_numbers_written_in_another_way_are_equal(source, target):
    assert "number changed" not in reasons(source, target)


def test_code_comes_back_as_it_was_but_its_comments_may_be_translated():
    source = "Run this:\n\n```python\nx = 1  # the number of files\nprint(x)\n```\n"
    right = "次を実行してください:\n\n```python\nx = 1  # ファイルの数\nprint(x)\n```\n"
    assert "code altered" not in reasons(source, right)
    assert "code altered" in reasons(source, right.replace("print(x)", "print(y)"))
    assert "code altered" in reasons(source, right.replace("print(x)\n", ""))


def test_placeholders_and_items_of_lists_stay():
    source = "Hello {name}, choose:\n\n- one file\n- two files\n- three files\n"
    right = "こんにちは {name} さん、次から選択してください:\n\n- 1 つのファイル\n- 2 つのファイル\n- 3 つのファイル\n"
    assert reasons(source, right) == []
    assert "placeholder dropped" in reasons(source, right.replace("{name}", "お客様"))
    assert "list items changed" in reasons(source, right.replace("- 2 つのファイル\n", ""))


def test_the_reason_of_a_generations_end_says_that_it_was_cut():
    assert "cut off" in reasons(SOURCE, TARGET, finish_reason="length")
    assert reasons(SOURCE, TARGET, finish_reason="stop") == []


def test_japanese_to_english_is_judged_too():
    assert reasons(TARGET, SOURCE, languages=("ja", "en")) == []
    assert "not translated" in reasons(TARGET, TARGET, languages=("ja", "en"))
    assert "number changed" in reasons(TARGET, SOURCE.replace("3", "4"), languages=("ja", "en"))
    other = "The capital of Japan is Tokyo, and about fourteen million people live there, more than in any other city."
    assert "answered instead of translated" in reasons(TARGET, other, languages=("ja", "en"))


def test_other_languages_are_judged_without_tables():
    assert reasons("Hello, 3 files.", "Bonjour, 3 fichiers.", languages=("en", "other")) == []
    assert "number changed" in reasons("Hello, 3 files.", "Bonjour, 4 fichiers.", languages=("en", "other"))


def test_code_and_names_alone_need_no_translation():
    for text in ("42", "`print(x)`", "https://example.org", "```\nx = 1\n```"):
        assert reasons(text, text) == []


@pytest.mark.parametrize(
    ("source", "target"),
    [
        ("An image is sent over XMLRPC.", "画像を XML-RPC で送信します。"),
        ("Such `extension modules` add new types.", "この `extension module` は新しい型を追加します。"),
        ('Added support for the `"x"` mode.', "`'x'` モードのサポートが追加されました。"),
    ],
)
def test_hyphens_plurals_and_the_kind_of_quotation_marks_are_no_change_of_code(source, target):
    assert "code altered" not in reasons(source, target)


def test_a_text_that_ends_with_code_where_words_are_missing_is_cut_off():
    source = "This function returns the names of files. An error is raised by `open()` if the directory does not exist."
    assert "cut off" in reasons(source, "この関数はファイル名を返します。 `open()`")
    assert "cut off" not in reasons("See the list of files in `a()`.", "ファイルのリストは次を参照: `a()`")
