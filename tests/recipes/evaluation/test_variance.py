"""Variance components: against the textbook's mean squares in balanced designs, and against simulations in all designs."""

import math

import numpy as np
import pytest

from recipes.evaluation.variance import components


def nested(random: np.random.Generator, sizes: list[list[int]], deviations: tuple[float, float, float]):
    """Scores of questions whose answers have sizes[question] judgments each; and their levels."""
    scores, questions, answers = [], [], []
    for question, judged in enumerate(sizes):
        of_question = random.normal(0, deviations[0])
        for answer, count in enumerate(judged):
            of_answer = of_question + random.normal(0, deviations[1])
            scores += list(of_answer + random.normal(0, deviations[2], size=count))
            questions += [question] * count
            answers += [answer] * count
    return np.array(scores), {"question": questions, "answer": answers, "judge": range(len(scores))}


def test_balanced_designs_have_the_components_of_the_mean_squares():
    scores, levels = nested(np.random.default_rng(0), [[3] * 4] * 12, (2.0, 1.5, 0.7))
    cells = scores.reshape(12, 4, 3)
    answers, questions = cells.mean(2), cells.mean((1, 2))
    judge = ((cells - answers[..., None]) ** 2).sum() / (12 * 4 * 2)
    answer = 3 * ((answers - questions[:, None]) ** 2).sum() / (12 * 3)
    question = 12 * ((questions - scores.mean()) ** 2).sum() / 11
    found = components(scores, levels)
    expected = {"question": (question - answer) / 12, "answer": (answer - judge) / 3, "judge": judge}
    assert found.variances == pytest.approx(expected, rel=1e-12)
    # The mean of a balanced design varies as the means of its questions do.
    assert found.error == pytest.approx(math.sqrt(questions.var(ddof=1) / 12), rel=1e-12)


@pytest.mark.parametrize("sizes", [[[2, 2, 2]] * 15, [[1, 3], [2], [1, 1, 1, 4], [2, 2], [5, 1]] * 4])
def test_the_mean_estimate_is_the_true_component(sizes):
    """Also in unbalanced designs; negative estimates, which are set to 0, are rare here."""
    random, true = np.random.default_rng(1), (2.0, 1.0, 0.8)
    found = [list(components(*nested(random, sizes, true)).variances.values()) for _ in range(400)]
    error = np.std(found, axis=0) / math.sqrt(len(found))
    assert np.abs(np.mean(found, axis=0) - np.square(true)) == pytest.approx(0, abs=float(4 * error.max()))
    assert (error < 0.12).all()


def test_the_standard_error_is_the_spread_of_means_over_new_draws():
    random, sizes = np.random.default_rng(2), [[1, 2], [3], [1, 1, 1], [2, 2]] * 6
    drawn = [nested(random, sizes, (1.5, 1.0, 0.5)) for _ in range(300)]
    spread = np.std([scores.mean() for scores, _ in drawn])
    errors = [components(scores, levels).error for scores, levels in drawn]
    assert math.sqrt(np.mean(np.square(errors))) == pytest.approx(spread, rel=0.1)


def test_levels_that_are_not_repeated_stand_in_the_level_above():
    scores = [1.0, 4.0, 2.0, 8.0]
    once = components(scores, {"question": "abcd", "answer": "wxyz", "judge": range(4)})
    assert once.variances == {"question": pytest.approx(np.var(scores, ddof=1)), "answer": None, "judge": None}
    assert once.error == pytest.approx(np.std(scores, ddof=1) / 2)
    judged_twice = components(scores, {"question": "aabb", "answer": "xxxx", "judge": range(4)})
    assert judged_twice.variances["answer"] is None
    # Within: (1.5^2 * 2 + 3^2 * 2) / 2; between: 2 * (1.25^2 + 1.25^2) / 1, less than within.
    assert judged_twice.variances == {"question": 0.0, "answer": None, "judge": pytest.approx(11.25)}


def test_the_same_label_in_two_questions_is_two_answers():
    scores = [1.0, 2.0, 5.0, 6.0, 3.0, 3.5, 9.0, 9.5]
    levels = {"question": "aaaabbbb", "answer": "xxyyxxyy", "judge": range(8)}
    apart = {**levels, "answer": "kkllmmnn"}
    assert components(scores, levels).variances == components(scores, apart).variances


def test_one_score_says_nothing_of_its_spread_and_equal_scores_have_none():
    assert components([3.0], {"question": [1]}).error == math.inf
    assert components([3.0] * 4, {"question": [1, 2, 3, 4]}).error == 0
    with pytest.raises(ValueError, match=r"2 scores, and levels of \[3\]"):
        components([1.0, 2.0], {"question": [1, 2, 3]})
    with pytest.raises(ValueError, match="0 scores"):
        components([], {})
