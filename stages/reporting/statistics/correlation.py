"""Whether two measures of a few models go together: a correlation judged by all pairings of their values.

Six or seven models are too few for the t distribution of a correlation. If the measures were unrelated,
every pairing of their values would be equally likely, so the p-value is the share of all pairings whose
correlation is at least as large in absolute value (Pitman 1937, doi:10.2307/2983647). Beyond nine models
pairings are drawn, and the observed one counts as drawn (Phipson and Smyth 2010,
doi:10.2202/1544-6115.1585).
"""

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats

from stages.core.errors import Refusal
from stages.reporting.statistics.paired import refuse_missing

_EXACT_PAIRS = 9
_DRAWS = 99_999


@dataclass(frozen=True)
class Correlation:
    """A correlation, its two-sided p-value, and whether all pairings were counted."""

    value: float
    p: float
    exact: bool


def correlation(
    x: ArrayLike, y: ArrayLike, kind: Literal["spearman", "pearson"] = "spearman", *, seed: int = 0
) -> Correlation:
    """Correlate `x` with `y`, both `[pairs]`.

    Args:
        seed: seeds the draw of pairings where there are too many to count.

    Raises:
        Refusal: there are fewer than three pairs, `x` or `y` does not vary, or a value is not finite.
    """
    refuse_missing("values", x, y)
    sides = [np.asarray(side, dtype=np.float64) for side in (x, y)]
    if len(sides[0]) != len(sides[1]) or len(sides[0]) < 3 or any(np.ptp(side) == 0 for side in sides):
        raise Refusal(
            f"a correlation needs at least three pairs whose values are not all the same; there are "
            f"{len(sides[0])} and {len(sides[1])} values."
        )
    if kind == "spearman":
        sides = [stats.rankdata(side) for side in sides]
    ours, other = ((side - side.mean()) / np.linalg.norm(side - side.mean()) for side in sides)

    def strength(permuted: NDArray[np.float64], axis: int) -> NDArray[np.float64]:
        return np.abs(np.tensordot(np.moveaxis(permuted, axis, -1), other, axes=1))

    exact = len(ours) <= _EXACT_PAIRS
    test = stats.permutation_test(
        (ours,),
        strength,
        permutation_type="pairings",
        n_resamples=math.inf if exact else _DRAWS,
        alternative="greater",
        vectorized=True,
        batch=10_000,
        rng=np.random.default_rng(seed),
    )
    return Correlation(float(ours @ other), float(test.pvalue), exact)
