"""The rescorer reproduces published scores of llm-jp-eval, and its metrics agree with independent definitions."""

import gzip
import json
import random
import sys
from difflib import SequenceMatcher

import pytest

from recipes.evaluation.answer_scores import UNREADABLE, char_f1, exact_match, number, pearson, spearman
from recipes.evaluation.llm_jp import DATASETS, main


def dataset(model, name, pred, gold):
    group, metric = DATASETS[name]
    return {"model": model, "record": "dataset", "dataset": name, "group": group, "metric": metric, "pred": pred, "gold": gold}


def whole_log(model, pred="a", **changes):
    return [{**dataset(model, name, [pred, pred], ["a", "b"]), **changes} for name in DATASETS]


def rescored(tmp_path, records, *options, name="logs.jsonl"):
    """The lines of JSON, by model."""
    path, out = tmp_path / name, tmp_path / "scores.jsonl"
    text = "".join(json.dumps(record) + "\n" for record in records).encode()
    path.write_bytes(gzip.compress(text) if name.endswith(".gz") else text)
    main(["--rescore", str(path), "--json", str(out), *options])
    return {row.pop("model"): row for row in map(json.loads, out.read_text().splitlines())}


def refused(tmp_path, records):
    with pytest.raises(SystemExit) as ended:
        rescored(tmp_path, records)
    assert not (tmp_path / "scores.jsonl").exists()
    return str(ended.value)


def test_all_published_logs_are_rescored_to_four_digits(shared_data, tmp_path, capsys):
    pytest.importorskip("rapidfuzz")
    path, out = shared_data / "eval" / "llmjp_logs.jsonl.gz", tmp_path / "scores.jsonl"
    main(["--rescore", str(path), "--json", str(out)])
    scores = [json.loads(line) for line in out.read_text().splitlines()]
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        published = {row["model"]: row["published"] for row in map(json.loads, lines) if row["record"] == "summary"}
    assert len(scores) == len(published) == 42
    for row in scores:
        assert {key: f"{value:.4f}" for key, value in row.items() if key != "model"} == published[row["model"]]
    # Each data set's own published score, and JSTS's two correlations, would be named here.
    assert "published" not in capsys.readouterr().out


def test_the_card_of_shisa_7b_is_reproduced_and_the_two_ratios_differ(shared_data, tmp_path):
    pytest.importorskip("rapidfuzz")
    path = shared_data / "eval" / "llmjp_logs.jsonl.gz"
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        log = [row for row in map(json.loads, lines) if row["model"] == "shisa-mega-dpo-7b-v1.1"]
    card = {"AVR": 0.7480, "MC": 0.8900, "NLI": 0.8040, "QA": 0.4153, "RC": 0.8825}
    own = log[0].pop("char_f1_ratio")
    against = "difflib" if own == "levenshtein" else "levenshtein"
    other = rescored(tmp_path, log, "--ratio", against)["shisa-mega-dpo-7b-v1.1"]
    # A log that names its ratio is scored with it, whatever the option says.
    log[0]["char_f1_ratio"] = own
    assert rescored(tmp_path, log, "--ratio", against) == {"shisa-mega-dpo-7b-v1.1": card}
    assert other["MC"] == card["MC"]
    assert other["QA"] != card["QA"]


def longest_common_subsequence(first, second):
    row = [0] * (len(second) + 1)
    for one in first:
        before = row
        row = [0]
        for place, other in enumerate(second):
            row.append(before[place] + 1 if one == other else max(row[-1], before[place + 1]))
    return row[-1]


def test_the_levenshtein_ratio_counts_the_longest_common_subsequence():
    pytest.importorskip("rapidfuzz")
    draw = random.Random(1)
    for _ in range(300):
        first, second = ("".join(draw.choices("東京大阪a", k=draw.randint(1, 12))) for _ in range(2))
        expected = round(100 * 2 * longest_common_subsequence(first, second) / (len(first) + len(second))) / 100
        assert char_f1([first], [second]) == expected
        assert char_f1([first], [second], "difflib") == round(100 * SequenceMatcher(None, first, second).ratio()) / 100


@pytest.mark.parametrize("ratio", ["levenshtein", "difflib"])
@pytest.mark.parametrize(
    ("prediction", "gold", "expected"),
    [
        ("b, A!", "a b", 1.0),  # words are sorted, case and signs do not count
        ("", "", 1.0),
        ("。", "", 1.0),
        ("", "東京", 0.0),
        ("café", "caf", 1.0),  # Latin-1's upper half is dropped
        ("東京都", "東京", 0.8),
        ("abcdefgh", "abcdefgi", 0.88),  # 0.875: a half goes to the even per cent
    ],
)
def test_char_f1_of_known_pairs(prediction, gold, expected, ratio):
    if ratio == "levenshtein":
        pytest.importorskip("rapidfuzz")
    assert char_f1([prediction], [gold], ratio) == expected


def test_numbers_of_answers_are_read_as_llm_jp_eval_reads_them():
    assert [number(answer) for answer in ("-1.", "6, 6", "3.5点", "", "一", "1.2.3")] == [1, 66, 3.5, *[UNREADABLE] * 3]


def test_correlations_equal_scipys():
    stats = pytest.importorskip("scipy.stats")
    draw = random.Random(2)
    for _ in range(20):
        first, second = ([draw.randint(0, 9) / 2 for _ in range(30)] for _ in range(2))
        texts = [str(value) for value in first], [str(value) for value in second]
        assert pearson(*texts) == pytest.approx(stats.pearsonr(first, second).statistic, abs=1e-12)
        assert spearman(*texts) == pytest.approx(stats.spearmanr(first, second).statistic, abs=1e-12)


@pytest.mark.parametrize("answers", [["2.0"] * 3, ["-", "", "?"], ["9" * 400, "1", "2"]])
def test_an_undefined_correlation_is_zero(answers):
    assert pearson(answers, ["0", "1", "2"]) == 0
    assert pearson(["1"], ["1"]) == 0


def test_exact_match_counts_equal_strings():
    assert exact_match(["a", "b ", "c"], ["a", "b", "C"]) == pytest.approx(1 / 3)


def test_missing_predictions_count_as_empty_answers_and_are_named(tmp_path, capsys):
    records = whole_log("m")
    records[0]["pred"] = ["a"]
    records[1]["pred"] = [None, "b"]
    scores = rescored(tmp_path, records, "--ratio", "difflib", name="logs.jsonl.gz")["m"]
    assert scores == {"AVR": 0.5, "MC": 0.5, "NLI": 0.5, "QA": 0.5, "RC": 0.5}
    said = capsys.readouterr().out
    assert "jcommonsenseqa: 1 of 2 predictions are missing" in said
    assert "jamp: 1 of 2 predictions are missing" in said


def test_an_absent_group_gives_no_average(tmp_path, capsys):
    records = [record for record in whole_log("m") if record["dataset"] not in ("jsquad", "jnli")]
    scores = rescored(tmp_path, records, "--ratio", "difflib")["m"]
    assert scores == {"AVR": None, "MC": 0.5, "NLI": 0.5, "QA": 0.5, "RC": None}
    said = capsys.readouterr().out
    assert "no data set of RC, so no AVR" in said
    assert "without jnli" in said


def test_a_data_set_of_a_later_version_is_left_out_and_named(tmp_path, capsys):
    later = {**dataset("m", "jnli", ["a"], ["a"]), "dataset": "wiki_coref", "group": "FA", "metric": "set_f1"}
    records = [{**record, "group": None, "metric": None, "published": {"bleu": "0.1"}} for record in whole_log("m")]
    assert rescored(tmp_path, [later, *records], "--ratio", "difflib")["m"] == {
        "AVR": 0.5,
        "MC": 0.5,
        "NLI": 0.5,
        "QA": 0.5,
        "RC": 0.5,
    }
    assert "wiki_coref left out: set_f1 is no metric of version 1" in capsys.readouterr().out


def test_a_score_that_differs_from_the_published_one_is_named(tmp_path, capsys):
    summary = {"model": "m", "record": "summary", "published": {"MC": "0.5000", "RC": "0.7500"}, "char_f1_ratio": "difflib"}
    rescored(tmp_path, [summary, *whole_log("m")])
    said = capsys.readouterr().out
    assert "RC 0.5000, published 0.7500" in said
    assert "MC 0.5000, published" not in said


@pytest.mark.parametrize(
    ("records", "said"),
    [
        ([["a"]], "logs.jsonl:1: not a log's record"),
        ([*whole_log("m"), dataset("m", "jnli", ["a"], ["a"])], "logs.jsonl:11: a second log of jnli for the model 'm'"),
        ([dataset("m", "jnli", ["a", "b"], ["a"])], "logs.jsonl:1: jnli: 2 predictions for 1 gold answers"),
        ([dataset("m", "jnli", [], [])], "gold must not be empty"),
        ([{**dataset("m", "jnli", ["a"], ["a"]), "metric": "bleu"}], "metric = 'bleu' of jnli: must be one of exact_match"),
        (
            [{"model": "m", "record": "summary", "char_f1_ratio": "jaro"}],
            "char_f1_ratio = 'jaro': must be levenshtein or difflib",
        ),
        ([{"model": "m", "record": "summary"}], "no data set of the model 'm'"),
        (
            [{"model": "m", "record": "summary", "published": 0.5}],
            "logs.jsonl:1: published = 0.5: must be an object of numbers",
        ),
        ([{"model": "m", "record": "summary", "published": {"MC": "n/a"}}], "must be an object of numbers"),
        ([dataset("m", "niilc", ["a"], [["a", "b"]])], 'logs.jsonl:1: an answer is ["a", "b"]: must be a text or a number'),
        ([], "empty"),
    ],
)
def test_a_file_that_holds_no_log_is_refused_by_one_line(tmp_path, records, said):
    message = refused(tmp_path, records)
    assert said in message
    assert "\n" not in message


def test_without_rapidfuzz_the_message_names_the_package_and_the_other_ratio(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "rapidfuzz.distance", None)
    message = refused(tmp_path, whole_log("m"))
    assert "rapidfuzz" in message
    assert "--ratio difflib" in message
