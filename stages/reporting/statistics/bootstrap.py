"""The bootstrap: how sure a number computed from per-item scores is, by drawing the items again many times.

Items are drawn with replacement and whole, with the scores of all models on them, so that an item's
difficulty stays with it (the paired bootstrap). Items of different kinds, such as levels of difficulty, are
drawn within their kind (stratified), because the number of each is fixed by design. The interval is either
the middle 95 % of the draws (percentile) or those percentiles corrected for bias and skew (BCa), which is
better for few items (Efron and Tibshirani 1993, An Introduction to the Bootstrap, chapter 14; with strata
Davison and Hinkley 1997, Bootstrap Methods and their Application, section 5.3).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, TypeAlias

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats

from stages.core.errors import Refusal
from stages.reporting.statistics.paired import LEVEL, refuse_missing

_DRAWS = 9999
_CHUNK = 2**22
"""Drawn items held in memory at once."""

_Floats: TypeAlias = NDArray[np.float64]
StatisticOfMeans: TypeAlias = Callable[[_Floats], _Floats]
"""From means `[..., strata, columns]`, strata in sorted order, to `[...]`."""


@dataclass(frozen=True)
class Estimate:
    """A statistic, its bootstrap standard error, its interval, and the two-sided p-value that it is zero."""

    value: float
    stderr: float
    """NaN if the statistic is infinite in some draw, as a ratio may be."""
    low: float
    high: float
    p: float


def bootstrap(
    values: ArrayLike,
    statistic: StatisticOfMeans,
    strata: ArrayLike | None = None,
    *,
    seed: int,
    draws: int = _DRAWS,
    method: Literal["bca", "percentile"] = "bca",
    level: float = LEVEL,
) -> Estimate:
    """Estimate a statistic of means of per-item scores.

    A draw in which the statistic is undefined, as 0 / 0 is, does not count.

    Args:
        values: `[items, columns]`, a column for each model or condition.
        strata: `[items]`, the stratum of each item; None for a single stratum.
        level: the share of intervals that may miss, 0.05 for an interval of 95 %.

    Raises:
        Refusal: there are no items, a stratum has a single item, whose spread cannot be known, or a score
            is not finite; or more than a tenth of the draws leave the statistic undefined.
    """
    scores = np.asarray(values, dtype=np.float64)
    if not len(scores):
        raise Refusal("a bootstrap needs at least two items, and there are none.")
    refuse_missing("scores", scores)
    _, stratum = np.unique(
        np.zeros(len(scores)) if strata is None else np.asarray(strata), return_inverse=True
    )
    parts = [scores[stratum == kind] for kind in range(stratum.max() + 1)]
    if single := [len(part) for part in parts if len(part) < 2]:
        raise Refusal(
            f"{len(single)} strata have a single item; a bootstrap within strata needs two in each."
        )
    means = np.stack([part.mean(axis=0) for part in parts])
    value = float(statistic(means))
    random = np.random.default_rng(seed)
    drawn = statistic(np.stack([_drawn_means(part, draws, random) for part in parts], axis=1))
    drawn = drawn[~np.isnan(drawn)]
    if len(drawn) < 0.9 * draws:
        raise Refusal(
            f"{draws - len(drawn)} of {draws} draws leave the statistic undefined; score more items."
        )
    draws = len(drawn)
    below = ((drawn < value).sum() + (drawn == value).sum() / 2) / draws
    bias = skew = 0.0
    if method == "bca" and 0 < below < 1:
        bias, skew = float(stats.norm.ppf(below)), _skew(parts, means, statistic)
    reach = stats.norm.ppf([level / 2, 1 - level / 2]) + bias
    low, high = np.quantile(drawn, stats.norm.cdf(bias + reach / (1 - skew * reach)))
    # p is the level at which an end of the interval is zero; half a draw on either side keeps it above 0.
    zero = stats.norm.ppf(((drawn < 0).sum() + (drawn == 0).sum() / 2 + 0.5) / (draws + 1)) - bias
    tail = stats.norm.cdf(zero / (1 + skew * zero) - bias)
    stderr = float(drawn.std(ddof=1)) if np.isfinite(drawn).all() else math.nan
    return Estimate(value, stderr, float(low), float(high), float(min(1.0, 2 * min(tail, 1 - tail))))


def _drawn_means(part: _Floats, draws: int, random: np.random.Generator) -> _Floats:
    """Return the means of `draws` samples of a stratum's items, `[draws, columns]`."""
    count = len(part)
    each = max(1, _CHUNK // count)
    sizes = [min(each, draws - start) for start in range(0, draws, each)]
    shares = np.full(count, 1 / count)
    return np.concatenate([random.multinomial(count, shares, size) @ part / count for size in sizes])


def _skew(parts: list[_Floats], means: _Floats, statistic: StatisticOfMeans) -> float:
    """Return BCa's acceleration, from the statistic without each item in turn."""
    cubes = squares = 0.0
    for kind, part in enumerate(parts):
        count = len(part)
        without = np.repeat(means[None], count, axis=0)
        without[:, kind] = (count * means[kind] - part) / (count - 1)
        left = statistic(without)
        influence = (count - 1) * (left.mean() - left)
        cubes += float((influence**3).sum()) / count**3
        squares += float((influence**2).sum()) / count**2
    return cubes / (6 * squares**1.5) if squares > 0 else 0.0
