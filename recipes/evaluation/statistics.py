"""Intervals, paired tests and what a comparison could have seen: for accuracies, means and any other statistic of items.

Items that belong together (the questions of a passage, of a subject, of a prompt) form a cluster; clusters are independent,
items within one are not. Without clusters each item is its own.

Everything random is seeded, so that a report has the same bytes each time.

Shapes: N items, G clusters.
"""

import math
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

DRAWS = 10_000
# Exact enumeration of sign flips up to this many clusters: 2^14 patterns.
_EXACT_FLIPS = 14
# Cells of a matrix of draws that are held at once.
_CELLS = 4_000_000


@dataclass(frozen=True)
class Interval:
    """A confidence interval."""

    low: float
    high: float


def wilson(successes: float, trials: float, confidence: float = 0.95) -> Interval:
    """Wilson's score interval of a proportion (Wilson 1927, https://doi.org/10.1080/01621459.1927.10502953).

    Trials that belong together count as fewer, which need not be a whole number.
    Raises: ValueError without trials, or for successes outside 0 .. trials.
    """
    if trials < 1 or not 0 <= successes <= trials:
        raise ValueError(f"{successes} successes of {trials} trials: there must be a trial, and successes among the trials")
    z = float(stats.norm.isf((1 - confidence) / 2))
    share, spread = successes / trials, z * z / trials
    middle = (share + spread / 2) / (1 + spread)
    half = z / (1 + spread) * math.sqrt(share * (1 - share) / trials + spread / (4 * trials))
    # At the ends the bounds are 0 and 1 exactly; rounding would miss them.
    return Interval(0.0 if successes == 0 else middle - half, 1.0 if successes == trials else middle + half)


def bootstrap_mean(
    values: Sequence[float] | np.ndarray,  # [N]
    clusters: Sequence[Hashable] | None = None,  # [N]
    *,
    confidence: float = 0.95,
    draws: int = DRAWS,
    seed: int = 0,
) -> Interval:
    """Interval of the mean: clusters are drawn with replacement (Efron and Tibshirani 1993).

    The percentiles are widened as a t interval of as many clusters would be (Hesterberg 2015, section 5.3,
    https://doi.org/10.1080/00031305.2015.1089789): plain percentiles are too narrow where clusters are few. One cluster says
    nothing of the others: its interval is the whole line.

    Raises: ValueError without values, or for clusters of another number.
    """
    value_N = _values(values)
    groups_N, count = _numbered(len(value_N), clusters)
    size_G, sum_G = np.bincount(groups_N, minlength=count), np.bincount(groups_N, value_N, count)
    means = [(times_RG @ sum_G) / (times_RG @ size_G) for times_RG in _draws(count, draws, seed)]
    return _percentiles(np.concatenate(means), count, confidence)


def bootstrap(
    items: int,
    statistic: Callable[[np.ndarray], float],  # of the numbers of the items drawn, some of them repeatedly
    clusters: Sequence[Hashable] | None = None,  # [items]
    *,
    confidence: float = 0.95,
    draws: int = 2000,
    seed: int = 0,
) -> Interval:
    """Interval of any statistic of the items, as `bootstrap_mean` draws them. Draws without a finite statistic are left out.

    Raises: ValueError without items, for clusters of another number, or where no draw gives a finite statistic.
    """
    groups_N, count = _numbered(items, clusters)
    members = np.split(np.argsort(groups_N, kind="stable"), np.cumsum(np.bincount(groups_N, minlength=count))[:-1])
    random = np.random.default_rng(seed)
    drawn = (random.integers(count, size=count) for _ in range(draws))
    found = np.array([statistic(np.concatenate([members[group] for group in groups])) for groups in drawn], dtype=float)
    finite = found[np.isfinite(found)]
    if not len(finite):
        raise ValueError(f"the statistic of {items} items is finite in none of {draws} draws")
    return _percentiles(finite, count, confidence)


def bootstrap_weighted_means(
    strata: Sequence[Sequence[float] | np.ndarray],  # the values of each data set, whose items are drawn apart
    weights: Sequence[float],  # of each data set's mean
    *,
    confidence: float = 0.95,
    draws: int = DRAWS,
    seed: int = 0,
) -> Interval:
    """Interval of a weighted sum of the means of several data sets, such as the mean of their means.

    Raises: ValueError without values.
    """
    total, smallest = np.zeros(draws), 2**31
    for number, (values, weight) in enumerate(zip(strata, weights, strict=True)):
        if weight:
            value_N = _values(values)
            parts = [times_RN @ value_N / len(value_N) for times_RN in _draws(len(value_N), draws, seed + number)]
            total += weight * np.concatenate(parts)
            smallest = min(smallest, len(value_N))
    return _percentiles(total, smallest, confidence)


def mcnemar(first: Sequence[bool] | np.ndarray, second: Sequence[bool] | np.ndarray) -> float:
    """Two-sided exact p-value that two models are right equally often on the same independent items (McNemar 1947).

    Only items that one model alone gets right count; each is a fair coin under the null.
    Raises: ValueError for different numbers of items.
    """
    one_N, two_N = np.asarray(first, dtype=bool), np.asarray(second, dtype=bool)
    if one_N.shape != two_N.shape:
        raise ValueError(f"{len(one_N)} and {len(two_N)} items: two models are compared on the same items")
    ahead, behind = int((one_N & ~two_N).sum()), int((two_N & ~one_N).sum())
    return float(stats.binomtest(ahead, ahead + behind).pvalue) if ahead + behind else 1.0


def sign_flips(
    differences: Sequence[float] | np.ndarray,  # [N], of two models on the same items
    clusters: Sequence[Hashable] | None = None,  # [N]
    *,
    draws: int = DRAWS,
    seed: int = 0,
) -> float:
    """Two-sided p-value that the mean difference is 0: under the null each cluster's sum may as well have the other sign.

    Exact up to 14 clusters that differ; beyond, (1 + flips at least as far from 0) / (1 + draws) (Phipson and Smyth 2010,
    https://doi.org/10.2202/1544-6115.1585).
    Raises: ValueError without items, or for clusters of another number.
    """
    difference_N = _values(differences)
    groups_N, count = _numbered(len(difference_N), clusters)
    sum_G = np.bincount(groups_N, difference_N, count)
    sum_G = sum_G[sum_G != 0]
    # Sums that are equal but for rounding count as equally far.
    observed = abs(float(sum_G.sum())) * (1 - 1e-9)
    if len(sum_G) <= _EXACT_FLIPS:
        patterns = np.arange(2 ** len(sum_G))[:, None] >> np.arange(len(sum_G)) & 1
        return float(np.mean(np.abs((1 - 2 * patterns) @ sum_G) >= observed))
    random, further = np.random.default_rng(seed), 0
    for rows in _portions(draws, len(sum_G)):
        signs = 1 - 2 * random.integers(2, size=(rows, len(sum_G)), dtype=np.int8)
        further += int((np.abs(signs @ sum_G) >= observed).sum())
    return (1 + further) / (1 + draws)


def holm(p_values: Sequence[float]) -> list[float]:
    """The p-values adjusted for as many tests, in their order (Holm 1979): those below alpha are significant together."""
    order = sorted(range(len(p_values)), key=lambda number: p_values[number])
    adjusted, highest = [0.0] * len(p_values), 0.0
    for rank, number in enumerate(order):
        highest = max(highest, min(1.0, (len(p_values) - rank) * p_values[number]))
        adjusted[number] = highest
    return adjusted


def detectable_difference(
    differences: Sequence[float] | np.ndarray,  # [N], of two models on the same items
    clusters: Sequence[Hashable] | None = None,  # [N]
    *,
    alpha: float = 0.05,
    power: float = 0.8,
) -> float:
    """The smallest true mean difference that a two-sided test at `alpha` finds with probability `power`.

    It is (t_(1 - alpha / 2) + t_power) standard errors of the mean difference, with G - 1 degrees of freedom, but never less
    than an exact test needs: as many items, or clusters, that all differ the same way as make 2^(1 - k) <= alpha. Infinite
    where there are fewer.
    Raises: ValueError without items, or for clusters of another number.
    """
    difference_N = _values(differences)
    groups_N, count = _numbered(len(difference_N), clusters)
    least = math.ceil(1 - math.log2(alpha))
    if count < least:
        return math.inf
    mean = float(difference_N.mean())
    residual_G = np.bincount(groups_N, difference_N - mean, count)
    error = math.sqrt(count / (count - 1) * float(residual_G @ residual_G)) / len(difference_N)
    factor = float(stats.t.isf(alpha / 2, count - 1) + stats.t.isf(1 - power, count - 1))
    sizes = np.abs(difference_N[difference_N != 0])
    # One item that differs counts as much as the smallest difference seen; without any, as one right answer.
    return max(factor * error, least * (float(sizes.min()) if len(sizes) else 1.0) / len(difference_N))


def _values(values: Sequence[float] | np.ndarray) -> np.ndarray:
    array = np.asarray(values, dtype=float)
    if array.ndim != 1 or not len(array):
        raise ValueError(f"values of shape {array.shape}: there must be one for each item, and at least one item")
    return array


def _numbered(items: int, clusters: Sequence[Hashable] | None) -> tuple[np.ndarray, int]:
    """(the number of each item's cluster from 0, in order of appearance; how many clusters there are)."""
    if items < 1:
        raise ValueError("there are no items")
    if clusters is None:
        return np.arange(items), items
    if len(clusters) != items:
        raise ValueError(f"{len(clusters)} clusters for {items} items: name one for each item")
    numbers: dict[Hashable, int] = {}
    return np.array([numbers.setdefault(cluster, len(numbers)) for cluster in clusters]), len(numbers)


def _portions(draws: int, width: int) -> list[int]:
    """The draws in portions whose matrices are small."""
    rows = max(1, _CELLS // max(1, width))
    return [min(rows, draws - start) for start in range(0, draws, rows)]


def _draws(count: int, draws: int, seed: int) -> Iterator[np.ndarray]:
    """How often each cluster is drawn, in portions [R, G] of all draws."""
    random = np.random.default_rng(seed)
    for rows in _portions(draws, count):
        drawn_RG = random.integers(count, size=(rows, count)) + count * np.arange(rows)[:, None]
        yield np.bincount(drawn_RG.ravel(), minlength=rows * count).reshape(rows, count)


def _percentiles(found: np.ndarray, count: int, confidence: float) -> Interval:
    if count == 1:
        return Interval(-math.inf, math.inf)
    wide = math.sqrt(count / (count - 1)) * float(stats.t.isf((1 - confidence) / 2, count - 1))
    tail = float(stats.norm.sf(wide))
    low, high = np.quantile(found, (tail, 1 - tail))
    return Interval(float(low), float(high))
