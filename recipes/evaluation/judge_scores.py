"""Scores of judged answers: means with intervals, where their spread comes from, and models compared on the same questions.

A model's score is the mean over its judgments, as FastChat's. Questions are what a benchmark has drawn: the interval resamples
questions, and with each question all of its turns, choices and judgments; so ten answers to one question are not ten questions.
"""

from collections import Counter, defaultdict
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from statistics import mean
from typing import TypeVar

from recipes.evaluation.mt_bench import Judgment
from recipes.evaluation.statistics import Interval, bootstrap_mean, detectable_difference, holm, sign_flips
from recipes.evaluation.variance import Components, components

Name = TypeVar("Name", int, str)


@dataclass(frozen=True)
class ModelScore:
    """A model's scores by one judge.

    turns, categories: their means; categories only where the questions are known. judged: judgments with a score.
    excluded: judgments without one. again: judgments of an answer that was judged before. error: from the components.
    """

    model: str
    judge: str
    score: float
    interval: Interval
    turns: dict[int, float]
    categories: dict[str, float]
    questions: int
    judged: int
    excluded: int
    again: int
    components: Components


@dataclass(frozen=True)
class Difference:
    """Second model minus first, over the questions and turns that both have. detectable: the smallest true difference that a
    test at 5 % finds in 4 of 5 benchmarks of this size."""

    first: str
    second: str
    judge: str
    questions: int
    mean: float
    interval: Interval
    p_value: float
    adjusted: float
    detectable: float


def of_legacy(judgments: Sequence[Judgment]) -> list[Judgment]:
    """The judgments of first choices in first turns."""
    first: dict[tuple[object, ...], int] = {}
    for each in judgments:
        key = (each.question, each.model, each.judge)
        first[key] = min(first.get(key, each.choice), each.choice)
    return [each for each in judgments if each.turn == 1 and each.choice == first[each.question, each.model, each.judge]]


def score_models(judgments: Sequence[Judgment], categories: Mapping[int | str, str]) -> list[ModelScore]:
    """Every model on every judge's scale, the highest score first. Models without any score are left out.

    Args: categories: question -> category; may lack questions.
    """
    groups: dict[tuple[str, str], list[Judgment]] = defaultdict(list)
    for each in judgments:
        groups[each.model, each.scale].append(each)
    found = [_score(rows, categories) for rows in groups.values() if any(each.score is not None for each in rows)]
    return sorted(found, key=lambda each: (-each.score, each.model, each.judge))


def _score(rows: Sequence[Judgment], categories: Mapping[int | str, str]) -> ModelScore:
    known = [(each, each.score) for each in rows if each.score is not None]
    scores = [score for _, score in known]
    questions = [each.question for each, _ in known]
    by_turn = _means((each.turn, score) for each, score in known)
    by_category = _means((categories[each.question], score) for each, score in known if each.question in categories)
    levels: dict[str, Sequence[Hashable]] = {
        "question": questions,
        "turn": [each.turn for each, _ in known],
        "generation": [each.choice for each, _ in known],
        "judge": list(range(len(known))),
    }
    # All questions have the same turns: what a turn is harder than another is no spread between questions.
    centred = [score - by_turn[each.turn] for each, score in known]
    return ModelScore(
        model=rows[0].model,
        judge=rows[0].scale,
        score=mean(scores),
        interval=bootstrap_mean(scores, questions),
        turns=by_turn,
        categories=by_category,
        questions=len(set(questions)),
        judged=len(known),
        excluded=len(rows) - len(known),
        again=sum(count - 1 for count in Counter(each.answer for each, _ in known).values()),
        components=components(centred, levels),
    )


def compare_models(judgments: Sequence[Judgment], pairs: Sequence[tuple[str, str]], judge: str) -> list[Difference]:
    """Pairs of models on one judge's scale, over the questions and turns that both have; p-values by sign flips, Holm-adjusted.

    Raises: ValueError naming two models without a common question.
    """
    cells: dict[str, dict[tuple[int | str, int], list[float]]] = defaultdict(lambda: defaultdict(list))
    for each in judgments:
        if each.score is not None and each.scale == judge:
            cells[each.model][each.question, each.turn].append(each.score)
    found = []
    for first, second in pairs:
        common = [cell for cell in cells[first] if cell in cells[second]]
        if not common:
            raise ValueError(f"{first} and {second} have no question in common that {judge} has scored")
        values = [mean(cells[second][cell]) - mean(cells[first][cell]) for cell in common]
        clusters = [question for question, _ in common]
        found.append((first, second, values, clusters))
    p_values = [sign_flips(values, clusters) for *_, values, clusters in found]
    return [
        Difference(
            first=first,
            second=second,
            judge=judge,
            questions=len(set(clusters)),
            mean=mean(values),
            interval=bootstrap_mean(values, clusters),
            p_value=p_value,
            adjusted=adjusted,
            detectable=detectable_difference(values, clusters),
        )
        for (first, second, values, clusters), p_value, adjusted in zip(found, p_values, holm(p_values), strict=True)
    ]


def pairs_of(models: Sequence[str], baseline: str | None, most: int) -> list[tuple[str, str]]:
    """Baseline and each other model; without one all pairs, where there are at most `most` models."""
    if baseline is not None:
        return [(baseline, model) for model in models if model != baseline]
    return list(combinations(reversed(models), 2)) if len(models) <= most else []


def _means(scores: Iterable[tuple[Name, float]]) -> dict[Name, float]:
    groups: dict[Name, list[float]] = defaultdict(list)
    for name, score in scores:
        groups[name].append(score)
    return {name: mean(groups[name]) for name in sorted(groups)}
