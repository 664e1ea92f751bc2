"""MT-Bench's three commands, before a server in this process that answers and judges."""

import json
import os
import re
import shutil
import signal
import zlib

import pytest

from engine.inference import endpoint
from recipes import mtbench
from recipes.evaluation.judge_prompts import own_prompts, read_score
from tests.engine.inference.servers import FakeServer, FaultProxy, in_a_child, wait_until

pytest.importorskip("scipy", reason="scipy comes with the extra eval")

QUESTIONS = [
    {"question_id": 1, "category": "writing", "turns": ["the cat sees", "and the dog"]},
    {"question_id": 2, "category": "math", "turns": ["two and two", "and three"], "reference": ["four", "seven"]},
    {"question_id": 3, "category": "reasoning", "turns": ["ねこ は", "いぬ は"]},
]


@pytest.fixture(autouse=True)
def _short_waits(monkeypatch):
    monkeypatch.setattr(endpoint, "FIRST_WAIT", 0.01)


@pytest.fixture
def bench(tmp_path):
    write_questions(tmp_path)
    return tmp_path


def write_questions(folder) -> None:
    (folder / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in QUESTIONS))


def call(part: str, bench, server, *options: str) -> None:
    common = ["--questions", f"{bench}/questions.jsonl", "--out", f"{bench}/out", "--url", server.url, "--timeout", "5"]
    mtbench.main([part, *common, *options])


def lines(path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def judging(body) -> str:
    """A score made from the prompt's text; prompts with an odd checksum have none at first."""
    user = body["messages"][-1]["content"]
    score = 1 + zlib.crc32(user.encode()) % 10
    return f"Rating: {score}" if score % 2 and body["temperature"] == 0 else f"Well. Rating: [[{score}]]"


def test_answers_hold_every_choice_and_turn_with_the_categories_temperatures(bench):
    with FakeServer() as server:
        call("answer", bench, server, "--model", "org/m", "--choices", "2", "--system", "Be brief.", "--seed", "5")
        rows = lines(bench / "out" / "model_answer" / "m.jsonl")
        asked = [body for body, *_ in server.log if body["messages"][0]["content"] == "Be brief."]
        first = {
            (body["messages"][1]["content"], body["temperature"], body["seed"]) for body in asked if len(body["messages"]) == 2
        }
        assert first == {
            (row["turns"][0], 0.7 if row["question_id"] == 1 else 0.0, seed) for row in QUESTIONS for seed in (5, 6)
        }
        for row, question in zip(rows, QUESTIONS, strict=True):
            assert (row["question_id"], row["model_id"]) == (question["question_id"], "m")
            assert [choice["index"] for choice in row["choices"]] == [0, 1]
            assert len(row["answer_id"]) == 22
            for choice in row["choices"]:
                roles = ("system", "user", "assistant", "user")
                texts = ("Be brief.", question["turns"][0], choice["turns"][0], question["turns"][1])
                conversation = [{"role": role, "content": text} for role, text in zip(roles, texts, strict=True)]
                assert any(body["messages"] == conversation for body in asked)
        # Again: nothing is asked, and the file has the same bytes.
        content, answered = (bench / "out" / "model_answer" / "m.jsonl").read_bytes(), len(server.log)
        call("answer", bench, server, "--model", "org/m", "--choices", "2", "--system", "Be brief.", "--seed", "5")
        assert (bench / "out" / "model_answer" / "m.jsonl").read_bytes() == content
        assert len(server.log) == answered


def test_answers_of_another_program_are_not_overwritten(bench):
    file = bench / "out" / "model_answer" / "m.jsonl"
    file.parent.mkdir(parents=True)
    file.write_text("{}\n")
    with (
        FakeServer() as server,
        pytest.raises(SystemExit, match=r"m.jsonl: exists, and another program wrote it; choose another"),
    ):
        call("answer", bench, server, "--model", "m")
    assert file.read_text() == "{}\n"


def test_a_folder_answers_without_an_endpoint(bench, tiny_model):
    out = str(bench / "out")
    common = ["--questions", f"{bench}/questions.jsonl", "--out", out, "--device", "cpu"]
    mtbench.main(["answer", *common, "--model", str(tiny_model), "--name", "tiny", "--choices", "2", "--max-tokens", "5"])
    rows = lines(bench / "out" / "model_answer" / "tiny.jsonl")
    assert [len(row["choices"]) for row in rows] == [2, 2, 2]
    drawn, greedy = ([choice["turns"] for choice in row["choices"]] for row in rows[:2])
    assert drawn[0] != drawn[1]
    assert greedy[0] == greedy[1]


@pytest.fixture(scope="module")
def two_models(tmp_path_factory):
    """The answers of the models a and b."""
    folder = tmp_path_factory.mktemp("answered")
    write_questions(folder)
    with FakeServer() as server:
        for model in ("a", "b"):
            call("answer", folder, server, "--model", model, "--choices", "2", "--no-probe")
    return folder


@pytest.fixture
def answered(two_models, tmp_path):
    return shutil.copytree(two_models, tmp_path / "bench")


def test_all_choices_and_both_turns_are_judged_and_texts_without_a_score_again(answered, capsys):
    with FakeServer(answer=judging) as server:
        call("judge", answered, server, "--model", "some/judge", "--no-probe")
        rows = lines(answered / "out" / "model_judgment" / "judge_single.jsonl")
        assert {(row["question_id"], row["model"], row["choice"], row["turn"]) for row in rows} == {
            (question, model, choice, turn) for question in (1, 2, 3) for model in "ab" for choice in (0, 1) for turn in (1, 2)
        }
        assert len(rows) == 24
        for row in rows:
            expected = 1 + zlib.crc32(row["user_prompt"].encode()) % 10
            assert row["score"] == expected == read_score(row["judgment"])
            name = "math" if row["question_id"] == 2 else "v1"
            assert name in row["judge"][1]
            assert ("multi-turn" in row["judge"][1]) == (row["turn"] == 2)
            assert ("four" in row["user_prompt"]) == (row["question_id"] == 2)
        assert any(body["temperature"] > 0 for body, *_ in server.log)
        output = capsys.readouterr().out
        assert "1 questions of math, reasoning, coding have no reference answer" in output
        # Nothing is judged twice, also where the journal is gone.
        judged = len(server.log)
        for path in (answered / "out" / "journal").iterdir():
            path.unlink()
        call("judge", answered, server, "--model", "some/judge", "--no-probe")
        assert len(server.log) == judged
        assert lines(answered / "out" / "model_judgment" / "judge_single.jsonl") == rows


def test_legacy_judges_the_first_choice_and_turn_and_a_later_run_adds_the_others(answered):
    with FakeServer(answer=judging) as server:
        call("judge", answered, server, "--model", "judge", "--no-probe", "--legacy")
        file = answered / "out" / "model_judgment" / "judge_single.jsonl"
        first = lines(file)
        assert {(row["choice"], row["turn"]) for row in first} == {(0, 1)}
        assert len(first) == 6
        call("judge", answered, server, "--model", "judge", "--no-probe", "--judgments", "2")
        both = lines(file)
        assert both[:6] == first
        assert len(both) == 48


def test_a_file_of_fastchat_goes_on_and_keeps_what_is_not_ours(answered):
    """A row of FastChat's has no choice, and perhaps no prompt; other models and judgments of two stay untouched."""
    file = answered / "out" / "model_judgment" / "judge_single.jsonl"
    file.parent.mkdir(parents=True)
    theirs = {
        "question_id": 1,
        "model": "a",
        "judge": ["judge", "single-v1"],
        "user_prompt": "",
        "judgment": "[[3]]",
        "score": 3,
    }
    rows = [
        {**theirs, "turn": 1, "tstamp": 1.5, "extra": {"kept": [1.0]}},
        {**theirs, "turn": 1, "model": "other", "tstamp": 2},
        {**theirs, "turn": 2, "score": -1, "tstamp": 3},
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    names = [name.removeprefix("komainu-") for name in own_prompts("en")]
    prompts = [
        {"name": name, "system_prompt": "", "prompt_template": own_prompts("en")[f"komainu-{name}"].template} for name in names
    ]
    (answered / "prompts.jsonl").write_text("".join(json.dumps(prompt) + "\n" for prompt in prompts))
    with FakeServer(answer=judging) as server:
        with pytest.raises(
            SystemExit, match="judge has judged answers of a with the prompt 'single-v1' already; this run would use"
        ):
            call("judge", answered, server, "--model", "judge", "--no-probe", "--legacy")
        options = ["--model", "judge", "--no-probe", "--prompts", f"{answered}/prompts.jsonl"]
        call("judge", answered, server, *options, "--legacy")
        assert lines(file)[:3] == rows
        call("judge", answered, server, *options)
    written = lines(file)
    # What had no score is judged again, and takes its place.
    assert written[:2] == rows[:2]
    assert rows[2] not in written
    assert len(written) == 2 + 23


def test_a_judgment_of_another_answer_than_now_is_replaced(answered, capsys):
    with FakeServer(answer=judging) as server:
        call("judge", answered, server, "--model", "judge", "--no-probe", "--legacy")
        path = answered / "out" / "model_answer" / "a.jsonl"
        rows = lines(path)
        rows[0]["choices"][0]["turns"][0] = "something else"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        call("judge", answered, server, "--model", "judge", "--no-probe", "--legacy")
    assert "1 new judgments, 5 were there, 1 without a score or of other answers are replaced" in capsys.readouterr().out
    judgments = lines(answered / "out" / "model_judgment" / "judge_single.jsonl")
    assert len(judgments) == 6
    assert sum("something else" in row["user_prompt"] for row in judgments) == 1


def test_judgments_that_never_have_a_score_are_excluded_and_counted(answered, capsys):
    with FakeServer(
        answer=lambda body: "I cannot say." if "cat sees" in body["messages"][-1]["content"] else "[[8]]"
    ) as server:
        call("judge", answered, server, "--model", "judge", "--no-probe")
        assert "8 judgments have no score after 3 tries" in capsys.readouterr().out
        assert sum("cat sees" in body["messages"][-1]["content"] for body, *_ in server.log) == 3 * 8
    mtbench.main(["show", "--judgments", f"{answered}/out/model_judgment", "--json", f"{answered}/scores.jsonl"])
    scores = lines(answered / "scores.jsonl")
    assert [(row["model"], row["score"], row["judged"], row["excluded"]) for row in scores[:2]] == [
        ("a", 8, 8, 4),
        ("b", 8, 8, 4),
    ]


def test_scores_are_shown_with_their_spread_and_paired_differences(answered, capsys):
    with FakeServer(answer=judging) as server:
        call("judge", answered, server, "--model", "judge", "--no-probe", "--judgments", "2")
    capsys.readouterr()
    questions = f"{answered}/questions.jsonl"
    options = ["--judgments", f"{answered}/out/model_judgment", "--questions", questions, "--json", f"{answered}/scores.jsonl"]
    mtbench.main(["show", *options])
    shown = capsys.readouterr().out
    rows = lines(answered / "scores.jsonl")
    judgments = lines(answered / "out" / "model_judgment" / "judge_single.jsonl")
    for row in rows[:2]:
        mine = [each["score"] for each in judgments if each["model"] == row["model"]]
        assert row["score"] == pytest.approx(sum(mine) / len(mine))
        assert re.search(rf"{row['model']} +{row['score']:.3f}  95 % \[", shown)
        assert set(row["categories"]) == {"writing", "math", "reasoning"}
        assert set(row["turns"]) == {"1", "2"}
        assert row["components"]["variances"]["judge"] == pytest.approx(0)
    assert rows[2]["mean"] == pytest.approx(abs(rows[0]["score"] - rows[1]["score"]))
    assert "p = " in shown
    (answered / "out" / "model_judgment" / "judge_pair.jsonl").write_text('{"question_id": 1, "g1_winner": "tie"}\n')
    mtbench.main(["show", *options])
    assert capsys.readouterr().out == "1 comparisons of two models are left out\n" + shown
    with pytest.raises(SystemExit, match=r"error: baseline 'c': has no score; these have: a, b"):
        mtbench.main(["show", *options, "--baseline", "c"])


def test_a_killed_run_ends_in_the_same_bytes(bench, tmp_path):
    def answer(url: str, out) -> None:
        options = ["--questions", f"{bench}/questions.jsonl", "--out", str(out), "--url", url, "--model", "m", "--no-probe"]
        mtbench.main(["answer", *options, "--choices", "5", "--timeout", "2", "--temperature", "0"])

    written = []
    with FakeServer(delay=0.01) as server, FaultProxy(server.url, share=0.3, kinds=("429", "500", "cut")) as proxy:
        answer(server.url, tmp_path / "whole")
        for kills in range(1, 4):
            before = proxy.passed
            child = in_a_child(lambda: answer(proxy.url, tmp_path / "killed"))
            wait_until(lambda before=before, kills=kills: proxy.passed >= before + 2 * kills)
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
        answer(proxy.url, tmp_path / "killed")
    for name in ("whole", "killed"):
        rows = lines(tmp_path / name / "model_answer" / "m.jsonl")
        # The time of the first run, and what is made from it, are each run's own.
        written.append([{key: row[key] for key in row if key not in ("tstamp", "answer_id")} for row in rows])
    assert written[0] == written[1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["answer", "--model", "m", "--questions", "no.jsonl"], "error: no.jsonl: no such file"),
        (["answer", "--model", "no-folder", "--url", ""], "error: no-folder: no such folder"),
        (["judge", "--model", "m"], "no such file or folder"),
        (["answer", "--model", "m", "--url", "http://127.0.0.1:9/v1"], "error: http://127.0.0.1:9/v1: cannot be reached"),
        (["show", "--judgments", "empty.jsonl"], "error: empty.jsonl: empty"),
    ],
)
def test_a_missing_file_or_endpoint_is_one_clear_line(bench, monkeypatch, options, message):
    monkeypatch.chdir(bench)
    (bench / "empty.jsonl").write_text("")
    common = (
        ["--questions", "questions.jsonl", "--out", "out", "--url", "http://127.0.0.1:9/v1"] if options[0] != "show" else []
    )
    given = [option for option in options if option.startswith("--")]
    kept = [part for name, value in zip(common[::2], common[1::2], strict=True) if name not in given for part in (name, value)]
    with pytest.raises(SystemExit, match=re.escape(message)):
        mtbench.main([*options, *kept])


def test_money_needs_prices(bench, capsys):
    with pytest.raises(SystemExit), FakeServer() as server:
        call("answer", bench, server, "--model", "m", "--max-cost", "1")
    assert "max_cost needs the prices of a million tokens" in " ".join(capsys.readouterr().err.replace("│", " ").split())
