"""`python -m recipes.evaluate` on small tasks: scores, files, comparisons, resumption and refusals."""

import dataclasses
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

pytest.importorskip("lm_eval", reason="lm-evaluation-harness comes with the extra eval")
pytest.importorskip("rapidfuzz", reason="rapidfuzz comes with the extra eval")

from lm_eval.api.group import Group
from lm_eval.api.instance import Instance
from lm_eval.tasks._index import Entry, Kind, TaskIndex

from engine.inference.scoring import Request, score
from model.mistral import initialize
from model.vocabulary.fitting import fitted_config
from model.vocabulary.tokenizer import Tokenizer
from model.weights import load_model, save_model
from recipes.evaluate import EvaluateSettings, run
from recipes.evaluation.benchmarks import LEADERBOARD, OFFICIAL, load_suite
from recipes.evaluation.harness import KomainuLM
from recipes.evaluation.ledger import Ledger

ROOT = Path(__file__).resolve().parents[3]
FILES = ("results.json", "report.md", "report.svg", "samples_choice.jsonl", "samples_letters.jsonl", "samples_answer.jsonl")


def settings_of(model: Path, folder: Path, out: Path, **changes) -> EvaluateSettings:
    """Packs so small that there are several."""
    given = {
        "model": str(model),
        "tasks": tuple(str(folder / f"{name}.yaml") for name in ("choice", "letters", "answer")),
        "out": str(out),
        "data": str(folder),
        "device": "cpu",
        "pack_tokens": 250,
        "rows": 1,
    }
    return EvaluateSettings(**{**given, **changes})


@pytest.fixture(scope="module")
def evaluated(tiny_model, small_tasks, tmp_path_factory) -> Path:
    return run(settings_of(tiny_model, small_tasks, tmp_path_factory.mktemp("evaluations") / "one"))


def results_of(folder: Path) -> dict:
    return json.loads((folder / "results.json").read_text(encoding="utf-8"))


def samples_of(folder: Path, task: str) -> list[dict]:
    return [json.loads(line) for line in (folder / f"samples_{task}.jsonl").read_text(encoding="utf-8").splitlines()]


def test_scores_follow_from_the_models_own_log_likelihoods(evaluated, tiny_model, small_tasks):
    """Letters: the examples are the first two of a subject, the letter's piece is the next token of the question."""
    tokenizer = Tokenizer.load(tiny_model)
    model = load_model(tiny_model, dtype=torch.float32, device=torch.device("cpu"), config=fitted_config(tiny_model, tokenizer))
    records = [json.loads(line) for line in (small_tasks / "choice.jsonl").read_text(encoding="utf-8").splitlines()]
    choices, right, samples = ("a", "the", "it"), [], samples_of(evaluated, "letters")
    asked = records[10:]
    assert [sample["doc"] for sample in samples] == asked, "the first two of each of the five subjects are examples"
    for record, sample in zip(asked, samples, strict=True):
        shots = [one for one in records[:10] if one["subject"] == record["subject"]]
        context = "".join(f"{one['question']} {choices[one['label']]}\n\n" for one in shots) + record["question"]
        context_ids = [tokenizer.bos_id, *tokenizer.encode(context)]
        wholes = [[tokenizer.bos_id, *tokenizer.encode(f"{context} {choice}")] for choice in choices]
        requests = [Request(context_ids, whole[len(context_ids) :]) for whole in wholes]
        expected = [result.log_likelihood for _, result in sorted(score(model, requests))]
        found = [float(response[0][0]) for response in sample["resps"]]
        assert found == pytest.approx(expected, abs=1e-4)
        right.append(max(range(3), key=lambda number: expected[number]) == record["label"])
    results = results_of(evaluated)
    assert results["results"]["letters"]["acc,none"] == pytest.approx(sum(right) / 30)
    assert results["n-shot"]["letters"] == 2


def test_the_report_has_intervals_and_counts(evaluated):
    results, report = results_of(evaluated), (evaluated / "report.md").read_text(encoding="utf-8")
    methods = {task: entry["method"] for task, found in results["intervals"].items() for entry in found.values()}
    assert methods == {"choice": "Wilson", "letters": "bootstrap by cluster", "answer": "bootstrap"}
    counts = results["counts"]
    assert counts["requests"] == 40 * 3 + 30 * 3 + 12
    assert counts["places"] < counts["places_alone"] / 3
    assert f"{counts['places']:,} places computed" in report
    assert "| **choice** | 2 | acc_norm |" in report
    assert "![Scores with their intervals](report.svg)" in report
    assert "date" not in results, "the same evaluation has the same bytes"


def test_answers_end_at_their_stop_text(evaluated, tiny_model):
    samples = samples_of(evaluated, "answer")
    assert len({sample["resps"][0][0] for sample in samples}) > 3
    assert all("dog" not in sample["resps"][0][0] for sample in samples)


@pytest.mark.parametrize("kept", [1, 3, 6])
def test_a_stopped_evaluation_goes_on_and_ends_with_the_same_bytes(evaluated, tiny_model, small_tasks, tmp_path, kept):
    lines = (evaluated / "journal.jsonl").read_bytes().splitlines(keepends=True)
    assert len(lines) > 8
    out = tmp_path / "again"
    out.mkdir()
    # Killed in the middle of a line.
    (out / "journal.jsonl").write_bytes(b"".join(lines[:kept]) + lines[kept][:20])
    run(settings_of(tiny_model, small_tasks, out))
    for name in FILES:
        assert (out / name).read_bytes() == (evaluated / name).read_bytes(), name
    assert sorted((out / "journal.jsonl").read_bytes().splitlines(keepends=True)) == sorted(lines)


def test_a_finished_evaluation_computes_nothing_again(evaluated, tiny_model, small_tasks, monkeypatch):
    monkeypatch.setattr("model.mistral.Mistral.forward", None)
    before = (evaluated / "journal.jsonl").read_bytes()
    run(settings_of(tiny_model, small_tasks, evaluated))
    assert (evaluated / "journal.jsonl").read_bytes() == before


@pytest.fixture(scope="module")
def other_model(tiny_model, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("other") / "model"
    shutil.copytree(tiny_model, folder)
    config = fitted_config(tiny_model, Tokenizer.load(tiny_model))
    model = load_model(tiny_model, dtype=torch.float32, device=torch.device("cpu"), config=config)
    initialize(model, 7)
    save_model(model, folder)
    return folder


def test_two_models_are_compared_on_the_same_items(evaluated, other_model, small_tasks, tmp_path):
    out = run(settings_of(other_model, small_tasks, tmp_path / "two", compare=str(evaluated)))
    found = {entry["name"]: entry for entry in results_of(out)["comparison"]["tasks"]}
    assert {name: entry["test"] for name, entry in found.items()} == {
        "choice": "exact McNemar",
        "letters": "sign flips by cluster",
        "answer": "sign flips",
    }
    ours, theirs = (samples_of(folder, "choice") for folder in (out, evaluated))
    gained = sum(one["acc_norm"] > two["acc_norm"] for one, two in zip(ours, theirs, strict=True))
    lost = sum(one["acc_norm"] < two["acc_norm"] for one, two in zip(ours, theirs, strict=True))
    tail = sum(math.comb(gained + lost, k) for k in range(min(gained, lost) + 1)) / 2 ** (gained + lost)
    assert found["choice"]["p_value"] == pytest.approx(min(1, 2 * tail))
    assert all(entry["adjusted"] >= entry["p_value"] for entry in found.values())
    assert "## Compared with" in (out / "report.md").read_text(encoding="utf-8")
    # Other items are not compared, and said so.
    few = run(settings_of(other_model, small_tasks, tmp_path / "few", compare=str(evaluated), limit=5))
    assert results_of(few)["comparison"]["tasks"] == []
    assert "Not compared, as the other evaluation lacks them or has other items" in (few / "report.md").read_text(
        encoding="utf-8"
    )


def test_a_chat_model_is_asked_through_its_template(tiny_model, small_tasks, tmp_path):
    chat = run(settings_of(tiny_model, small_tasks, tmp_path / "chat", chat=True, limit=4))
    plain = run(settings_of(tiny_model, small_tasks, tmp_path / "plain", limit=4))
    one, two = (samples_of(folder, "choice")[0]["resps"] for folder in (chat, plain))
    assert one != two
    assert "asked through the chat template" in (chat / "report.md").read_text(encoding="utf-8")


class Manager:
    """In place of the harness's: the leaderboard's names, each a small task; MMLU a group of two."""

    all_tasks = list(LEADERBOARD)  # noqa: RUF012
    folder: Path

    def load(self, names: list[str]) -> dict:
        (name,) = names
        subjects = [f"{name}_one", f"{name}_two"] if name == "mmlu" else [name]
        tasks = {}
        for subject in subjects:
            (tasks[subject],) = load_suite([str(self.folder / "choice.yaml")], self.folder).loaded["tasks"].values()
            tasks[subject].config.task = subject
        if name != "mmlu":
            return {"tasks": tasks, "groups": {}, "group_map": {}}
        metrics = [{"metric": "acc", "weight_by_size": True}]
        group = Group.from_config({"group": name, "task": subjects, "aggregate_metric_list": metrics})
        for task in tasks.values():
            group.add(task)
        return {"tasks": tasks, "groups": {name: group}, "group_map": {name: subjects}}


def test_the_leaderboard_has_the_model_cards_shots_and_metrics(tiny_model, small_tasks, tmp_path, monkeypatch):
    monkeypatch.setattr("recipes.evaluation.benchmarks.TaskManager", Manager)
    monkeypatch.setattr(Manager, "folder", small_tasks, raising=False)
    settings = settings_of(tiny_model, small_tasks, tmp_path / "board", tasks=("leaderboard",), limit=2)
    out = run(settings)
    results, report = results_of(out), (out / "report.md").read_text(encoding="utf-8")
    shots = {"arc_challenge": 25, "hellaswag": 10, "mmlu": 5, "truthfulqa_mc2": 0, "winogrande": 5, "gsm8k": 5}
    assert {name: results["n-shot"][name] for name in shots} == shots
    assert "| **arc_challenge** | 25 | acc_norm |" in report
    assert "| **hellaswag** | 10 | acc_norm |" in report
    assert "| **mmlu** | 5 | acc |" in report
    pooled = [sample["acc"] for task in ("mmlu_one", "mmlu_two") for sample in samples_of(out, task)]
    assert results["groups"]["mmlu"]["acc,none"] == pytest.approx(sum(pooled) / 4)
    assert results["intervals"]["mmlu"]["acc,none"]["method"].endswith("by cluster")


def test_the_installed_harness_defines_the_leaderboard_with_these_metrics():
    """Its own index and task files, which need no data. Shots are the model card's: the harness leaves most open."""
    index = TaskIndex.build(
        OFFICIAL / folder for folder in ("arc", "hellaswag", "mmlu/default", "truthfulqa", "winogrande", "gsm8k")
    )
    splits = ("test_split", "validation_split")
    for name, (shots, metric) in LEADERBOARD.items():
        entry = index[name]
        tasks = [entry] if entry.kind is Kind.TASK else [task for task in index.values() if task.tags & _tags_of(entry, index)]
        assert len(tasks) == (57 if name == "mmlu" else 1)
        for task in tasks:
            assert metric in [listed["metric"] for listed in task.cfg["metric_list"]]
            assert task.cfg.get("num_fewshot") in (None, shots)
            # Examples come from another split than questions, where there are any.
            asked = next(task.cfg[split] for split in splits if task.cfg.get(split))
            assert not shots or (task.cfg.get("fewshot_split") or task.cfg.get("training_split") or asked) != asked
    assert index["mmlu"].cfg["aggregate_metric_list"] == [{"metric": "acc", "weight_by_size": True}]


def _tags_of(group: Entry, index: dict[str, Entry]) -> set[str]:
    """The tags that MMLU's four groups gather their subjects by."""
    return {tag for part in group.cfg["task"] for tag in index[part].cfg["task"]}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tasks": ("nothing.yaml",)}, r"nothing\.yaml: no such task file; ours are .*hellaswag\.yaml"),
        ({"tasks": ("jmmlu.yaml",)}, r"task jmmlu: no file jmmlu_test\.jsonl in "),
        ({"seed": 3}, r"journal\.jsonl: belongs to an evaluation with another seed; name another --out"),
        ({"limit": 3}, "belongs to an evaluation of other tasks, or with another limit"),
        ({"compare": "nowhere"}, r"nowhere: holds no finished evaluation \(results\.json\)"),
    ],
)
def test_what_cannot_be_evaluated_is_named(evaluated, tiny_model, small_tasks, changes, message):
    before = {name: (evaluated / name).read_bytes() for name in FILES}
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        run(settings_of(tiny_model, small_tasks, evaluated, **changes))
    assert {name: (evaluated / name).read_bytes() for name in FILES} == before


def test_a_model_without_a_chat_template_is_named(tiny_model, small_tasks, tmp_path):
    bare = tmp_path / "bare"
    shutil.copytree(tiny_model, bare)
    (bare / "chat_template.jinja").unlink()
    config = json.loads((bare / "tokenizer_config.json").read_text())
    config.pop("chat_template", None)
    (bare / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"bare: has no chat template .*without --chat"):
        run(settings_of(bare, small_tasks, tmp_path / "out", chat=True))


def test_a_broken_record_and_a_broken_task_file_are_named(tiny_model, small_tasks, tmp_path):
    folder = tmp_path / "tasks"
    shutil.copytree(small_tasks, folder)
    settings = settings_of(tiny_model, folder, tmp_path / "out", tasks=(str(folder / "choice.yaml"),))
    (folder / "choice.yaml").write_text("task: [", encoding="utf-8")
    with pytest.raises(ValueError, match=r"choice\.yaml: not a task file"):
        run(settings)
    shutil.copy(small_tasks / "choice.yaml", folder)
    with (folder / "choice.jsonl").open("a") as file:
        file.write("{broken\n")
    with pytest.raises(ValueError, match=r"choice\.jsonl:41"):
        run(settings)
    records = (small_tasks / "choice.jsonl").read_text().splitlines(keepends=True)
    for number in (0, 6):
        record = json.loads(records[number])
        del record["question"]
        (folder / "choice.jsonl").write_text("".join([*records[:number], json.dumps(record) + "\n", *records[number + 1 :]]))
        with pytest.raises(ValueError, match=rf"choice\.jsonl:{number + 1}: not a record of .*: no field question"):
            run(settings)
    (folder / "choice.jsonl").write_text("[1, 2]\n")
    with pytest.raises(ValueError, match=r"choice\.jsonl:1: not a record of choice: must be an object"):
        run(settings)


def test_too_few_records_for_the_examples_are_named(tiny_model, small_tasks, tmp_path):
    folder = tmp_path / "tasks"
    shutil.copytree(small_tasks, folder)
    (folder / "answer.jsonl").write_text("".join((small_tasks / "answer.jsonl").read_text().splitlines(keepends=True)[:2]))
    text = (folder / "answer.yaml").read_text()
    (folder / "answer.yaml").write_text(f"{text}\nfewshot_split: test\nnum_fewshot: 2\n")
    with pytest.raises(ValueError, match=r"answer\.yaml: num_fewshot = 2: answer\.jsonl has 2 records to draw examples from"):
        run(settings_of(tiny_model, folder, tmp_path / "out", tasks=(str(folder / "answer.yaml"),)))


def test_a_long_text_is_scored_in_windows_and_each_token_once(tiny_model, tmp_path):
    """The harness's definition: the last window predicts what is left, after as many tokens as the model has positions for."""
    tokenizer = Tokenizer.load(tiny_model)
    model = load_model(tiny_model, dtype=torch.float32, device=torch.device("cpu"), config=fitted_config(tiny_model, tokenizer))
    texts = ["the cat sees a red dog", "it runs and the dog sees " * 70]
    with Ledger(tmp_path / "journal.jsonl", {}) as ledger:
        lm = KomainuLM(model, tokenizer, ledger, pack_tokens=200, rows=1)
        instances = [Instance("loglikelihood_rolling", {}, (text,), number) for number, text in enumerate(texts)]
        found = lm.loglikelihood_rolling(instances)
    short, long = (tokenizer.encode(text) for text in texts)
    assert len(long) > 3 * 128
    windows = [Request([tokenizer.bos_id], long[:128])]
    for start in range(128, len(long), 128):
        own = long[start : start + 128]
        before = long[start + len(own) - 129 : start]
        windows.append(Request(before, own))
    expected = [[Request([tokenizer.bos_id], short)], windows]
    for ours, requests in zip(found, expected, strict=True):
        alone = sum(result.log_likelihood for _, result in score(model, requests, pack_tokens=1))
        assert ours == pytest.approx(alone, abs=1e-3)


@pytest.mark.slow
def test_an_unknown_task_names_the_nearest_and_a_missing_data_set_says_so(tiny_model, small_tasks, tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    for tasks, message in (
        (("helaswag",), "task helaswag: unknown; did you mean hellaswag"),
        (("hellaswag",), r"task hellaswag: its data set could not be loaded .*--tasks hellaswag\.yaml --data FOLDER"),
    ):
        with pytest.raises(ValueError, match=message):
            run(settings_of(tiny_model, small_tasks, tmp_path / "out", tasks=tasks))


@pytest.mark.slow
def test_five_kills_change_no_byte_and_no_pack_is_done_twice(evaluated, tiny_model, small_tasks, tmp_path):
    out = tmp_path / "killed"
    settings = settings_of(tiny_model, small_tasks, out)
    options = dataclasses.asdict(settings)
    command = [sys.executable, "-m", "recipes.evaluate", "--tasks", *options.pop("tasks")]
    for name, value in options.items():
        command += [f"--{name}", str(value)] if value not in (None, False) else []
    journal, kills = out / "journal.jsonl", 0
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    total = len((evaluated / "journal.jsonl").read_bytes().splitlines())
    while True:
        lines = len(journal.read_bytes().splitlines()) if journal.exists() else 0
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        # A kill after one more line, each time, while there are lines to come.
        while process.poll() is None and kills < 5:
            if journal.exists() and len(journal.read_bytes().splitlines()) > lines:
                process.send_signal(signal.SIGKILL)
                kills += 1
                break
            time.sleep(0.001)
        if process.wait() == 0:
            break
    assert kills == 5
    for name in FILES:
        assert (out / name).read_bytes() == (evaluated / name).read_bytes(), name
    assert len(journal.read_bytes().splitlines()) == total
