"""Retention: the share of the dense model's ability that a compressed model keeps, above the floor.

A model that guesses among four choices scores 0.25. If the dense model scores 0.60, a score of 0.25 keeps
nothing, not 42 %. With the floor f taken off both, the retention is (s - f) / (d - f), where s and d are
the scores of the compressed and the dense model.

A ratio means nothing where its denominator may be zero: where the dense model is not clearly above the
floor there is nothing to keep, and the retention is undefined. Its interval is Fieller's (1954,
doi:10.1111/j.2517-6161.1954.tb00159.x) over the items that both models answered. It is finite exactly where
the dense model is above the floor by a one-sided test at half the level of the interval, so a single test
decides both.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

from stages.reporting.statistics.paired import LEVEL


@dataclass(frozen=True)
class Retention:
    """The share kept and its 95 % interval; 1 is all, 0 is the floor, and it may lie beyond both."""

    value: float
    low: float
    high: float


def retention(dense: Sequence[float], ours: Sequence[float], floor: float) -> Retention | None:
    """Return the retention, from scores of the same items in the same order; higher scores are better.

    Args:
        floor: the mean score that needs no knowledge, taken as known.

    Returns:
        None where the dense model is not clearly above the floor (one-sided t test, p > 0.025), for fewer
        than two items, or where a score or the floor is not finite.
    """
    count = len(dense)
    scores = np.array([ours, dense], dtype=np.float64)
    if count < 2 or not (np.isfinite(scores).all() and math.isfinite(floor)):
        return None
    kept, whole = scores.mean(axis=1) - floor
    (kept_var, both_var), (_, whole_var) = np.cov(scores) / count
    reach = float(stats.t.ppf(1 - LEVEL / 2, count - 1)) ** 2
    # The mean of (ours - floor) - r (dense - floor) may well be 0 for ratios r between the roots of
    # square r^2 - 2 cross r + rest.
    square, cross = whole**2 - reach * whole_var, kept * whole - reach * both_var
    if whole <= 0 or square <= 0:
        return None
    rest = kept**2 - reach * kept_var
    half = math.sqrt(max(0.0, cross**2 - square * rest))
    return Retention(float(kept / whole), float((cross - half) / square), float((cross + half) / square))
