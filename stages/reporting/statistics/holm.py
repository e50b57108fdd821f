"""Many comparisons at once: Holm's correction (1979, Scandinavian Journal of Statistics 6, 65-70).

Of twenty comparisons of equal models one passes p <= 0.05 by luck. Holm multiplies the smallest p-value by
their number, the next by one less and so on, and lets none be smaller than the one before. A corrected
p-value at or below the level then means: the chance of even one false alarm in the whole family is at most
that level, however the comparisons depend on each other.
"""

import math
from collections.abc import Sequence


def holm(p_values: Sequence[float]) -> list[float]:
    """Corrected p-values, in the order given; a NaN is no comparison, stays NaN and is not counted."""
    corrected = [math.nan] * len(p_values)
    order = sorted((p, place) for place, p in enumerate(p_values) if not math.isnan(p))
    least = 0.0
    for rank, (p, place) in enumerate(order):
        least = max(least, min(1.0, (len(order) - rank) * p))
        corrected[place] = least
    return corrected
