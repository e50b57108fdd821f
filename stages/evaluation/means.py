"""A mean and its standard error, summed exactly."""

import math
from collections.abc import Sequence


def mean(values: Sequence[float]) -> float:
    """Return the mean of at least one value."""
    return math.fsum(values) / len(values)


def standard_error(values: Sequence[float]) -> float | None:
    """Return the standard error of the mean; None for a single value."""
    if len(values) < 2:
        return None
    center = mean(values)
    spread = math.fsum((value - center) ** 2 for value in values)
    return math.sqrt(spread / (len(values) - 1) / len(values))
