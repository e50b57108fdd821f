"""The luck of a draw: whether an effect is more than what other draws of the same recipes would give.

A calibrated method reads text that was drawn, and another draw gives another model. Models of one recipe that
differ in the draw alone are its repeats: their mean estimates what the recipe does, their standard deviation
s (with m - 1 in its denominator) how far a single model may be from that. The mean of m repeats has the
standard error s / sqrt(m). An effect of it is judged by Student's t with m - 1 degrees of freedom: three
repeats ask for 2.5 s, five for 1.2 s. Where several recipes enter an effect, their squared errors add up,
with the degrees of freedom of Welch (1947, doi:10.1093/biomet/34.1-2.28).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike
from scipy import stats

from stages.reporting.statistics.paired import LEVEL


@dataclass(frozen=True)
class Luck:
    """An effect of the mean over repeats, its standard error and the degrees of freedom of that."""

    value: float
    stderr: float
    freedom: float

    @property
    def noise(self) -> float:
        """The half-width of the 95 % interval: a smaller effect may be the luck of the draws."""
        return float(stats.t.ppf(1 - LEVEL / 2, self.freedom)) * self.stderr

    def p(self, bound: float) -> float:
        """Return the two-sided p-value that the effect equals `bound`."""
        if self.stderr == 0:
            return float(self.value == bound)
        return float(2 * stats.t.sf(abs(self.value - bound) / self.stderr, self.freedom))


def luck_of(value: float, repeats: Sequence[ArrayLike]) -> Luck:
    """Return an effect that is the sum of means over repeats and of what has none.

    Args:
        value: the effect, in any unit.
        repeats: for each recipe `[repeats]`, at least two, in the same unit: what each adds to the effect.
    """
    parts = [np.asarray(part, np.float64) for part in repeats]
    squares = [float(part.var(ddof=1)) / len(part) for part in parts]
    total = math.fsum(squares)
    spread = math.fsum(square**2 / (len(part) - 1) for square, part in zip(squares, parts, strict=True))
    return Luck(value, math.sqrt(total), total**2 / spread if spread else 1.0)
