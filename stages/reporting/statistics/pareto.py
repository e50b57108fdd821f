"""Which models are worth choosing: those that no other model beats in size and quality at once.

A model dominates another if it is no larger and no worse, and smaller or better; models that none dominates
are the frontier (Kung, Luccio and Preparata 1975, doi:10.1145/321906.321910). Models equal in both do not
dominate each other. A loss is an estimate, though, so a model off the frontier may still belong to it. It
is out only where a model no larger is better beyond doubt: its whole interval lies below. A model of
unknown size or loss is neither on the frontier nor dominates another.
"""

import numpy as np
from numpy.typing import ArrayLike, NDArray


def frontier(sizes: ArrayLike, losses: ArrayLike) -> NDArray[np.bool_]:
    """Mark the models `[models]` that none dominates; smaller sizes and losses are better."""
    size, loss = np.asarray(sizes, np.float64), np.asarray(losses, np.float64)
    no_worse = (size[:, None] <= size) & (loss[:, None] <= loss)
    better = (size[:, None] < size) | (loss[:, None] < loss)
    known = np.isfinite(size) & np.isfinite(loss)
    return np.asarray(known & ~(known[:, None] & no_worse & better).any(axis=0))


def contenders(sizes: ArrayLike, lows: ArrayLike, highs: ArrayLike) -> NDArray[np.bool_]:
    """Mark the models `[models]` that none surely dominates, given intervals of their losses.

    An unknown end of an interval is infinite. For any losses inside the intervals, the whole frontier is
    marked.
    """
    size, low, high = (np.asarray(values, np.float64) for values in (sizes, lows, highs))
    known = np.isfinite(size) & ~np.isnan(low) & ~np.isnan(high)
    return np.asarray(known & ~(known[:, None] & (size[:, None] <= size) & (high[:, None] < low)).any(axis=0))
