"""Which models are worth choosing: those that no other beats in size and in quality at once.

One model dominates another that is no smaller and no better, and is larger or worse; those that none
dominates are the frontier (Kung, Luccio and Preparata 1975, doi:10.1145/321906.321910). Models alike in both
do not dominate each other. A loss is an estimate, though: a model off the frontier may still belong to it. It
is out only where one no larger is better beyond doubt, its whole interval below the other's. A model whose
size or loss is not known is neither on the frontier nor in the way of another.
"""

import numpy as np
from numpy.typing import ArrayLike, NDArray


def frontier(sizes: ArrayLike, losses: ArrayLike) -> NDArray[np.bool_]:
    """Which of the models `[models]` none dominates; of both numbers less is better."""
    size, loss = np.asarray(sizes, np.float64), np.asarray(losses, np.float64)
    no_worse = (size[:, None] <= size) & (loss[:, None] <= loss)
    better = (size[:, None] < size) | (loss[:, None] < loss)
    known = np.isfinite(size) & np.isfinite(loss)
    return np.asarray(known & ~(known[:, None] & no_worse & better).any(axis=0))


def contenders(sizes: ArrayLike, lows: ArrayLike, highs: ArrayLike) -> NDArray[np.bool_]:
    """Which of the models `[models]` none surely dominates, given intervals of their losses.

    An end of an interval may be infinite, where it is not known.
    All of the frontier of losses inside these intervals are among them.
    """
    size, low, high = (np.asarray(values, np.float64) for values in (sizes, lows, highs))
    known = np.isfinite(size) & ~np.isnan(low) & ~np.isnan(high)
    return np.asarray(known & ~(known[:, None] & (size[:, None] <= size) & (high[:, None] < low)).any(axis=0))
