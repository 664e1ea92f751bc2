"""The command: a line for each record, texts and conversations, two files, duplicates, the report, faults of the user."""

import gzip
import json

import pytest

from recipes import validate
from recipes.data_making.validation import Duplicates, Pair, check_pairs

RIGHT = ("Return the number of files in the directory.", "ディレクトリ内のファイルの数を返します。")
OTHER = ("An error is raised if the value is not valid.", "値が有効でない場合は、エラーが送出されます。")


def write(path, records) -> str:
    path.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records), encoding="utf-8")
    return str(path)


def result(path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def turns(*texts: str) -> list[dict]:
    return [{"role": ("user", "assistant")[number % 2], "content": text} for number, text in enumerate(texts)]


def test_each_record_gets_a_line_with_its_number_verdict_and_reasons(tmp_path, capsys):
    records = [{"en": RIGHT[0], "ja": RIGHT[1]}, {"en": OTHER[0], "ja": OTHER[0]}, {"en": OTHER[0]}]
    file = write(tmp_path / "pairs.jsonl", records)
    validate.main([file, "--source-field", "en", "--target-field", "ja", "--json", str(tmp_path / "out.jsonl")])
    lines = result(tmp_path / "out.jsonl")
    assert [line["number"] for line in lines] == [1, 2, 3]
    assert [line["ok"] for line in lines] == [True, False, False]
    assert [line["reasons"] for line in lines] == [[], ["not translated"], ["unreadable"]]
    said = capsys.readouterr().out
    assert "3 records, 2 texts: 2 records" in said
    assert "pairs.jsonl:2" in said


def test_conversations_are_checked_text_by_text_in_fields_and_in_two_files(tmp_path):
    before, after = turns(RIGHT[0], OTHER[0]), turns(RIGHT[1], OTHER[0])
    fields = write(tmp_path / "fields.jsonl", [{"messages": before, "translated": {"messages": after}}])
    validate.main(
        [fields, "--source-field", "messages", "--target-field", "translated.messages", "--json", str(tmp_path / "a.jsonl")]
    )
    one = write(tmp_path / "before.jsonl", [{"instruction": RIGHT[0], "output": OTHER[0]}])
    two = write(
        tmp_path / "after.jsonl",
        [{"conversations": [{"from": "human", "value": RIGHT[1]}, {"from": "gpt", "value": OTHER[0]}]}],
    )
    validate.main([one, "--after", two, "--json", str(tmp_path / "b.jsonl")])
    for name in ("a", "b"):
        [line] = result(tmp_path / f"{name}.jsonl")
        assert line["reasons"] == ["not translated"]
        assert [detail["text"] for detail in line["details"]] == [2]


def test_conversations_that_lost_a_turn_are_told_apart(tmp_path):
    one = write(tmp_path / "before.jsonl", [{"messages": turns(*RIGHT, *OTHER)}])
    two = write(tmp_path / "after.jsonl", [{"messages": turns(*RIGHT)}])
    validate.main([one, "--after", two, "--json", str(tmp_path / "out.jsonl")])
    [line] = result(tmp_path / "out.jsonl")
    assert line["reasons"] == ["unreadable"]
    assert "other turns" in line["details"][0]["detail"]


def test_files_of_different_length_are_refused_with_the_place(tmp_path):
    one = write(tmp_path / "before.jsonl", [{"messages": turns(*RIGHT)}])
    two = write(tmp_path / "after.jsonl", [{"messages": turns(*RIGHT)}] * 2)
    with pytest.raises(SystemExit, match=r"after.jsonl:2: .* more records than"):
        validate.main([one, "--after", two, "--json", str(tmp_path / "out.jsonl")])
    assert not (tmp_path / "out.jsonl").exists()


def test_a_finish_reason_of_length_says_that_the_record_was_cut_off(tmp_path):
    file = write(tmp_path / "a.jsonl", [{"source": RIGHT[0], "target": RIGHT[1], "finish_reason": "length"}])
    validate.main([file, "--json", str(tmp_path / "out.jsonl")])
    assert result(tmp_path / "out.jsonl")[0]["reasons"] == ["cut off"]


def test_processes_give_the_same_lines_as_one(tmp_path):
    records = [{"en": f"{RIGHT[0]} {number} times.", "ja": f"{RIGHT[1]}{number % 100} 回です。"} for number in range(230)]
    file = write(tmp_path / "pairs.jsonl", records)
    fields = ["--source-field", "en", "--target-field", "ja"]
    for processes in ("1", "2"):
        validate.main([file, *fields, "--processes", processes, "--json", str(tmp_path / f"{processes}.jsonl")])
    assert (tmp_path / "1.jsonl").read_bytes() == (tmp_path / "2.jsonl").read_bytes()
    assert [line["ok"] for line in result(tmp_path / "1.jsonl")] == [number < 100 for number in range(230)]


def test_repeated_records_and_long_targets_are_duplicates():
    seen = Duplicates()
    assert seen.seen(Pair(1, "a:1", [RIGHT])) is None
    assert seen.seen(Pair(2, "a:2", [OTHER])) is None
    assert seen.seen(Pair(3, "a:3", [RIGHT])).detail == "of record 1"
    assert "record 2" in seen.seen(Pair(4, "a:4", [("Another source.", OTHER[1])])).detail
    assert seen.seen(Pair(5, "a:5", [("Yes.", "はい。")])) is None
    assert seen.seen(Pair(6, "a:6", [("Yes!", "はい。")])) is None


def test_the_languages_are_found_from_the_texts():
    backwards = Pair(1, "a:1", [RIGHT[::-1]])
    [checked] = check_pairs(iter([backwards]), (None, None), 1)
    assert checked.reasons == []
    [checked] = check_pairs(iter([Pair(1, "a:1", [(RIGHT[1], RIGHT[1])])]), ("ja", "en"), 1)
    assert checked.reasons == ["not translated"]


def test_the_report_counts_shows_examples_and_lists_what_a_person_should_see(tmp_path):
    file = tmp_path / "pairs.jsonl.gz"
    records = [{"source": RIGHT[0], "target": RIGHT[1]}, {"source": OTHER[0], "target": OTHER[0]}]
    # A word that is in neither the source nor the language: a name, or a leak.
    records.append({"source": OTHER[0], "target": OTHER[1].replace("エラー", "mistake のエラー")})
    with gzip.open(file, "wt", encoding="utf-8") as opened:
        opened.write("".join(json.dumps(record) + "\n" for record in records))
    validate.main([str(file), "--report", str(tmp_path / "report")])
    report = (tmp_path / "report" / "report.md").read_text(encoding="utf-8")
    assert "| not translated | 1 |" in report
    assert OTHER[0] in report
    [look] = result(tmp_path / "report" / "look.jsonl")
    assert look["why"] == "wrong language"
    assert look["number"] == 3
    assert (tmp_path / "report" / "reasons.svg").read_text(encoding="utf-8").count("not translated") == 1


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["missing.jsonl"], "no such file"),
        (["--source-field", "en"], "file"),
        (["a.jsonl", "--json", "out.csv"], "unknown type of file"),
        (["a.jsonl", "--processes", "-1"], "must be at least 0"),
    ],
)
def test_faults_of_the_user_are_one_clear_line(arguments, said, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as ended:
        validate.main(arguments)
    assert said in str(ended.value) + capsys.readouterr().err
