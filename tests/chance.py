"""Error rates of simulated tests, judged by their own chance."""

from collections.abc import Iterable

from scipy import stats

DOUBT = 1e-4
"""How often a correct test may fail these checks over all seeds."""


def rate(passed: Iterable[bool]) -> tuple[float, float, float]:
    """Return the share of true outcomes and an interval of its probability (Clopper-Pearson)."""
    outcomes = [bool(outcome) for outcome in passed]
    hits = stats.binomtest(sum(outcomes), len(outcomes))
    low, high = hits.proportion_ci(1 - DOUBT)
    return hits.statistic, low, high


def is_nominal(rejected: Iterable[bool], level: float) -> bool:
    """Tell whether tests of a true null hypothesis may reject it at a rate of `level`."""
    _, low, high = rate(rejected)
    return bool(low <= level <= high)


def is_at_most(rejected: Iterable[bool], level: float) -> bool:
    """Tell whether the rate may be `level` or less, as for an exact test on few outcomes."""
    return bool(rate(rejected)[1] <= level)
