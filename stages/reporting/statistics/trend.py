"""Whether a score rises along an ordered condition, such as sparsity or size (Page 1963).

The same blocks (items, seeds or candidates) stand under each condition. L is the sum over conditions of
their place times their rank sum within blocks (doi:10.1080/01621459.1963.10500843). One-sided, for a rise in
the order of the conditions; reverse the order to test for a fall.
"""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike
from scipy import stats

from stages.core.errors import Refusal
from stages.reporting.statistics.paired import refuse_missing


@dataclass(frozen=True)
class Trend:
    """A trend statistic, the p-value of at least such a statistic without a trend, and whether p is exact."""

    statistic: float
    p: float
    exact: bool


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
