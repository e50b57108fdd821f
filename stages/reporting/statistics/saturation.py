"""Estimate the plateau of a score that rises ever more slowly, by fitting a - b exp(-x / c).

x is a budget, such as tokens of training or of thought; a is the score at an unlimited budget, b how far
below it the score starts at x = 0, and c the budget over which the remaining distance shrinks by a factor e
(asymptotic regression: Ratkowsky 1990, Handbook of Nonlinear Regression Models; Bates and Watts 1988,
Nonlinear Regression Analysis, appendix A). For a given c the best a and b follow from linear regression, so
only c is searched (variable projection: Golub and Pereyra 1973, doi:10.1137/0710036).

A curve that has not begun to bend does not show its plateau: a straight line fits it with any a. So the
items are drawn again (see `stages.reporting.statistics.bootstrap`), and no interval is returned where a line
fits more than 2.5 % of the draws best, or where fewer than 97.5 % of them have a b of the same sign.
"""

import math
from dataclasses import dataclass, field
from typing import TypeAlias

import numpy as np
from numpy.typing import ArrayLike, NDArray

from stages.core.errors import Refusal
from stages.reporting.statistics.paired import LEVEL, refuse_missing

_DRAWS = 1999
_SCALES = 240
"""Values of c tried first, a constant factor apart; the best is then refined between its neighbours."""
STRAIGHT = 20.0
"""The c, in ranges of x, from which on a curve counts as straight: it bends by under 1 % of its rise."""
_Floats: TypeAlias = NDArray[np.float64]


@dataclass(frozen=True)
class Saturation:
    """The curve, and 95 % intervals of a and of c, both None unless the data bend (`bends`)."""

    a: float
    b: float
    c: float
    bends: bool
    a_interval: tuple[float, float] | None
    c_interval: tuple[float, float] | None
    excess: _Floats = field(compare=False)
    """`[draws]`: a minus the reference's mean, over the same drawn items; empty without a reference."""

    def at(self, x: ArrayLike) -> _Floats:
        """Return the curve at `x`; beyond the data it is a guess unless `bends`."""
        return self.a - self.b * np.exp(-np.asarray(x, dtype=np.float64) / self.c)


def fit(x: ArrayLike, y: ArrayLike, weights: ArrayLike | None = None) -> tuple[_Floats, _Floats, _Floats]:
    """Fit curves `y` `[..., points]` over `x` `[points]` by least squares; return a, b and c, each `[...]`.

    Args:
        weights: `[points]`, of the squared errors; None for equal weights.

    Raises:
        Refusal: there are fewer than four distinct x, which three parameters would fit without error, or a
            value is not finite.
    """
    refuse_missing("values", x, y)
    points, curves = np.asarray(x, np.float64), np.asarray(y, np.float64)
    if (distinct := len(np.unique(points))) < 4:
        raise Refusal(f"a saturating curve has three parameters and needs four distinct x, not {distinct}.")
    weight = np.ones(len(points)) if weights is None else np.asarray(weights, np.float64)
    share = weight / weight.sum()
    span = float(np.ptp(points))
    closest = float(np.diff(np.unique(points)).min())
    grid = np.linspace(math.log(closest / 10), math.log(STRAIGHT * span), _SCALES)

    def line(logs: _Floats) -> tuple[_Floats, _Floats, _Floats]:
        """Return the weighted error, a and b for scales `[..., tried]` of each curve."""
        # Measure x from its minimum, or exp(-x / c) could vanish at every point.
        decay = np.exp(-(points - points.min()) / np.exp(logs)[..., None])
        decay_mean, mean = decay @ share, (curves @ share)[..., None]
        apart = decay - decay_mean[..., None]
        slope = np.einsum("...sp,...p,p->...s", apart, curves, share) / ((apart**2) @ share)
        left = curves[..., None, :] - mean[..., None] - slope[..., None] * apart
        return (left**2) @ share, mean - slope * decay_mean, -slope

    tried = np.broadcast_to(grid, (*curves.shape[:-1], _SCALES))
    best = np.argmin(line(tried)[0], axis=-1)
    low, high = grid[np.maximum(best - 1, 0)], grid[np.minimum(best + 1, _SCALES - 1)]
    golden = (math.sqrt(5) - 1) / 2
    while float((high - low).max()) > 1e-10:
        inner = np.stack([high - golden * (high - low), low + golden * (high - low)], axis=-1)
        errors = line(inner)[0]
        left = errors[..., 0] <= errors[..., 1]
        low, high = np.where(left, low, inner[..., 0]), np.where(left, inner[..., 1], high)
    logs = (low + high) / 2
    _, a, b = (values[..., 0] for values in line(logs[..., None]))
    c = np.exp(logs)
    return a, b * np.exp(points.min() / c), c


def saturation(
    x: ArrayLike, scores: ArrayLike, *, reference: ArrayLike | None = None, seed: int, draws: int = _DRAWS
) -> Saturation:
    """Fit the curve to the means of per-item `scores` `[items, points]` over `x` `[points]`.

    Args:
        reference: `[items]`, scores that the plateau is compared with.

    Raises:
        Refusal: there are fewer than four distinct x or two items, or a score is not finite.
    """
    items = np.asarray(scores, dtype=np.float64)
    if len(items) < 2:
        raise Refusal(f"drawing items again needs at least two items, not {len(items)}.")
    refuse_missing("scores", items)
    count = len(items)
    random = np.random.default_rng(seed)
    times = random.multinomial(count, np.full(count, 1 / count), draws)
    drawn = times @ items / count
    a, b, c = (float(parameter) for parameter in fit(x, items.mean(axis=0)))
    ends, rises, scales = fit(x, drawn)
    straight = scales > 0.99 * STRAIGHT * np.ptp(np.asarray(x, np.float64))
    tail = LEVEL / 2
    # Scores that are the same at every x rise by rounding errors, whose sign means nothing.
    flat = np.ptp(drawn, axis=1) <= 1e-12 * np.abs(items).max()
    one_sided = max((~flat & (rises > 0)).mean(), (~flat & (rises < 0)).mean()) >= 1 - tail
    bends = bool(straight.mean() <= tail and one_sided)

    def middle(values: _Floats) -> tuple[float, float]:
        low, high = np.quantile(values, [tail, 1 - tail])
        return float(low), float(high)

    excess = np.empty(0)
    if reference is not None:
        refuse_missing("scores", reference)
        excess = ends - times @ np.asarray(reference, np.float64) / count
    of_a, of_c = (middle(ends), middle(scales)) if bends else (None, None)
    return Saturation(a, b, c, bends, of_a, of_c, excess)
