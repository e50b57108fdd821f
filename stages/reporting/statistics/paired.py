"""Whether a model is better than another on the same items, or merely lucky.

Models that answer the same items are compared item by item. That takes the items' own difficulty out of the
comparison and finds far smaller differences than two separate error bars would.

- Right or wrong answers: McNemar's exact test with the mid-p correction. Only items that one model gets
  right and the other wrong count; if the models were equal, each such item would fall either way like a
  fair coin. The plain exact test errs far less often than its level and so misses differences; the mid-p
  counts the observed outcome by half (Fagerland, Lydersen and Laake 2013, doi:10.1186/1471-2288-13-91).
- Numbers (nats a token of a window of text): the paired t interval of the mean difference.
- No worse, or the same within a margin: finding no difference does not prove that there is none. Two
  one-sided t tests (TOST; Schuirmann 1987, doi:10.1007/BF01068419) test that the difference lies inside the
  margin.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike
from scipy import stats

from stages.core.errors import Refusal

LEVEL = 0.05
"""The p-value at or below which a difference is more than luck."""
Z = float(stats.norm.ppf(1 - LEVEL / 2))
POWER = Z + float(stats.norm.ppf(0.8))
"""Standard errors that an effect must measure to be seen in four of five studies."""


@dataclass(frozen=True)
class Interval:
    """A mean difference, its standard error, its 95 % interval, and the p-value that it is zero."""

    mean: float
    stderr: float
    low: float
    high: float
    p: float


def refuse_missing(noun: str, *arrays: ArrayLike) -> None:
    """Refuse values that are not finite, as a missing value could pass for a small p-value.

    Args:
        noun: names the values in the message.

    Raises:
        Refusal: some are NaN or infinite.
    """
    values = np.concatenate([np.ravel(np.asarray(array, dtype=np.float64)) for array in arrays])
    if missing := int((~np.isfinite(values)).sum()):
        raise Refusal(f"{missing} of {values.size} {noun} are NaN or infinite; leave those items out.")


def discordant(
    base: Sequence[float], ours: Sequence[float], higher_is_better: bool = True
) -> tuple[int, int]:
    """Count the items lost and won: those with a worse and a better score in `ours` than in `base`."""
    pairs = list(zip(base, ours, strict=True))
    fell, rose = sum(new < old for old, new in pairs), sum(new > old for old, new in pairs)
    return (fell, rose) if higher_is_better else (rose, fell)


def mcnemar(lost: int, won: int) -> float:
    """Return the two-sided mid-p of `lost` and `won` items from a fair coin; 1 when there are none."""
    coin = stats.binom(lost + won, 0.5)
    fewer = min(lost, won)
    return min(1.0, float(2 * coin.cdf(fewer) - coin.pmf(fewer)))


def interval(differences: Sequence[float]) -> Interval | None:
    """Return paired t statistics of per-item differences, in their unit.

    Returns:
        None for fewer than two items, or where a difference is not finite.
    """
    count = len(differences)
    if count < 2 or not all(map(math.isfinite, differences)):
        return None
    mean = math.fsum(differences) / count
    spread = math.fsum((value - mean) * (value - mean) for value in differences)  # a power would overflow
    stderr = math.sqrt(spread / (count - 1) / count)
    if stderr == 0:
        return Interval(mean, 0.0, mean, mean, 1.0 if mean == 0 else 0.0)
    reach = float(stats.t.ppf(1 - LEVEL / 2, count - 1)) * stderr
    p = 2 * float(stats.t.sf(abs(mean) / stderr, count - 1))
    return Interval(mean, stderr, mean - reach, mean + reach, p)


def stderr_of(low: float, high: float, count: int) -> float:
    """Return the standard error behind the 95 % interval of the mean difference of `count` items."""
    return (high - low) / 2 / float(stats.t.ppf(1 - LEVEL / 2, count - 1))


def equivalence(difference: Interval, count: int, low: float, high: float) -> float:
    """Test that a mean difference lies between `low` and `high` (TOST): p is small where it surely does.

    Args:
        difference: the paired t statistics of `count` items.
        high: infinity tests for non-inferiority only, a mean above `low`.

    Returns:
        The larger of the two one-sided p-values.
    """
    if difference.stderr == 0:
        return 0.0 if low < difference.mean < high else 1.0
    ts = ((difference.mean - low) / difference.stderr, (high - difference.mean) / difference.stderr)
    return float(max(stats.t.sf(t, count - 1) for t in ts))


def smallest_shown(differences: Sequence[float]) -> float:
    """Return the smallest mean difference that these items show in four of five evaluations, at 5 %.

    It is (z.975 + z.8) sqrt(rho / n) for right and wrong answers, rho the share of items that differ. Where
    none differs, up to 3 / n still may (at 95 %).
    """
    squares = math.fsum(value * value for value in differences) or 3.0
    return POWER * math.sqrt(squares) / len(differences)
