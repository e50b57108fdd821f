"""The saturating curve: certified fits, and intervals only for data that bend."""

import numpy as np
import pytest
from scipy import optimize

from stages.core.errors import Refusal
from stages.reporting.statistics.saturation import STRAIGHT, fit, saturation
from tests.chance import is_at_most, rate

# NIST Statistical Reference Datasets: y = b1 (1 - exp(-b2 x)), certified b1, b2 and residual sum of squares.
MISRA = (
    [77.6, 114.9, 141.1, 190.8, 239.9, 289.0, 332.8, 378.4, 434.8, 477.3, 536.8, 593.1, 689.1, 760.0],
    [10.07, 14.73, 17.94, 23.93, 29.61, 35.18, 40.02, 44.82, 50.76, 55.05, 61.01, 66.40, 75.47, 81.78],
    (2.3894212918e02, 5.5015643181e-04, 1.2455138894e-01),
)
BOX = (
    [1, 2, 3, 5, 7, 10],
    [109, 149, 149, 191, 213, 224],
    (2.1380940889e02, 5.4723748542e-01, 1.1680088766e03),
)
BUDGETS = np.array([1.0, 2, 4, 8, 16, 32])


@pytest.mark.parametrize(("x", "y", "certified"), [MISRA, BOX])
def test_fits_match_nists_certified_values(x, y, certified):
    # Their curve starts at the origin: a point that the fit may not miss makes ours do so as well.
    a, b, c = fit([0, *x], [0, *y], [1e9, *np.ones(len(x))])
    assert (a, b, 1 / c) == pytest.approx((certified[0], certified[0], certified[1]), rel=2e-6)
    left = y - (a - b * np.exp(-np.array(x) / c))
    assert (left**2).sum() == pytest.approx(certified[2], rel=1e-6)


def test_fits_are_least_squares_in_either_direction():
    random = np.random.default_rng(0)
    truth = np.array([[0.8, 0.5, 6.0], [0.2, -0.6, 3.0], [50.0, 20.0, 10.0]])
    y = truth[:, :1] - truth[:, 1:2] * np.exp(-(BUDGETS + 3) / truth[:, 2:])
    assert np.stack(fit(BUDGETS + 3, y), axis=-1) == pytest.approx(truth, rel=1e-6)
    noisy = y + random.normal(0, 0.02, y.shape)
    for curve, a, b, c in zip(noisy, *fit(BUDGETS + 3, noisy), strict=True):
        theirs, _ = optimize.curve_fit(
            lambda x, a, b, c: a - b * np.exp(-x / c), BUDGETS + 3, curve, (a, b, c)
        )
        assert (a, b, c) == pytest.approx(tuple(theirs), rel=1e-4)


def answers(known, random, items=200):
    """Return right (1) or wrong (0), `[items, budgets]`; a hard item is hard at every budget."""
    return (random.random((items, 1)) + random.normal(0, 0.1, (items, len(known))) < known).astype(float)


def test_only_data_that_bend_have_an_end():
    random = np.random.default_rng(1)
    bent = 0.7 - 0.5 * np.exp(-BUDGETS / 5)
    curve = saturation(BUDGETS, answers(bent, random, 2000), seed=0)
    assert curve.bends
    assert curve.a_interval[0] < curve.a < curve.a_interval[1]
    assert curve.c_interval[0] < curve.c < curve.c_interval[1]
    assert curve.at([0, 1e6]) == pytest.approx([curve.a - curve.b, curve.a])
    assert curve == saturation(BUDGETS, answers(bent, np.random.default_rng(1), 2000), seed=0)
    straight = saturation(BUDGETS, answers(0.2 + 0.015 * BUDGETS, random), seed=0)
    assert (straight.bends, straight.a_interval, straight.c_interval) == (False, None, None)
    upward = saturation(BUDGETS, answers(0.1 + 0.0005 * BUDGETS**2, random), seed=0)
    assert upward.c > 0.99 * STRAIGHT * 31
    assert not upward.bends


def test_lines_seldom_bend_curves_mostly_do_and_intervals_cover_the_plateau():
    random = np.random.default_rng(2)
    lines = [
        saturation(BUDGETS, answers(known, random), seed=0, draws=199).bends
        for known in ([0.2 + 0.015 * BUDGETS] * 100 + [np.full(6, 0.5)] * 100)
    ]
    assert is_at_most(lines, 0.05)
    curves = [
        saturation(BUDGETS, random.normal(0.7 - 0.5 * np.exp(-BUDGETS / 5), 0.3, (200, 6)), seed=0, draws=199)
        for _ in range(120)
    ]
    assert rate(curve.bends for curve in curves)[1] > 0.9
    assert is_at_most(
        [not curve.a_interval[0] <= 0.7 <= curve.a_interval[1] for curve in curves if curve.bends], 0.05
    )


@pytest.mark.parametrize("share", [0.0, 1.0, 0.3])
def test_scores_that_do_not_change_have_no_bend(share):
    random = np.random.default_rng(3)
    items = np.repeat(random.random((50, 1)) if share == 0.3 else np.full((50, 1), share), 6, axis=1)
    curve = saturation(BUDGETS, items, seed=0)
    assert (curve.bends, curve.a_interval, curve.c_interval) == (False, None, None)
    assert curve.at(BUDGETS) == pytest.approx(items.mean(axis=0))


def test_missing_scores_are_refused():
    scores = np.where(np.eye(50, 6) > 0, np.nan, 0.5)
    with pytest.raises(Refusal, match="6 of 300 scores are NaN or infinite"):
        saturation(BUDGETS, scores, seed=0)
    with pytest.raises(Refusal, match="values are NaN or infinite"):
        fit([1, 2, 3, np.inf], [0.1, 0.2, 0.3, 0.3])


def test_too_few_points_or_items_are_refused():
    with pytest.raises(Refusal, match="four distinct x, not 3"):
        fit([1, 2, 3, 3], [0.1, 0.2, 0.3, 0.3])
    with pytest.raises(Refusal, match="two items, not 1"):
        saturation(BUDGETS, np.ones((1, 6)), seed=0)
