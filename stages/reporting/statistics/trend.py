"""Whether a score rises with an ordered condition, such as difficulty, sparsity or size.

- Jonckheere and Terpstra: different items under each condition, a group a condition. J counts the pairs of
  items of different groups in which the later group's is larger, a tie as a half (Jonckheere 1954,
  doi:10.1093/biomet/41.1-2.133; Terpstra 1952; variance under ties: Hollander and Wolfe 1999, Nonparametric
  Statistical Methods, section 6.2).
- Page: the same blocks (items, seeds or candidates) under each condition. L is the sum over conditions of
  their place times their rank sum within blocks (Page 1963, doi:10.1080/01621459.1963.10500843).

Both are one-sided, for a rise in the order of the conditions; reverse the order to test for a fall.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
from numpy.typing import ArrayLike
from scipy import stats

from stages.core.errors import Refusal
from stages.reporting.statistics.paired import refuse_missing

_EXACT_ITEMS = 60
"""Up to this many items without ties, Jonckheere's distribution is enumerated."""


@dataclass(frozen=True)
class Trend:
    """A trend statistic, the p-value of at least such a statistic without a trend, and whether p is exact."""

    statistic: float
    p: float
    exact: bool


def jonckheere(groups: Sequence[ArrayLike]) -> Trend:
    """Test whether values `[items]` rise from group to group; exact for few items without ties, else normal.

    Raises:
        Refusal: there are fewer than two groups, a group is empty, or a value is not finite.
    """
    values = [np.asarray(group, dtype=np.float64) for group in groups]
    sizes = [len(group) for group in values]
    if len(values) < 2 or not all(sizes):
        raise Refusal(f"a trend needs at least two groups, none empty; the groups have {sizes} items.")
    refuse_missing("values", *values)
    statistic = 0.0
    for place, later in enumerate(values[1:], 1):
        earlier = np.sort(np.concatenate(values[:place]))
        below, upto = (np.searchsorted(earlier, later, side) for side in ("left", "right"))
        statistic += float((below + upto).sum()) / 2
    total = sum(sizes)
    ties = np.unique(np.concatenate(values), return_counts=True)[1]
    if ties.max() == 1 and total <= _EXACT_ITEMS:
        counts = _arrangements(sizes)
        return Trend(statistic, sum(counts[int(statistic) :]) / sum(counts), exact=True)
    mean = (total**2 - sum(size**2 for size in sizes)) / 4
    variance = _variance(sizes, [int(tie) for tie in ties])
    p = float(stats.norm.sf((statistic - mean) / math.sqrt(variance))) if variance > 0 else 1.0
    return Trend(statistic, p, exact=False)


def _arrangements(sizes: Sequence[int]) -> list[int]:
    """Count the assignments to groups in which J is 0, 1, 2, ...: the Gaussian multinomial coefficients."""
    total, longest = 0, (sum(sizes) ** 2 - sum(size**2 for size in sizes)) // 2 + 1
    counts = [1] + [0] * (longest - 1)
    for size in sizes:
        for step in range(1, size + 1):
            total += 1
            for place in range(longest - 1, total - 1, -1):  # times 1 - q^total
                counts[place] -= counts[place - total]
            for place in range(step, longest):  # over 1 - q^step
                counts[place] += counts[place - step]
    return counts


def _variance(sizes: Sequence[int], ties: Sequence[int]) -> float:
    """Return the variance of J without a trend, exactly 0 if all values are equal.

    Args:
        ties: the items that share each value.
    """

    def falling(counts: Sequence[int], length: int) -> int:
        return sum(math.perm(count, length) for count in counts)

    def plain(counts: Sequence[int]) -> int:
        return sum(count * (count - 1) * (2 * count + 5) for count in counts)

    total = sum(sizes)
    variance = Fraction(plain([total]) - plain(sizes) - plain(ties), 72)
    if total > 2:
        variance += Fraction(falling(sizes, 3) * falling(ties, 3), 36 * math.perm(total, 3))
    return float(variance + Fraction(falling(sizes, 2) * falling(ties, 2), 8 * math.perm(total, 2)))


def page(blocks: ArrayLike) -> Trend:
    """Test whether values `[blocks, conditions]` rise along the conditions within blocks.

    Without ties p is scipy's, exact for few blocks and conditions; with ties it is a normal one, with the
    variance of the tied ranks.

    Raises:
        Refusal: there are fewer than three conditions or two blocks, or a value is not finite.
    """
    values = np.asarray(blocks, dtype=np.float64)
    if values.ndim != 2 or values.shape[0] < 2 or values.shape[1] < 3:
        raise Refusal(
            f"Page's test needs at least two blocks and three conditions, not values of {values.shape}."
        )
    refuse_missing("values", values)
    ranks = stats.rankdata(values, axis=1)
    if (np.diff(np.sort(values, axis=1), axis=1) > 0).all():
        test = stats.page_trend_test(ranks, ranked=True)
        return Trend(float(test.statistic), float(test.pvalue), test.method == "exact")
    count, conditions = values.shape
    places = np.arange(1, conditions + 1)
    statistic = float((ranks @ places).sum())
    spread = ((ranks - ranks.mean(axis=1, keepdims=True)) ** 2).sum()
    variance = float(spread) * float(((places - places.mean()) ** 2).sum()) / (conditions - 1)
    mean = count * conditions * (conditions + 1) ** 2 / 4
    p = float(stats.norm.sf((statistic - mean) / math.sqrt(variance))) if variance > 0 else 1.0
    return Trend(statistic, p, exact=False)
