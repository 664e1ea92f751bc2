"""Models ranked by pairwise votes: Bradley-Terry, draws (Davidson), a term for the side, and intervals by clusters.

Davidson's model (1970, https://doi.org/10.1080/01621459.1970.10481082) gives the left model, the right model and a draw the
weights exp(left + side), exp(right) and exp(draw + (left + side + right) / 2); without draws and side it is Bradley-Terry's.
The likelihood is concave in all parameters, so Newton's method on the counts of each ordered pair finds the one maximum.

Votes on one prompt, or of one rater, are not independent: the covariance is the sandwich of Cameron, Gelbach and Miller (2011,
https://doi.org/10.1198/jbes.2010.07136) for two ways of clustering.

Shapes: N votes, M models, P parameters (the scores, then the draw, then the side), C ordered pairs of models.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

LEFT, RIGHT, DRAW = 0, 1, 2
_TOLERANCE = 1e-10
_STEPS = 200
_ENDLESS = 30.0  # odds of 10^13
# An eigenvalue of the information below this share of the largest one: the votes do not tell the parameter.
_UNKNOWN = 1e-9


@dataclass(frozen=True, eq=False)
class Votes:
    """Votes by number. prompt, rater: the clusters of each vote."""

    models: list[str]
    left: np.ndarray  # [N], of models
    right: np.ndarray  # [N]
    outcome: np.ndarray  # [N], LEFT, RIGHT or DRAW
    prompt: np.ndarray  # [N]
    rater: np.ndarray  # [N]

    def among(self, kept: Sequence[int], *, decided: bool = False) -> Votes:
        """The votes between some of the models, numbered anew; decided: without draws."""
        number = np.full(len(self.models), -1)
        number[list(kept)] = np.arange(len(kept))
        chosen = (number[self.left] >= 0) & (number[self.right] >= 0) & ((self.outcome != DRAW) | (not decided))
        return Votes(
            [self.models[place] for place in kept],
            number[self.left[chosen]],
            number[self.right[chosen]],
            self.outcome[chosen],
            self.prompt[chosen],
            self.rater[chosen],
        )

    def wins(self) -> np.ndarray:
        """[M, M]: how often the row's model beat the column's."""
        counts = np.zeros((len(self.models),) * 2)
        won, lost = self.outcome == LEFT, self.outcome == RIGHT
        np.add.at(counts, (self.left[won], self.right[won]), 1)
        np.add.at(counts, (self.right[lost], self.left[lost]), 1)
        return counts

    def draws(self) -> np.ndarray:
        """[M]: the draws of each model."""
        drawn = self.outcome == DRAW
        return np.bincount(np.concatenate([self.left[drawn], self.right[drawn]]), minlength=len(self.models))


@dataclass(frozen=True)
class Estimate:
    """A parameter with its 95 % interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Fit:
    """scores: of each model, natural logarithms with mean 0. draw, side: None where the votes do not tell them.

    ranks: 95 % interval of each model's rank, from 1: models that are surely better, or not surely worse, by Bonferroni over
    the model's comparisons.
    """

    scores: list[Estimate]
    draw: Estimate | None
    side: Estimate | None
    ranks: list[tuple[int, int]]


def fittable(votes: Votes) -> tuple[list[int], dict[int, str]]:
    """The models that can be ranked together, and the reason for each other one.

    A maximum exists where chains of wins lead from each model to each other one (Ford 1957): a strongly connected component of
    the graph of wins. The one with the most votes is ranked.
    """
    from scipy.sparse.csgraph import connected_components

    wins = votes.wins()
    between = wins + wins.T
    _, component = connected_components(wins > 0, directed=True, connection="strong")
    _, island = connected_components(between > 0, directed=False)
    inside = [between[np.ix_(component == name, component == name)].sum() for name in range(component.max() + 1)]
    # At equal numbers of votes the component of the first model.
    first = [int(np.argmax(component == name)) for name in range(len(inside))]
    best = max(range(len(inside)), key=lambda name: (inside[name], -first[name]))
    kept = [] if inside[best] == 0 else np.flatnonzero(component == best).tolist()
    reasons = {}
    for model in range(len(votes.models)):
        if model in kept:
            continue
        if not between[model].any():
            reasons[model] = "has no decided vote"
        elif not wins[:, model].any():
            reasons[model] = "never loses"
        elif not wins[model].any():
            reasons[model] = "never wins"
        elif kept and island[model] != island[kept[0]]:
            reasons[model] = "was never compared with the ranked models, nor through others"
        else:
            reasons[model] = "no chain of wins and losses leads both to the ranked models and back"
    return kept, reasons


def bradley_terry(votes: Votes) -> Fit:
    """Bradley and Terry's scores by choix (iLSR) from the decided votes of models that are `fittable`.

    Raises: ValueError where choix is not installed.
    """
    try:
        import choix
    except ImportError:
        raise ValueError("a ranking needs choix, which is not installed: pip install 'komainu[eval]'") from None
    votes = votes.among(range(len(votes.models)), decided=True)
    winners = np.where(votes.outcome == LEFT, votes.left, votes.right)
    losers = np.where(votes.outcome == LEFT, votes.right, votes.left)
    pairs = list(zip(winners.tolist(), losers.tolist(), strict=True))
    scores = choix.ilsr_pairwise(len(votes.models), pairs, alpha=0.0, max_iter=10_000, tol=1e-10)
    return _fit(votes, np.concatenate([scores - scores.mean(), np.zeros(2)]), draw=False, side=False)


def davidson(votes: Votes) -> Fit:
    """Scores from all votes of models that are `fittable`, with the draw's and the side's parameter where the votes tell them.

    They do not tell the side where each pair stood always the same way round, or where the left side always won.
    """
    draw = bool((votes.outcome == DRAW).any())
    if _tells_side(votes) and (parameters := _newton(votes, draw, True)) is not None:
        return _fit(votes, parameters, draw, True)
    parameters = _newton(votes, draw, False)
    assert parameters is not None, "the scores of models that beat one another in turn are finite"
    return _fit(votes, parameters, draw, False)


def _design(left: np.ndarray, right: np.ndarray, models: int) -> np.ndarray:
    """The coefficients of the parameters in the logarithm of each outcome's weight: [C, 3, P]."""
    rows = np.arange(len(left))
    design = np.zeros((len(left), 3, models + 2))
    design[rows, LEFT, left] = 1
    design[rows, RIGHT, right] = 1
    design[:, LEFT, models + 1] = 1
    design[:, DRAW] = (design[:, LEFT] + design[:, RIGHT]) / 2
    design[:, DRAW, models] = 1
    return design


def _cells(votes: Votes) -> tuple[np.ndarray, np.ndarray]:
    """The design of the ordered pairs that occur, [C, 3, P], and their counts by outcome, [C, 3]."""
    models = len(votes.models)
    pair, number = np.unique(votes.left * models + votes.right, return_inverse=True)
    counts = np.bincount(number * 3 + votes.outcome, minlength=3 * len(pair)).reshape(-1, 3)
    return _design(pair // models, pair % models, models), counts.astype(float)


def _probabilities(design: np.ndarray, parameters: np.ndarray, draw: bool) -> np.ndarray:
    logits = design @ parameters
    if not draw:
        logits[:, DRAW] = -np.inf
    weights = np.exp(logits - logits.max(axis=1, keepdims=True))
    return weights / weights.sum(axis=1, keepdims=True)


def _information(design: np.ndarray, probabilities: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Minus the second derivative of the log-likelihood, [P, P]; counts: votes of each pair, [C]."""
    mean = np.einsum("ckp,ck->cp", design, probabilities)
    square = np.einsum("ckp,ck,ckq,c->pq", design, probabilities, design, counts, optimize=True)
    return square - np.einsum("cp,cq,c->pq", mean, mean, counts, optimize=True)


def _free(models: int, draw: bool, side: bool) -> np.ndarray:
    """A basis of the parameters that are fitted, [P, F]: scores of sum 0, and the draw and the side where they are."""
    columns = np.linalg.svd(np.ones((1, models)))[2][1:]
    basis = np.zeros((models + 2, models - 1 + draw + side))
    basis[:models, : models - 1] = columns.T
    if draw:
        basis[models, models - 1] = 1
    if side:
        basis[models + 1, models - 1 + draw] = 1
    return basis


def _tells_side(votes: Votes) -> bool:
    """Whether the votes tell the side from the scores: not where each pair stood always the same way round."""
    models = len(votes.models)
    design, counts = _cells(votes)
    draw = bool((votes.outcome == DRAW).any())
    basis = _free(models, draw, True)
    even = _probabilities(design, np.zeros(models + 2), draw)
    values = np.linalg.eigvalsh(basis.T @ _information(design, even, counts.sum(axis=1)) @ basis)
    return bool(values[0] > _UNKNOWN * values[-1])


def _newton(votes: Votes, draw: bool, side: bool) -> np.ndarray | None:
    """The parameters of the largest likelihood, [P]; None where one of them grows without end."""
    design, counts = _cells(votes)
    total = counts.sum(axis=1)
    basis = _free(len(votes.models), draw, side)
    parameters = np.zeros(basis.shape[0])

    def likelihood(at: np.ndarray) -> float:
        probabilities = _probabilities(design, at, draw)
        return float(np.sum(counts * np.log(np.where(counts > 0, probabilities, 1))))

    best = likelihood(parameters)
    for _ in range(_STEPS):
        probabilities = _probabilities(design, parameters, draw)
        gradient = basis.T @ np.einsum("ckp,ck->p", design, counts - total[:, None] * probabilities)
        information = basis.T @ _information(design, probabilities, total) @ basis
        if np.abs(parameters).max() > _ENDLESS or np.linalg.cond(information) > 1 / np.finfo(float).eps:
            return None
        step = basis @ np.linalg.solve(information, gradient)
        length = 1.0
        while (reached := likelihood(parameters + length * step)) < best - 1e-9 and length > 1e-9:
            length /= 2
        parameters, best = parameters + length * step, reached
        if np.abs(step).max() < _TOLERANCE:
            return parameters
    return None


def _fit(votes: Votes, parameters: np.ndarray, draw: bool, side: bool) -> Fit:
    """The fit at its parameters, with intervals."""
    models = len(votes.models)
    basis = _free(models, draw, side)
    design, counts = _cells(votes)
    information = _information(design, _probabilities(design, parameters, draw), counts.sum(axis=1))
    bread = np.linalg.inv(basis.T @ information @ basis)
    meat, freedom = _meat(votes, parameters, draw, basis)
    covariance = basis @ bread @ meat @ bread @ basis.T
    error = np.sqrt(np.diag(covariance).clip(0))
    width = float(stats.t.isf(0.025, freedom)) * error
    estimates = [
        Estimate(float(value), float(value - half), float(value + half)) for value, half in zip(parameters, width, strict=True)
    ]
    scores = parameters[:models]
    difference = scores[:, None] - scores[None, :]
    variance = np.diag(covariance)[:models]
    spread = np.sqrt((variance[:, None] + variance[None, :] - 2 * covariance[:models, :models]).clip(0))
    surely = difference > float(stats.t.isf(0.025 / max(1, models - 1), freedom)) * spread
    np.fill_diagonal(surely, False)
    ranks = [(1 + int(surely[:, model].sum()), models - int(surely[model].sum())) for model in range(models)]
    return Fit(estimates[:models], estimates[models] if draw else None, estimates[models + 1] if side else None, ranks)


def _meat(votes: Votes, parameters: np.ndarray, draw: bool, basis: np.ndarray) -> tuple[np.ndarray, int]:
    """The covariance of the votes' scores by prompt and rater, [F, F], and the degrees of freedom of its t intervals."""
    design = _design(votes.left, votes.right, len(votes.models))
    probabilities = _probabilities(design, parameters, draw)
    observed = np.zeros_like(probabilities)
    observed[np.arange(len(votes.left)), votes.outcome] = 1
    scores_NF = np.einsum("nkp,nk->np", design, observed - probabilities) @ basis

    # A single cluster's scores add up to 0, and say nothing.
    ways = [groups for groups in (votes.prompt, votes.rater) if len(np.unique(groups)) > 1] or [np.arange(len(scores_NF))]
    parts = [(1, _sums(scores_NF, groups)) for groups in ways]
    freedom = max(1, min(len(sums) for _, sums in parts) - 1)
    if len(ways) == 2:
        parts.append((-1, _sums(scores_NF, votes.prompt * (votes.rater.max() + 1) + votes.rater)))
    meat = np.asarray(sum(sign * len(sums) / (len(sums) - 1) * sums.T @ sums for sign, sums in parts))
    values, vectors = np.linalg.eigh(meat)
    # The difference of covariances may lose a direction; it has then at least the variance of independent votes.
    if values[0] <= 0:
        independent = scores_NF.T @ scores_NF
        meat = (vectors * values.clip(0)) @ vectors.T
        meat = np.where(np.eye(len(meat)) > 0, np.maximum(meat, independent), meat)
    return meat, freedom


def _sums(scores_NF: np.ndarray, groups: np.ndarray) -> np.ndarray:
    """The sum of the scores of each group, [G, F]."""
    _, number = np.unique(groups, return_inverse=True)
    sums = np.zeros((number.max() + 1, scores_NF.shape[1]))
    np.add.at(sums, number, scores_NF)
    return sums
