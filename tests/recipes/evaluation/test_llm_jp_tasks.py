"""llm-jp-eval's data sets as tasks: prompts, the beginning-of-sequence token, and scores that a rescoring repeats."""

import json
import random
from pathlib import Path

import pytest

pytest.importorskip("lm_eval", reason="lm-evaluation-harness comes with the extra eval")
pytest.importorskip("rapidfuzz", reason="rapidfuzz comes with the extra eval")

from model.vocabulary.tokenizer import Tokenizer
from recipes.evaluate import EvaluateSettings, run
from recipes.evaluation.encoding import Encoder
from recipes.evaluation.llm_jp import DATASETS, read_logs, rescore
from recipes.evaluation.llm_jp_tasks import SAMPLES, Form, load_tasks, means, read_template, weights
from tests.conftest import WORDS


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """All nine data sets: outputs of one or two words, numbers for JSTS; one has its examples in train/."""
    folder, chooser = tmp_path_factory.mktemp("llm-jp-eval"), random.Random(0)

    def record(name: str) -> dict:
        words = 1 if DATASETS[name][1] == "exact_match" else 6
        output = " ".join(chooser.choice(WORDS) for _ in range(words))
        number = f"{chooser.randint(0, 5)}.{chooser.randint(0, 9)}"
        return {"input": " ".join(chooser.choice(WORDS) for _ in range(3)), "output": number if name == "jsts" else output}

    (folder / "train").mkdir()
    for name in DATASETS:
        table = {
            "instruction": "say {it}",
            "output_length": 12,
            "metrics": [DATASETS[name][1]],
            "few_shots": [record(name) for _ in range(5)],
            "samples": [record(name) for _ in range(7)],
        }
        if name == "jnli":
            (folder / "train" / "jnli.json").write_text(json.dumps({"samples": table.pop("few_shots")}), encoding="utf-8")
        (folder / f"{name}.json").write_text(json.dumps(table, ensure_ascii=False), encoding="utf-8")
    return folder


TEMPLATE = "{instruction}|{examples}|{input}:"


def test_a_prompt_has_the_instruction_four_examples_and_the_input(data):
    for name in ("niilc", "jnli"):
        (task,) = load_tasks(f"llm-jp-eval/{name}", data, Form(TEMPLATE))
        table = json.loads((data / f"{name}.json").read_text(encoding="utf-8"))
        train = json.loads((data / "train" / "jnli.json").read_text(encoding="utf-8"))
        shots = (table.get("few_shots") or train["samples"])[:4]
        examples = "".join(f"### 入力：\n{shot['input']}\n### 回答：\n{shot['output']}\n\n" for shot in shots)
        doc = table["samples"][0]
        assert task.fewshot_context(doc, 4) == f"say {{it}}|{examples}|{doc['input']}:"


def test_braces_in_a_text_are_no_fields(data, tmp_path):
    (task,) = load_tasks("llm-jp-eval/jsquad", data, Form(TEMPLATE))
    assert task.prompt_of({"input": "{examples} {instruction}", "output": ""}).endswith("|{examples} {instruction}:")
    assert (tmp_path / "template.txt").write_text(TEMPLATE, encoding="utf-8")
    assert read_template(tmp_path / "template.txt") == TEMPLATE


def test_the_beginning_of_sequence_stands_first_or_before_the_instruction(data, tiny_tokenizer):
    tokenizer = Tokenizer.load(tiny_tokenizer)
    doc = {"input": "the cat", "output": ""}
    (task,) = load_tasks("llm-jp-eval/jamp", data, Form("a red dog {instruction}{examples}{input}"))
    (legacy,) = load_tasks("llm-jp-eval/jamp", data, Form("a red dog {instruction}{examples}{input}", legacy_bos=True))
    (first, second) = Encoder(tokenizer).texts([task.prompt_of(doc), legacy.prompt_of(doc)])
    assert first == [tokenizer.bos_id, *tokenizer.encode(task.prompt_of(doc))]
    before = tokenizer.encode("a red dog ")
    assert second == [*before, tokenizer.bos_id, *tokenizer.encode(task.prompt_of(doc).removeprefix("a red dog "))]


def test_at_most_a_hundred_samples_are_asked(data, tmp_path):
    table = json.loads((data / "jsick.json").read_text(encoding="utf-8"))
    (tmp_path / "jsick.json").write_text(json.dumps(table | {"samples": table["samples"] * 30}), encoding="utf-8")
    (task,) = load_tasks("llm-jp-eval/jsick", tmp_path, Form())
    assert len(task.eval_docs) == SAMPLES


def test_the_evaluations_means_are_those_of_its_rescored_log(tiny_model, data, tmp_path):
    settings = EvaluateSettings(
        model=str(tiny_model),
        tasks=("llm-jp-eval",),
        out=str(tmp_path / "out"),
        data=str(data),
        template=str(tmp_path / "template.txt"),
        device="cpu",
    )
    (tmp_path / "template.txt").write_text("{instruction} {examples} {input}", encoding="utf-8")
    out = run(settings)
    results = json.loads((out / "results.json").read_text(encoding="utf-8"))
    (log,) = read_logs(str(out / "llm_jp_eval.jsonl")).values()
    expected = rescore(log)
    assert results["llm-jp-eval"] == pytest.approx(expected)
    assert expected["RC"] > 0 < expected["QA"], "scores of zero prove little"
    interval = results["intervals"]["llm-jp-eval AVR"]["mean,none"]
    assert interval["low"] <= expected["AVR"] <= interval["high"]
    assert {"pearson,none", "spearman,none"} <= results["results"]["llm-jp-eval/jsts"].keys()
    # The prompts are far longer than the model's 128 positions, so they are cut, and counted.
    assert results["counts"]["truncated"] > 0


def test_means_are_of_groups_and_their_weights_say_so():
    scores = {name: number / 10 for number, name in enumerate(DATASETS) if name != "jsts"}
    found = means(scores)
    assert found["AVR"] == pytest.approx((found["MC"] + found["NLI"] + found["QA"] + found["RC"]) / 4)
    for mean, score in found.items():
        shares = weights(list(scores), mean)
        assert sum(share * value for share, value in zip(shares, scores.values(), strict=True)) == pytest.approx(score)
    assert "AVR" not in means({"jnli": 0.5})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda folder: (folder / "jamp.json").unlink(), r"no file jamp\.json in "),
        (lambda folder: (folder / "jamp.json").write_text("{", encoding="utf-8"), r"jamp\.json: not JSON"),
        (
            lambda folder: (folder / "jamp.json").write_text('{"few_shots": [1]}', encoding="utf-8"),
            "has 1 few_shots, 4 are needed",
        ),
        (
            lambda folder: (folder / "jamp.json").write_text('{"few_shots": [1, 2, 3, 4]}', encoding="utf-8"),
            "lacks instruction, output_length, samples",
        ),
    ],
)
def test_a_file_of_another_form_is_named(data, tmp_path, change, message):
    (tmp_path / "jamp.json").write_bytes((data / "jamp.json").read_bytes())
    change(tmp_path)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        load_tasks("llm-jp-eval/jamp", tmp_path, Form())


def test_wrong_names_are_refused(data, tmp_path):
    with pytest.raises(ValueError, match="llm-jp-eval/jamb: unknown; llm-jp-eval's data sets are jcommonsenseqa, jamp"):
        load_tasks("llm-jp-eval/jamb", data, Form())
    with pytest.raises(ValueError, match="name their folder, --data FOLDER"):
        load_tasks("llm-jp-eval", None, Form())
    (tmp_path / "template.txt").write_text("{instruction} {input}", encoding="utf-8")
    with pytest.raises(ValueError, match=r"the template lacks \{examples\}"):
        read_template(tmp_path / "template.txt")
