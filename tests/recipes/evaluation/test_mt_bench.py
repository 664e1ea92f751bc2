"""MT-Bench's files and prompts, and the published Japanese judgments scored again."""

import gzip
import json
import random
import re

import numpy as np
import pytest

from recipes.evaluation.judge_prompts import NAMES, JudgePrompt, own_prompts, prompt_for, read_prompts, read_score
from recipes.evaluation.mt_bench import Judgment, read_answers, read_judgments, read_questions, read_rows, write_rows

pytest.importorskip("scipy", reason="scipy comes with the extra eval")

from recipes.evaluation.judge_scores import compare_models, of_legacy, pairs_of, score_models
from recipes.evaluation.statistics import bootstrap_mean


def write(path, rows) -> str:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    return str(path)


@pytest.fixture(scope="session")
def published(shared_data):
    return shared_data / "eval" / "jamtbench"


def test_the_published_judgments_give_the_published_scores(published):
    """The card's and the wiki's figures, and every other mean of the data's own list."""
    scores = {each.model: each for each in score_models(read_judgments(read_rows([str(published / "model_judgment")])), {})}
    expected = {
        "gpt-4": 9.40,
        "gpt-4-1106-preview": 9.17,
        "Qwen-72B-Chat": 7.97,
        "Qwen-14B-Chat": 7.47,
        "shisa-7b-v1-fullprompt": 5.233,
        "shisa-gamma-7b-v1": 6.117,
        "Xwin-LM-70B-V0.1-GPTQ": 6.617,
        "nekomata-14b-instruction-correctedprompt-hf": 5.567,
        "tokyotech-llm_Swallow-7b-instruct-hf": 4.206,
        "nekomata-14b-instruction": 1.192,
        "houou-instruction-7b-v1": 1.000,
    }
    for model, score in expected.items():
        assert round(scores[model].score, 3 if score * 100 % 1 else 2) == score
    assert len(scores) == 24
    assert (scores["Qwen-72B-Chat"].excluded, scores["Qwen-72B-Chat"].judged) == (1, 59)
    assert (scores["tokyotech-llm_Swallow-7b-instruct-hf"].again, scores["houou-instruction-7b-v1"].again) == (120, 43)
    interval = scores["shisa-7b-v1-fullprompt"].interval
    assert (interval.low, interval.high) == pytest.approx((4.50, 5.95), abs=0.1)
    # Only files that judged an answer twice can say how far the judge agrees with itself.
    judged_twice = {model for model, each in scores.items() if each.components.variances["judge"] is not None}
    assert judged_twice == {model for model, each in scores.items() if each.again}


def test_every_published_judgment_is_parsed_to_its_score(published):
    for each in read_judgments(read_rows([str(published / "model_judgment")])):
        assert read_score(each.row["judgment"]) == each.score


def test_files_of_fastchat_come_back_as_they_are(published, shared_data, tmp_path):
    for kind, names in (("model_answer", "gpt-4*"), ("model_answer", "shisa-7b*"), ("model_judgment/gpt-4_single", "*")):
        for path in sorted((published / kind).glob(names)):
            rows = [row for _, row in read_rows([str(path)])]
            write_rows(tmp_path / "written.jsonl", rows)
            theirs = gzip.decompress(path.read_bytes()).splitlines()
            ours = (tmp_path / "written.jsonl").read_bytes().splitlines()
            assert [json.loads(line) for line in ours] == [json.loads(line) for line in theirs]
            assert [list(json.loads(line)) for line in ours] == [list(json.loads(line)) for line in theirs]
    for name in ("mt_bench_en", "mt_bench_ja"):
        questions = read_questions(str(shared_data / "bench" / f"{name}.jsonl.gz"))
        assert len(questions) == 80
        assert all(len(question.turns) == 2 for question in questions)
    english = {question.id: question for question in read_questions(str(shared_data / "bench" / "mt_bench_en.jsonl.gz"))}
    assert len(english[101].references) == 2
    assert (english[81].temperature, english[101].temperature, english[141].temperature) == (0.7, 0.0, 0.1)
    answers = {answer.question: answer for answer in read_answers([str(published / "model_answer" / "gpt-4.jsonl.gz")])}
    assert [*answers[11].choices] == [0, 1, 2, 3]
    assert all(len(turns) == 2 for turns in answers[11].choices.values())


@pytest.mark.parametrize(
    ("text", "score"),
    [
        ("Rating: [[7]]", 7),
        ("評価：[[7.5]]", 7.5),
        ("Rating: [7]", 7),
        ("[1] is a list, and the rating is [[4]]", 4),
        ("評価：［［８］］", 8),
        ("評価：【【6】】", 6),
        ("[[Rating: 9]]", 9),
        ("[[評価：3]]", 3),
        ("[[8/10]]", 8),
        ("Rating: [[ 10 ]]", 10),
        ("[[rating]]: [[2]]", 2),
        ("Rating: [[0]]", 0),
        ("Rating: [[85]]", None),
        ("Rating: 7", None),
        ("[[評価]]", None),
        ("", None),
    ],
)
def test_scores_are_found_in_the_forms_that_judges_write(text, score):
    assert read_score(text) == score


@pytest.mark.parametrize("language", ["en", "ja"])
def test_our_prompts_hold_every_text_once_and_their_example_is_parsed(language):
    prompts = own_prompts(language)
    for (second, reference), name in NAMES.items():
        prompt = prompt_for(prompts, second=second, reference=reference, place="our own")
        assert prompt.name == f"komainu-{name}"
        turns = 2 if second else 1
        texts = {kind: [f"<{kind} {turn} {{answer}}>" for turn in range(1, turns + 1)] for kind in ("Q", "A", "R")}
        user = prompt.fill(texts["Q"], texts["A"], texts["R"] if reference else [])
        for kind in ("Q", "A", *(["R"] if reference else [])):
            # A text that spells a field stays as it is.
            assert all(user.count(text) == 1 for text in texts[kind])
        assert "<R" not in user or reference
        assert not re.search(r"\{(question|ref_answer)", user)
        assert read_score(user) == 7


def test_fastchats_prompts_are_read_from_its_file(published, tmp_path):
    file = str(published / "judge_ja_prompts.jsonl.gz")
    prompts = read_prompts(read_rows([file]))
    user = prompt_for(prompts, second=False, reference=True, place=file).fill(["問い"], ["答え"], ["正解"])
    assert "[参考回答の開始]\n正解\n[参考回答の終了]" in user
    with pytest.raises(ValueError, match=r"has no judge prompt 'single-v1-multi-turn' .*judge the first turn alone"):
        prompt_for(prompts, second=True, reference=False, place=file)
    with pytest.raises(ValueError, match=r"prompts.jsonl:1: a judge prompt needs the texts name, system_prompt"):
        read_prompts(read_rows([write(tmp_path / "prompts.jsonl", [{"name": "single-v1"}])]))
    with pytest.raises(ValueError, match=r"has the field {ref_answer_1}, and there is no text for it"):
        JudgePrompt("p", "", "{ref_answer_1}").fill(["q"], ["a"], [])


JUDGMENT = {"question_id": 1, "model": "m", "judge": ["gpt-4", "single-v1"], "judgment": "", "score": 5, "turn": 1}


@pytest.mark.parametrize(
    ("read", "row", "message"),
    [
        (read_judgments, {**JUDGMENT, "model_1": "a", "g1_winner": "tie"}, "compares two models; name files of single answers"),
        (read_judgments, {**JUDGMENT, "score": "5"}, "score = '5': must be a number, -1 for none"),
        (read_judgments, {**JUDGMENT, "turn": 0}, "turn = 0, choice = 0: must be whole numbers"),
        (read_judgments, {"question_id": 1}, "not a judgment: it needs model, judge, score and turn"),
        (read_judgments, {**JUDGMENT, "question_id": None}, "question_id = None: must be a number or a text"),
        (read_answers, {"question_id": 1, "model_id": "m"}, "not a model's answer: it needs model_id and a list of choices"),
        (read_answers, {"question_id": 1, "model_id": "m", "choices": [{"turns": [1]}]}, "turns must be a list of texts"),
        (read_questions, {"question_id": 1, "category": "math"}, "turns must be a list of texts, one for each turn"),
        (read_questions, {"question_id": 1, "turns": ["a"] * 3}, "question 1 has 3 turns"),
    ],
)
def test_a_wrong_row_is_named_by_its_line(tmp_path, read, row, message):
    path = write(tmp_path / "rows.jsonl", [row])
    with pytest.raises(ValueError, match=rf"rows.jsonl:1: {re.escape(message)}"):
        read(path if read is read_questions else read_rows([path]) if read is read_judgments else [path])


def test_scores_that_are_none_are_left_out_and_a_judge_may_be_a_name_alone(tmp_path):
    rows = [
        JUDGMENT,
        {**JUDGMENT, "score": -1},
        {**JUDGMENT, "score": None, "judge": "gpt-4"},
        {**JUDGMENT, "score": 6.5, "turn": 2},
    ]
    [score] = score_models(read_judgments(read_rows([write(tmp_path / "j.jsonl", rows)])), {1: "math"})
    assert (score.score, score.turns, score.judged, score.excluded) == (5.75, {1: 5.0, 2: 6.5}, 2, 2)
    assert score.categories == {"math": 5.75}


def test_scores_by_other_prompts_are_another_scale(tmp_path):
    rows = [JUDGMENT, {**JUDGMENT, "judge": ["gpt-4", "komainu-single-v1"], "score": 9}]
    scores = score_models(read_judgments(read_rows([write(tmp_path / "j.jsonl", rows)])), {})
    assert [(each.judge, each.score) for each in scores] == [("gpt-4 with our prompts", 9), ("gpt-4", 5)]


def judged(random: np.random.Generator, model: str, questions, deviations, *, choices=2, turns=2, repeats=2) -> list[Judgment]:
    """Judgments of a model whose true mean is 5, with a deviation of each level."""
    rows = []
    for question, difficulty in questions:
        for turn in range(1, turns + 1):
            for choice in range(choices):
                answer = 5 + difficulty + random.normal(0, deviations[0])
                for _ in range(repeats):
                    score = answer + random.normal(0, deviations[1])
                    rows.append(Judgment(question, model, "judge", "p", turn, choice, score, {}))
    return rows


def test_intervals_over_questions_cover_the_true_mean_and_agree_with_the_components():
    random, covered, widths, errors = np.random.default_rng(3), 0, [], []
    for _ in range(100):
        questions = [(number, random.normal(0, 1.5)) for number in range(40)]
        rows = judged(random, "m", questions, (1.0, 0.5))
        scores = [each.score for each in rows]
        interval = bootstrap_mean(scores, [each.question for each in rows], draws=500)
        covered += interval.low <= 5 <= interval.high
        widths.append((interval.high - interval.low) / 2)
        if len(errors) < 20:
            [score] = score_models(rows, {})
            errors.append(score.components.error)
    assert 0.9 <= covered / 100 <= 0.99
    # The analysis of variance, which draws nothing, finds the same standard error; 2.02 is the t quantile of 39 degrees.
    assert np.mean(widths[:20]) == pytest.approx(2.02 * np.mean(errors), rel=0.05)


def test_paired_differences_do_not_see_how_hard_questions_are():
    random = np.random.default_rng(4)
    questions = [(number, random.normal(0, 3.0)) for number in range(40)]
    first = judged(random, "first", questions, (0.5, 0.2))
    second = judged(random, "second", [(number, difficulty + 1) for number, difficulty in questions], (0.5, 0.2))
    [difference] = compare_models(first + second, [("first", "second")], "judge")
    assert difference.interval.low <= 1 <= difference.interval.high
    assert difference.interval.high - difference.interval.low < 0.4
    assert difference.p_value < 0.001
    assert difference.detectable < 0.5
    assert difference.questions == 40
    with pytest.raises(ValueError, match="first and other have no question in common that judge has scored"):
        compare_models(first, [("first", "other")], "judge")


def test_models_are_paired_with_the_baseline_or_all_where_they_are_few():
    assert pairs_of(["a", "b", "c"], "b", 6) == [("b", "a"), ("b", "c")]
    assert pairs_of(["best", "mid", "low"], None, 6) == [("low", "mid"), ("low", "best"), ("mid", "best")]
    assert pairs_of(list("abcdefg"), None, 6) == []


def test_legacy_takes_the_first_choice_and_turn():
    rows = judged(np.random.default_rng(5), "m", [(1, 0.0), (2, 0.0)], (1, 1), choices=3)
    random.Random(0).shuffle(rows)
    assert {(each.turn, each.choice) for each in of_legacy(rows)} == {(1, 0)}
    assert len(of_legacy(rows)) == 4
