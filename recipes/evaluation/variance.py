"""Where the spread of scores comes from: variance components of a nested design, by the analysis of variance.

Scores are nested: judgments within an answer, answers within a turn, turns within a question. Each level adds a deviation of
its own. The expected sums of squares of the levels, also unbalanced ones, are linear in the variances; solving for them gives
estimates that are unbiased, also without normality, before negative ones are set to 0.

Source: Henderson 1953, https://doi.org/10.2307/3001853, method 1; Searle, Casella and McCulloch, Variance Components (1992).

Shapes: N scores.
"""

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, eq=False)
class Components:
    """variances: level -> variance; None where the level cannot be told from a level above it, whose variance then holds both.
    error: standard error of the mean of all scores, if the scores' levels were drawn again."""

    variances: dict[str, float | None]
    error: float


def components(
    scores: Sequence[float] | np.ndarray,  # [N]
    levels: Mapping[str, Sequence[Hashable]],  # name -> [N] group of each score, coarsest first; the finest may be the scores
) -> Components:
    """Variance components of nested levels, and the standard error that follows from them.

    A group belongs to the group of the level above: the same label under two questions is two groups. A level whose groups have
    one member each everywhere adds nothing that could be told apart.
    Raises: ValueError without scores, or for levels of another number.
    """
    score_N = np.asarray(scores, dtype=float)
    total = len(score_N)
    if not total or any(len(groups) != total for groups in levels.values()):
        raise ValueError(
            f"{total} scores, and levels of {[len(groups) for groups in levels.values()]}: give one for each score"
        )
    variances: dict[str, float | None] = dict.fromkeys(levels)
    # From coarse to fine: the number of each score's group, at the levels that divide the groups above.
    names: list[str] = []
    groups_LN = [np.zeros(total, dtype=np.int64)]
    labels: list[tuple[Hashable, ...]] = [()] * total
    for name, groups in levels.items():
        labels = [(*label, group) for label, group in zip(labels, groups, strict=True)]
        numbers: dict[tuple[Hashable, ...], int] = {}
        group_N = np.array([numbers.setdefault(label, len(numbers)) for label in labels])
        if len(numbers) > groups_LN[-1].max() + 1:
            names.append(name)
            groups_LN.append(group_N)
    if not names:
        return Components(variances, float("inf") if total == 1 else 0.0)
    sizes = [np.bincount(group_N).astype(float) for group_N in groups_LN]
    means = [np.bincount(group_N, score_N) / size for group_N, size in zip(groups_LN, sizes, strict=True)]
    # share[l][k]: sum over the groups g of level l and the groups h of level k within g of n_h^2 / n_g.
    share = [
        [float((sizes[fine][groups_LN[fine]] / sizes[coarse][groups_LN[coarse]]).sum()) for fine in range(len(sizes))]
        for coarse in range(len(sizes))
    ]
    found = [0.0] * len(sizes)
    for level in reversed(range(1, len(sizes))):
        freedom = len(sizes[level]) - len(sizes[level - 1])
        deviation_N = means[level][groups_LN[level]] - means[level - 1][groups_LN[level - 1]]
        known = sum((share[level][fine] - share[level - 1][fine]) * found[fine] for fine in range(level + 1, len(sizes)))
        weight = share[level][level] - share[level - 1][level]
        found[level] = (float(deviation_N @ deviation_N) - known) / weight if weight > 0 and freedom > 0 else 0.0
    clipped = [max(0.0, variance) for variance in found]
    variances.update(zip(names, clipped[1:], strict=True))
    error = sum(variance * float(size @ size) for variance, size in zip(clipped[1:], sizes[1:], strict=True)) ** 0.5 / total
    return Components(variances, error)
