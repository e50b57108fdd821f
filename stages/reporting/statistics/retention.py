"""What a compressed model kept of what the dense one can do, not counting what anyone gets for nothing.

A model that guesses among four choices scores 0.25. Of 0.60, a score of 0.25 is not 42 % kept: it is
nothing. With the floor f taken off both, the retention is (s - f) / (d - f), where s and d are the scores of
the compressed and the dense model.

A ratio says nothing where its denominator may be zero: where the dense model is not clearly above the floor
there is nothing to keep, and the retention is undefined. Its interval is Fieller's (1954, doi:10.1111/
j.2517-6161.1954.tb00159.x) on items both models answered. That interval is finite exactly where the dense
model is above the floor by a one-sided test at half the level of the interval, so one test decides both.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

from stages.reporting.statistics.paired import LEVEL


@dataclass(frozen=True)
class Retention:
    """The share kept and its 95 % interval; 1 is all, 0 is the floor, both may be passed."""

    value: float
    low: float
    high: float


def retention(dense: Sequence[float], ours: Sequence[float], floor: float) -> Retention | None:
    """The floor-corrected retention of per-item scores, higher better, of the same items in the same order.

    Args:
        floor: the mean score that needs no ability, taken as known.

    Returns:
        None where the dense model is not clearly above the floor (one-sided t test, p > 0.025), for fewer
        than two items, or where a score or the floor is no finite number.
    """
    count = len(dense)
    scores = np.array([ours, dense], dtype=np.float64)
    if count < 2 or not (np.isfinite(scores).all() and math.isfinite(floor)):
        return None
    kept, whole = scores.mean(axis=1) - floor
    (kept_var, both_var), (_, whole_var) = np.cov(scores) / count
    reach = float(stats.t.ppf(1 - LEVEL / 2, count - 1)) ** 2
    # The ratios r for which the mean of (ours - floor) - r (dense - floor) is not clearly other than 0 are
    # those between the roots of square r^2 - 2 cross r + rest.
    square, cross = whole**2 - reach * whole_var, kept * whole - reach * both_var
    if whole <= 0 or square <= 0:
        return None
    rest = kept**2 - reach * kept_var
    half = math.sqrt(max(0.0, cross**2 - square * rest))
    return Retention(float(kept / whole), float((cross - half) / square), float((cross + half) / square))
