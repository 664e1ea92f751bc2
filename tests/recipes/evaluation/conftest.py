"""Small benchmark tasks in files, made of the words that the tiny tokenizer knows."""

import json
import random
from pathlib import Path

import pytest

from tests.conftest import WORDS

CHOICE = """
task: choice
dataset_path: json
dataset_kwargs: {data_files: {test: choice.jsonl}}
test_split: test
fewshot_split: test
num_fewshot: 2
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: "{{choices}}"
doc_to_target: "{{label}}"
metric_list:
  - {metric: acc, aggregation: mean, higher_is_better: true}
  - {metric: acc_norm, aggregation: mean, higher_is_better: true}
primary: acc_norm
"""
LETTERS = """
task: letters
dataset_path: json
dataset_kwargs: {data_files: {test: choice.jsonl}}
shots: {split: test, first: 2, by: subject}
cluster: subject
test_split: test
num_fewshot: 2
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: ["a", "the", "it"]
doc_to_target: "{{label}}"
metric_list:
  - {metric: acc, aggregation: mean, higher_is_better: true}
"""
ANSWER = """
task: answer
dataset_path: json
dataset_kwargs: {data_files: {test: answer.jsonl}}
test_split: test
num_fewshot: 0
output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: "{{answers[0]}}"
generation_kwargs: {until: ["dog"], do_sample: false, max_gen_toks: 12}
process_results: char_f1
primary: char_f1
metric_list:
  - {metric: exact_match, aggregation: mean, higher_is_better: true}
  - {metric: char_f1, aggregation: mean, higher_is_better: true}
"""


@pytest.fixture(scope="session")
def small_tasks(tmp_path_factory) -> Path:
    """A folder with choice.yaml, letters.yaml and answer.yaml, and the records that they read."""
    folder = tmp_path_factory.mktemp("tasks")
    chooser = random.Random(0)

    def words(count: int) -> str:
        return " ".join(chooser.choice(WORDS) for _ in range(count))

    questions = [
        {
            "subject": f"s{number % 5}",
            "question": words(chooser.randint(2, 6)),
            "choices": [words(chooser.randint(1, 3)) for _ in range(3)],
            "label": chooser.randrange(3),
        }
        for number in range(40)
    ]
    answers = [{"question": words(4), "answers": [words(2), words(3)]} for _ in range(12)]
    for name, records in (("choice.jsonl", questions), ("answer.jsonl", answers)):
        lines = [json.dumps(record, ensure_ascii=False) for record in records]
        (folder / name).write_text("\n".join(lines) + "\n", encoding="utf-8")
    for name, text in (("choice", CHOICE), ("letters", LETTERS), ("answer", ANSWER)):
        (folder / f"{name}.yaml").write_text(text, encoding="utf-8")
    return folder
