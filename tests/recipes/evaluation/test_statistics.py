"""Intervals and tests against scipy's own, and what each promises: coverage, size, and power."""

import math

import numpy as np
import pytest

stats = pytest.importorskip("scipy.stats", reason="scipy comes with the extra eval")

from recipes.evaluation.statistics import (  # noqa: E402
    bootstrap,
    bootstrap_mean,
    bootstrap_weighted_means,
    detectable_difference,
    holm,
    mcnemar,
    sign_flips,
    wilson,
)


@pytest.mark.parametrize(("successes", "trials"), [(0, 7), (1, 1), (3, 10), (81, 263), (500, 500)])
@pytest.mark.parametrize("confidence", [0.8, 0.95])
def test_wilsons_interval_is_scipys(successes, trials, confidence):
    theirs = stats.binomtest(successes, trials).proportion_ci(confidence, method="wilson")
    ours = wilson(successes, trials, confidence)
    assert (ours.low, ours.high) == pytest.approx((theirs.low, theirs.high), abs=1e-12)


def test_a_mean_of_many_items_has_the_interval_of_the_normal_distribution():
    values = np.random.default_rng(0).normal(size=900)
    ours = bootstrap_mean(values)
    half = 1.96 * values.std(ddof=1) / 30
    assert (ours.low, ours.high) == pytest.approx((values.mean() - half, values.mean() + half), abs=0.004)
    assert ours == bootstrap_mean(values)
    general = bootstrap(900, lambda drawn: float(values[drawn].mean()))
    assert (general.low, general.high) == pytest.approx((ours.low, ours.high), abs=0.01)


def test_intervals_of_clusters_cover_the_mean_and_intervals_that_ignore_them_do_not():
    """15 clusters of 2 to 12 items that share most of their value."""
    random, covered, ignored = np.random.default_rng(1), 0, 0
    for _ in range(400):
        clusters = np.repeat(np.arange(15), random.integers(2, 13, size=15))
        values = random.normal(size=15)[clusters] + 0.3 * random.normal(size=len(clusters))
        interval = bootstrap_mean(values, clusters.tolist(), draws=500)
        covered += interval.low <= 0 <= interval.high
        plain = bootstrap_mean(values, draws=500)
        ignored += plain.low <= 0 <= plain.high
    assert 0.91 <= covered / 400 <= 0.98
    assert ignored / 400 < 0.75


def test_a_single_cluster_says_nothing_of_the_others():
    assert bootstrap_mean([1.0, 2.0], ["a", "a"]).high == math.inf


def test_a_statistic_that_is_no_mean_has_its_interval():
    random = np.random.default_rng(2)
    one = random.normal(size=300)
    two = 0.6 * one + 0.8 * random.normal(size=300)

    def correlation(drawn):
        return float(np.corrcoef(one[drawn], two[drawn])[0, 1])

    theirs = stats.pearsonr(one, two).confidence_interval()
    ours = bootstrap(300, correlation)
    assert (ours.low, ours.high) == pytest.approx((theirs.low, theirs.high), abs=0.03)
    with pytest.raises(ValueError, match="finite in none"):
        bootstrap(3, lambda drawn: math.nan)


def test_mcnemar_counts_only_the_items_that_differ():
    first = [True] * 9 + [False] * 2 + [True] * 50 + [False] * 40
    second = [False] * 9 + [True] * 2 + [True] * 50 + [False] * 40
    assert mcnemar(first, second) == pytest.approx(2 * (1 + 11 + 55) / 2**11)
    assert mcnemar(first, first) == 1


def test_sign_flips_equal_scipys_permutation_test():
    differences = np.random.default_rng(3).normal(0.4, 1, size=11)
    theirs = stats.permutation_test(
        (differences,), np.mean, permutation_type="samples", vectorized=True, axis=0, n_resamples=np.inf
    ).pvalue
    assert sign_flips(differences) == pytest.approx(theirs)
    # Items in clusters flip together, as their sums would.
    halves = np.repeat(differences / 2, 2)
    assert sign_flips(halves, np.repeat(np.arange(11), 2).tolist()) == pytest.approx(theirs)
    many = np.random.default_rng(4).normal(0.25, 1, size=60)
    assert sign_flips(many) == pytest.approx(stats.ttest_1samp(many, 0).pvalue, abs=0.01)
    assert sign_flips([0.0, 0.0]) == 1


def test_paired_tests_reject_a_true_null_about_as_often_as_they_say():
    random, counts = np.random.default_rng(5), np.zeros(3)
    for _ in range(1000):
        right = random.random((2, 800)) < 0.5
        counts[0] += mcnemar(*right) < 0.05
        counts[1] += sign_flips(random.exponential(size=80) - random.exponential(size=80), draws=400) < 0.05
        clusters = np.repeat(np.arange(25), 4)
        shared = random.normal(size=25)[clusters] + random.normal(size=100)
        counts[2] += sign_flips(shared, clusters.tolist(), draws=400) < 0.05
    assert ((counts >= 30) & (counts <= 70)).all(), counts


def test_holm_adjusts_as_its_paper_does():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.9, 0.8]) == [1, 1]
    assert holm([]) == []


def test_the_smallest_difference_is_found_as_often_as_it_says():
    random = np.random.default_rng(6)
    smallest = detectable_difference(random.normal(size=400))
    assert smallest == pytest.approx(2.8 / 20, rel=0.1)
    found = sum(sign_flips(random.normal(smallest, 1, size=400), draws=400) < 0.05 for _ in range(300))
    assert 0.7 <= found / 300 <= 0.9


def test_what_no_data_could_have_shown_is_not_claimed():
    # Six items that all differ the same way are the fewest that an exact test at 5 % can see.
    assert detectable_difference([0.0] * 100) == pytest.approx(0.06)
    assert mcnemar([True] * 6, [False] * 6) < 0.05 < mcnemar([True] * 5, [False] * 5)
    assert detectable_difference([1.0, -1.0, 0.0, 1.0, 0.0]) == math.inf
    assert detectable_difference([1.0] * 50, [0] * 25 + [1] * 25) == math.inf


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: wilson(1, 0), "1 successes of 0 trials"),
        (lambda: wilson(4, 3), "4 successes of 3 trials"),
        (lambda: bootstrap_mean([]), "at least one item"),
        (lambda: bootstrap_mean([1.0, 2.0], ["a"]), "1 clusters for 2 items"),
        (lambda: mcnemar([True], [True, False]), "1 and 2 items"),
        (lambda: bootstrap(0, float), "no items"),
    ],
)
def test_wrong_numbers_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_a_mean_of_means_has_the_interval_of_independent_data_sets():
    random = np.random.default_rng(7)
    strata = [random.normal(0.5, spread, size=count) for spread, count in ((1, 300), (2, 100), (0.5, 50))]
    ours = bootstrap_weighted_means([*strata, [1.0, 2.0]], [0.5, 0.25, 0.25, 0])
    middle = sum(weight * values.mean() for weight, values in zip((0.5, 0.25, 0.25), strata, strict=True))
    error = math.sqrt(
        sum(weight**2 * values.var() / len(values) for weight, values in zip((0.5, 0.25, 0.25), strata, strict=True))
    )
    assert (ours.low, ours.high) == pytest.approx((middle - 1.96 * error, middle + 1.96 * error), abs=0.02)
