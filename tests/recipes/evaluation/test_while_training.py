"""Benchmark tasks at the evaluations of a run have the scores that `recipes.evaluate` gives the checkpoint."""

import json

import pytest

pytest.importorskip("lm_eval", reason="lm-evaluation-harness comes with the extra eval")
pytest.importorskip("rapidfuzz", reason="rapidfuzz comes with the extra eval")

from engine.observe.evaluating import Signs
from engine.run import open_run
from recipes import sft
from recipes.evaluate import EvaluateSettings
from recipes.evaluate import run as evaluate
from recipes.evaluation.while_training import TaskScores, _Shares, _Stopped

LIMIT = 7


@pytest.fixture
def asked(small_tasks):
    """The section `evaluate` that asks the small tasks."""
    return {"tasks": [str(small_tasks / f"{name}.yaml") for name in ("choice", "answer")], "task_limit": LIMIT}


def test_scores_are_those_of_the_command(tiny_settings, small_tasks, asked, tmp_path, capsys):
    last = sft.run(tiny_settings("sft", tmp_path / "run", heldout=[], evaluate=asked))
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    found = {line["step"]: line for line in lines if any(name.startswith("scores/") for name in line)}
    assert found.keys() == {0, 6}
    assert "scores  choice/acc 0." in capsys.readouterr().out
    for step, model in ((0, tiny_settings("sft", tmp_path).model), (6, str(last))):
        tasks = tuple(asked["tasks"])
        evaluate(EvaluateSettings(model=model, tasks=tasks, out=str(tmp_path / f"{step}"), limit=LIMIT, device="cpu"))
        results = json.loads((tmp_path / f"{step}" / "results.json").read_text())["results"]
        expected = {
            f"scores/{task}/{metric}": results[task][f"{metric},none"]
            for task, metrics in (("choice", ("acc", "acc_norm")), ("answer", ("exact_match", "char_f1")))
            for metric in metrics
        }
        assert found[step] == {"step": step, **expected}


def test_unknown_tasks_and_absent_data_are_refused_at_a_dry_run_too(tiny_settings, small_tasks, tmp_path):
    for dry_run in (False, True):
        for given, said in [
            ({"tasks": ["jcommonsenseqaa.yaml"]}, "no such task file; did you mean jcommonsenseqa.yaml"),
            ({"tasks": [str(small_tasks / "choice.yaml")], "task_data": str(tmp_path)}, "no file choice.jsonl in"),
        ]:
            with pytest.raises((ValueError, FileNotFoundError), match=said):
                sft.run(tiny_settings("sft", tmp_path / "run", evaluate=given, dry_run=dry_run))
    assert not (tmp_path / "run").exists()


def test_a_signal_or_a_diverged_model_ends_the_scoring_and_not_the_run(tiny_settings, asked, tmp_path):
    run = open_run(tiny_settings("sft", tmp_path / "run", evaluate=asked), ("conversations",))
    scores, model, said = TaskScores(run), run.load_model().eval(), []
    answers = iter([False, True])
    assert scores(model, Signs(lambda: None, lambda: next(answers), said.append)) is None
    model.requires_grad_(False).norm.weight.fill_(float("nan"))
    assert scores(model, Signs(lambda: None, lambda: False, said.append)) == {}
    (line,) = said
    assert line.startswith("no scores: the model gives scores that are not finite")


class _Gathering:
    """A rank of two: it gathers what the other has put there."""

    def __init__(self, rank: int, others: list):
        self.rank, self.ranks, self.others = rank, 2, others

    def gather(self, mine: list) -> list:
        return [*mine, *self.others.pop(0)]


def test_ranks_share_the_packs_and_ask_for_a_stop_equally_often():
    asked = []
    signs = Signs(lambda: None, lambda: asked.append(1) or False, lambda text: None)
    plan = [[], ["a", 1]]
    for rank, own, theirs in [(0, [0, 2, 4], [1, 3]), (1, [1, 3], [0, 2, 4])]:
        asked.clear()
        shares = _Shares(_Gathering(rank, [[], [(pack, [f"pack {pack}"]) for pack in theirs]]), signs)
        done = shares.plan("kind", plan, packs=5)
        assert sorted(done) == theirs
        for pack in own:
            shares.add("kind", pack, [f"pack {pack}"])
        assert [*shares.results("kind")] == [f"pack {pack}" for pack in range(5)]
        assert len(asked) == 3


def test_a_rank_that_fails_tells_the_others():
    asked = []
    signs = Signs(lambda: None, lambda: asked.append(1) or False, lambda text: None)
    waiting = _Shares(_Gathering(0, [[], [(-1, "broken")]]), signs)
    waiting.plan("kind", [], packs=3)
    waiting.add("kind", 0, ["ours"])
    with pytest.raises(ValueError, match="broken"):
        [*waiting.results("kind")]
    assert len(asked) == 2
    failing = _Shares(_Gathering(1, [[], [(0, ["theirs"])]]), signs)
    failing.plan("kind", [], packs=3)
    failing.fail(ValueError("broken"))
    assert len(asked) == 4
    # After a failure that all ranks have heard of, nobody waits any more.
    waiting.fail(ValueError("broken"))
    stopping = _Shares(_Gathering(1, [[]]), Signs(lambda: None, lambda: True, lambda text: None))
    stopping.plan("kind", [], packs=3)
    with pytest.raises(_Stopped):
        stopping.add("kind", 1, [])


def test_ranks_that_read_other_data_are_refused():
    shares = _Shares(_Gathering(0, [["another digest"]]), Signs(lambda: None, lambda: False, lambda text: None))
    with pytest.raises(ValueError, match="the ranks read different files of data"):
        shares.plan("kind", ["a"], packs=1)
