"""recipes.leakage: the command's files in and out."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from recipes.leakage import main


def record(response, **more):
    return {"messages": [{"role": "user", "content": "Tell me about summer."}], "response": response} | more


def write(path, records):
    path.write_text("".join(json.dumps(each) + "\n" for each in records))
    return str(path)


def rows(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_detect_writes_a_line_a_record_with_its_number_and_id(tmp_path, capsys):
    answers = [
        record("It is hot."),
        record("It is 湿気 hot.", id="b"),
        {"messages": [*record("")["messages"], {"role": "assistant", "content": "Very ледяной tea."}]},
    ]
    out = tmp_path / "found.jsonl"
    main(["detect", write(tmp_path / "answers.jsonl", answers), "--json", str(out)])
    assert rows(out) == [
        {"number": 1, "language": "en", "leak": False, "spans": []},
        {"number": 2, "id": "b", "language": "en", "leak": True, "spans": [[6, 8]]},
        {"number": 3, "language": "en", "leak": True, "spans": [[5, 12]]},
    ]
    assert "2 of 3 answers leak, 66.7%" in capsys.readouterr().out


def test_detect_reads_the_answers_of_a_folder_and_passes_over_other_files(tmp_path):
    write(tmp_path / "a.jsonl", [record("It is 湿気 hot.")])
    write(tmp_path / "metrics.jsonl", [{"step": 1}])
    out = tmp_path.parent / "folder.jsonl"
    main(["detect", str(tmp_path), "--json", str(out)])
    assert [row["leak"] for row in rows(out)] == [True]


def test_conversations_in_other_forms_are_read(tmp_path):
    rows_in = [
        {"conversations": [{"from": "human", "value": "Summer?"}, {"from": "gpt", "value": "It is 湿気 hot."}]},
        {"instruction": "Tell me about summer.", "output": "It is hot."},
        {"prompt": "Tell me about summer.", "response": "It is 湿気 hot."},
        record("It is hot.", messages=[{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]),
    ]
    out = tmp_path / "found.jsonl"
    main(["detect", write(tmp_path / "a.jsonl", rows_in), "--json", str(out)])
    assert [row["leak"] for row in rows(out)] == [True, False, True, False]


def test_rates_are_printed_by_field(tmp_path, capsys):
    answers = [
        record("It is 湿気 hot.", temperature=t) if t > 0.5 else record("It is hot.", temperature=t) for t in (0.1, 1.0, 1.0)
    ]
    main(["detect", write(tmp_path / "a.jsonl", answers), "--by", "temperature", "--show", "0"])
    said = capsys.readouterr().out
    assert "0.1: 0 of 1 answers leak, 0.0%" in said
    assert "1.0: 2 of 2 answers leak, 100.0%" in said


@pytest.mark.parametrize(
    ("records", "options", "said"),
    [
        ([{"text": "a"}], [], "a.jsonl:1: not an answer"),
        ([record(3)], [], "a.jsonl:1: 'response' must be a text, is int"),
        ([record("a")], ["--by", "model"], "a.jsonl:1: no field 'model' to group by"),
        ([], [], "empty"),
    ],
)
def test_what_is_no_answer_is_refused_by_one_line(tmp_path, records, options, said):
    with pytest.raises(SystemExit) as ended:
        main(["detect", write(tmp_path / "a.jsonl", records), *options, "--json", str(tmp_path / "out.jsonl")])
    assert said in str(ended.value)
    assert not (tmp_path / "out.jsonl").exists()


@pytest.mark.slow
def test_a_missing_package_is_named_in_one_line(tmp_path):
    path = write(tmp_path / "a.jsonl", [record("It is hot.")])
    code = f"import sys; sys.modules['scipy'] = None; from recipes.leakage import main; main(['detect', {path!r}])"
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[2])}
    ended = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert ended.returncode == 1
    assert ended.stderr.strip() == (
        "error: scipy is not installed: this command needs the extra eval, pip install 'komainu[eval]'"
    )
