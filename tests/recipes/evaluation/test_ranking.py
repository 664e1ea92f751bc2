"""Rankings equal choix's without draws, recover Davidson's parameters, and their intervals cover the truth."""

import json

import numpy as np
import pytest

choix = pytest.importorskip("choix", reason="choix comes with the extra eval")

from recipes.evaluation.ranking import DRAW, LEFT, Votes, bradley_terry, davidson, fittable  # noqa: E402
from recipes.evaluation.votes import lines, read_votes, report  # noqa: E402
from recipes.preference import main  # noqa: E402


def simulated(seed, votes=1000, models=5, prompts=60, raters=15, nu=0.0, side=0.0):
    """Votes of models with scores from -1 to 1."""
    random = np.random.default_rng(seed)
    scores = np.linspace(-1, 1, models)
    left = random.integers(models, size=votes)
    right = (left + random.integers(1, models, size=votes)) % models
    one, other = scores[left] + side, scores[right]
    weights = np.stack([np.exp(one), np.exp(other), nu * np.exp((one + other) / 2)], axis=1)
    bounds = (weights / weights.sum(axis=1, keepdims=True)).cumsum(axis=1)
    outcome = (random.random(votes)[:, None] > bounds).sum(axis=1)
    clusters = random.integers(prompts, size=votes), random.integers(raters, size=votes)
    return scores, Votes([f"m{number}" for number in range(models)], left, right, outcome, *clusters)


def values(estimates):
    return np.array([estimate.value for estimate in estimates])


def records(votes):
    for left, right, outcome, prompt, rater in zip(
        votes.left, votes.right, votes.outcome, votes.prompt, votes.rater, strict=True
    ):
        yield {
            "prompt": f"p{prompt}",
            "left": votes.models[left],
            "right": votes.models[right],
            "winner": ("left", "right", "tie")[outcome],
            "rater": f"r{rater}",
        }


def written(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def vote(left, right, winner, **more):
    return {"prompt": "p", "left": left, "right": right, "winner": winner, "rater": "r", **more}


def test_without_draws_scores_equal_choix(tmp_path):
    _, votes = simulated(1, votes=400)
    pairs = [
        (left, right) if outcome == LEFT else (right, left)
        for left, right, outcome in zip(votes.left.tolist(), votes.right.tolist(), votes.outcome.tolist(), strict=True)
    ]
    expected = choix.ilsr_pairwise(5, pairs, alpha=0.0)
    out = tmp_path / "ranking.json"
    main(["rank", written(tmp_path / "votes.jsonl", records(votes)), "--json", str(out)])
    found = {row["model"]: row["score"] for row in json.loads(out.read_text())["models"]}
    assert [found[name] for name in votes.models] == pytest.approx(expected - expected.mean(), abs=1e-6)


def test_without_draws_and_side_newton_finds_the_same_maximum():
    _, votes = simulated(2)
    # Each vote once more with the sides changed: no side is better.
    flipped = np.where(votes.outcome == DRAW, DRAW, 1 - votes.outcome)
    both = Votes(
        votes.models,
        np.concatenate([votes.left, votes.right]),
        np.concatenate([votes.right, votes.left]),
        np.concatenate([votes.outcome, flipped]),
        np.tile(votes.prompt, 2),
        np.tile(votes.rater, 2),
    )
    fit = davidson(both)
    assert values(fit.scores) == pytest.approx(values(bradley_terry(both).scores), abs=1e-7)
    assert fit.side.value == pytest.approx(0, abs=1e-9)
    assert fit.draw is None


@pytest.mark.parametrize(("nu", "side"), [(0.0, 0.0), (0.7, 0.25)])
def test_intervals_cover_the_truth_in_500_simulations(nu, side):
    covered = []
    parameters = []
    for seed in range(500):
        scores, votes = simulated(seed, nu=nu, side=side)
        fit = davidson(votes) if nu else bradley_terry(votes)
        covered += [each.low <= true <= each.high for each, true in zip(fit.scores, scores, strict=True)]
        parameters.append((fit.draw.value, fit.side.value) if nu else (0, 0))
    assert 0.93 <= np.mean(covered) <= 0.97
    if nu:
        assert np.mean(parameters, axis=0) == pytest.approx([np.log(nu), side], abs=0.02)


def test_davidsons_maximum_is_the_one_that_a_general_optimizer_finds():
    optimize = pytest.importorskip("scipy.optimize")
    _, votes = simulated(4, votes=300, models=4, nu=0.5, side=-0.3)

    def loss(free):
        scores, draw, side = np.append(free[:3], -free[:3].sum()), free[3], free[4]
        one, other = scores[votes.left] + side, scores[votes.right]
        logits = np.stack([one, other, draw + (one + other) / 2], axis=1)
        chosen = logits[np.arange(len(logits)), votes.outcome]
        return np.sum(np.log(np.exp(logits).sum(axis=1)) - chosen)

    expected = optimize.minimize(loss, np.zeros(5), method="BFGS", options={"gtol": 1e-9}).x
    fit = davidson(votes)
    found = [*values(fit.scores)[:3], fit.draw.value, fit.side.value]
    assert found == pytest.approx(expected, abs=1e-5)


def test_votes_of_one_prompt_widen_the_intervals():
    _, votes = simulated(5, votes=200, prompts=200, raters=1)
    repeated = Votes(
        votes.models,
        *(np.tile(each, 9) for each in (votes.left, votes.right, votes.outcome)),
        np.tile(votes.prompt, 9),
        np.zeros(1800, int),
    )
    alone = Votes(repeated.models, repeated.left, repeated.right, repeated.outcome, np.arange(1800), repeated.rater)
    once, clustered, independent = (bradley_terry(each).scores[0] for each in (votes, repeated, alone))
    assert clustered.high - clustered.low == pytest.approx(once.high - once.low, rel=1e-6)
    assert independent.high - independent.low < 0.5 * (once.high - once.low)


def test_rank_intervals_tell_distant_models_apart_and_not_equal_ones():
    _, votes = simulated(6, votes=4000, models=3)
    assert bradley_terry(votes).ranks == [(3, 3), (2, 2), (1, 1)]
    _, few = simulated(6, votes=30, models=3)
    assert any(low < high for low, high in bradley_terry(few).ranks)


def test_models_that_cannot_be_ranked_are_named(tmp_path, capsys):
    cycle = [vote("a", "b", "left"), vote("b", "c", "left"), vote("c", "a", "left"), vote("a", "c", "tie")]
    rows = [
        *cycle,
        vote("best", "a", "left"),
        vote("b", "worst", "left"),
        vote("x", "y", "left"),
        vote("y", "x", "left"),
        vote("drawn", "a", "tie"),
        vote("b", "mid", "left"),
        vote("mid", "worst", "left"),
    ]
    out = tmp_path / "ranking.json"
    main(["rank", written(tmp_path / "votes.jsonl", rows), "--json", str(out)])
    found = json.loads(out.read_text())
    assert sorted(row["model"] for row in found["models"]) == ["a", "b", "c"]
    reasons = {row["model"]: row["reason"] for row in found["unranked"]}
    assert reasons["best"] == "never loses"
    assert reasons["worst"] == "never wins"
    assert reasons["drawn"] == "has no decided vote"
    assert reasons["x"] == reasons["y"] == "was never compared with the ranked models, nor through others"
    assert reasons["mid"] == "no chain of wins and losses leads both to the ranked models and back"
    assert "not ranked: best never loses (1 won, 0 lost, 0 drawn)" in capsys.readouterr().out
    counts = {row["model"]: (row["wins"], row["losses"], row["draws"]) for row in found["models"]}
    assert counts == {"a": (1, 2, 2), "b": (3, 1, 0), "c": (1, 1, 1)}


def test_votes_without_any_cycle_are_reported_without_scores(tmp_path):
    votes = read_votes(written(tmp_path / "v.jsonl", [vote("a", "b", "left"), vote("a", "b", "tie")]))
    found = report(votes)
    assert found["models"] == []
    assert "nothing can be ranked yet" in lines(found)[-1]


def test_a_side_that_the_votes_do_not_tell_is_left_out():
    # a stood always left.
    votes = Votes(["a", "b"], np.zeros(10, int), np.ones(10, int), np.arange(10) % 2, np.arange(10), np.zeros(10, int))
    assert fittable(votes)[0] == [0, 1]
    assert davidson(votes).side is None


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ([], "empty"),
        ([{"left": "a"}], "v.jsonl:1: no text in the field 'right'"),
        ([vote("a", "b", "won")], "v.jsonl:1: winner = 'won': must be left, right or tie"),
        ([vote("a", "a", "tie")], "v.jsonl:1: the model 'a' stands on both sides"),
        ([[1]], "v.jsonl:1: not a vote"),
    ],
)
def test_what_is_no_vote_is_refused_by_one_line(tmp_path, rows, said):
    with pytest.raises(SystemExit) as ended:
        main(["rank", written(tmp_path / "v.jsonl", rows), "--json", str(tmp_path / "out.json")])
    assert said in str(ended.value)
    assert not (tmp_path / "out.json").exists()


def test_the_drawing_lies_beside_the_ranking_with_the_same_bytes_each_time(tmp_path):
    pytest.importorskip("matplotlib")
    path = written(tmp_path / "votes.jsonl", records(simulated(7, nu=0.3)[1]))
    for name in ("one", "two"):
        main(["rank", path, "--json", str(tmp_path / f"{name}.json")])
    assert (tmp_path / "one.svg").read_bytes() == (tmp_path / "two.svg").read_bytes()
    assert (tmp_path / "one.json").read_bytes() == (tmp_path / "two.json").read_bytes()
