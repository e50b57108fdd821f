"""Holm's correction for many comparisons at once (1979, Scandinavian Journal of Statistics 6, 65-70).

Of twenty comparisons of equal models, one passes p <= 0.05 by luck. Holm multiplies the smallest p-value by
the number of comparisons, the next by one less and so on, and raises each to at least the one before. If
p-values at or below a level then count, the chance of even one false alarm in the family is at most that
level, however the comparisons depend on each other.
"""

import math
from collections.abc import Sequence


def holm(p_values: Sequence[float]) -> list[float]:
    """Return corrected p-values in the same order; a NaN stays NaN and does not count as a comparison."""
    corrected = [math.nan] * len(p_values)
    order = sorted((p, place) for place, p in enumerate(p_values) if not math.isnan(p))
    least = 0.0
    for rank, (p, place) in enumerate(order):
        least = max(least, min(1.0, (len(order) - rank) * p))
        corrected[place] = least
    return corrected
