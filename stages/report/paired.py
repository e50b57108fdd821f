"""Is one model better than another on the same items, or was it luck?

Two models that answer the same items are compared item by item, which takes the items' own difficulty
out of the comparison and finds far smaller differences than two separate error bars would.

- Right or wrong answers: the exact McNemar test. Only items that one model gets right and the other
  wrong say anything; were the models equal, each such item would fall either way like a fair coin.
- Numbers (nats a token of a window of text): the paired t interval of the mean difference.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from scipy import stats

LEVEL = 0.05
"""Below this p-value a difference is more than luck; one comparison in twenty of equals passes it too."""


@dataclass(frozen=True)
class Interval:
    """A mean difference, its standard error, its 95 % interval, and p of a mean of zero."""

    mean: float
    stderr: float
    low: float
    high: float
    p: float


def discordant(
    base: Sequence[float], ours: Sequence[float], higher_is_better: bool = True
) -> tuple[int, int]:
    """Items lost and items won: those whose score is worse and better in `ours` than in `base`."""
    pairs = list(zip(base, ours, strict=True))
    fell, rose = sum(new < old for old, new in pairs), sum(new > old for old, new in pairs)
    return (fell, rose) if higher_is_better else (rose, fell)


def mcnemar(lost: int, won: int) -> float:
    """Two-sided exact p-value that `lost` and `won` items come from a fair coin; 1 when there are none."""
    return float(stats.binomtest(won, lost + won).pvalue) if lost + won else 1.0


def interval(differences: Sequence[float]) -> Interval | None:
    """Paired t statistics of per-item differences, in their unit; None for fewer than two items."""
    count = len(differences)
    if count < 2:
        return None
    mean = math.fsum(differences) / count
    spread = math.fsum((value - mean) ** 2 for value in differences)
    stderr = math.sqrt(spread / (count - 1) / count)
    if stderr == 0:
        return Interval(mean, 0.0, mean, mean, 1.0 if mean == 0 else 0.0)
    reach = float(stats.t.ppf(1 - LEVEL / 2, count - 1)) * stderr
    p = 2 * float(stats.t.sf(abs(mean) / stderr, count - 1))
    return Interval(mean, stderr, mean - reach, mean + reach, p)
