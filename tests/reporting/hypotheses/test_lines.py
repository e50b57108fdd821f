"""Trends, slopes, correlations, saturation and fits on tables."""

import numpy as np
import pytest
from scipy import stats

from stages.core.errors import Refusal
from stages.reporting.collect import Results
from stages.reporting.hypotheses.cells import Unknown
from stages.reporting.hypotheses.correlations import partial
from stages.reporting.hypotheses.fits import _left_out
from stages.reporting.statistics.correlation import correlation
from stages.reporting.statistics.paired import LEVEL
from stages.reporting.statistics.saturation import saturation
from stages.reporting.statistics.trend import page
from tests.chance import is_at_most, is_nominal, rate
from tests.claims import ACC, judged, leveled
from tests.results import of_items, together


def share(right: float, count: int = 60) -> list[float]:
    """Return items of which a share is right."""
    return [1.0] * round(right * count) + [0.0] * (count - round(right * count))


NAMES = ["base/m", "prune/a", "prune/b", "prune/c"]
FALLING = dict(zip(NAMES, map(share, (0.9, 0.7, 0.5, 0.3)), strict=True))


def numbered(table: Results, column: str, *values: float) -> Results:
    """Set a column of each candidate, in the order of the tables."""
    named = dict(zip(table.candidates, values, strict=True))
    return Results(table.scores.assign(**{column: table.scores["candidate"].map(named)}), table.samples)


def test_a_trend_over_candidates_is_pages_with_a_slope():
    table = numbered(of_items(FALLING), "sparsity", 0.0, 0.2, 0.4, 0.6)
    shared = {"test": "trend", "readout": ACC, "candidates": NAMES, "x": {"column": "sparsity"}}
    found = judged(table, **shared, expect="falls")
    assert found.effect == pytest.approx(-1.0)  # .2 lost per .2 of sparsity
    assert found.unit == "share right per 1 of sparsity" and found.side == "supported"
    assert found.p == pytest.approx(2 * page(np.array(list(FALLING.values()))[::-1].T).p)
    assert judged(table, **shared, expect="rises").side == "contradicted"


def test_a_trend_is_in_the_order_of_its_x_and_needs_one():
    table = numbered(of_items(FALLING), "sparsity", 0.0, 0.2, 0.4, 0.6)
    shared = {"test": "trend", "readout": ACC, "expect": "falls", "x": {"column": "sparsity"}}
    found = judged(table, **shared, candidates=NAMES)
    turned = judged(table, **shared, candidates=[NAMES[2], NAMES[0], NAMES[3], NAMES[1]])
    assert (turned.p, turned.side, turned.effect) == (found.p, found.side, pytest.approx(found.effect))
    alike = numbered(of_items(FALLING), "sparsity", 0.0, 0.2, 0.2, 0.6)
    with pytest.raises(Refusal, match="two conditions have the same x"):
        judged(alike, **shared, candidates=NAMES)


def test_a_trend_over_budgets_is_of_one_candidate():
    parts = [
        of_items({"base/m": share(right)}, budget=budget)
        for budget, right in ((8, 0.3), (16, 0.5), (32, 0.9))
    ]
    found = judged(
        together(*parts), test="trend", readout=ACC, candidates=["base/m"], budgets=[8, 16, 32],
        x={"values": [8.0, 16.0, 32.0], "log2": True}, expect="rises",
    )  # fmt: skip
    assert (found.effect, found.side, found.n) == (pytest.approx(0.3), "supported", 60)


def test_a_loss_over_levels_is_a_share_or_points():
    def level(dense, ours):
        return {"base/m": share(dense), "prune/p": share(ours)}

    table = leveled({"easy": level(0.9, 0.81), "middle": level(0.8, 0.6), "hard": level(0.6, 0.3)})
    shared = {
        "test": "trend",
        "readout": ACC,
        "candidates": ["prune/p"],
        "levels": ["easy", "middle", "hard"],
    }
    found = judged(table, **shared, expect="rises")
    assert found.effect == pytest.approx((0.5 - 49 / 54 * 0 - (1 - 49 / 54)) / 2, abs=0.01)
    assert (found.side, found.n, found.unit) == ("supported", 180, "share of the reference lost per step")
    assert found.p < 0.01
    points = judged(table, **shared, loss="points", expect="rises")
    assert points.effect == pytest.approx((0.3 - 5 / 60) / 2, abs=0.01)
    with pytest.raises(Unknown, match="has no floor"):
        judged(Results(table.scores.assign(floor=None), table.samples), **shared, expect="rises")


def test_a_slope_is_that_of_the_means_and_lines_are_subtracted():
    table = numbered(of_items(FALLING), "sparsity", 0.0, 0.2, 0.4, 0.6)
    line = {"candidates": NAMES, "x": {"column": "sparsity"}}
    found = judged(table, test="slope", readout=ACC, lines=[line], expect="below")
    assert (found.effect, found.side) == (pytest.approx(-1.0), "supported")
    flat = {"candidates": ["base/m", "base/m"], "x": {"values": [0.0, 1.0]}}
    two = judged(table, test="slope", readout=ACC, lines=[line, flat], expect="within", bound=1.5)
    assert (two.effect, two.side) == (pytest.approx(-1.0), "supported") and two.p < 0.01
    with pytest.raises(Unknown, match="so it has no logarithm"):
        judged(
            table, test="slope", readout=ACC, expect="below",
            lines=[line | {"x": {"column": "sparsity", "log2": True}}],
        )  # fmt: skip


@pytest.mark.parametrize(("least", "most", "blocked"), [(3, 40, False), (40, 3, True)])
def test_a_slope_over_budgets_needs_a_reference_above_its_floor_at_the_largest(least, most, blocked):
    right = {8: least, 16: 20, 32: most}
    parts = [
        of_items({"base/m": share(count / 60), "prune/p": share(0.3)}, budget=budget)
        for budget, count in right.items()
    ]
    table = together(*parts)
    budgets = {"budgets": list(right), "x": {"values": list(right), "log2": True}}
    found = judged(
        Results(table.scores.assign(floor=0.05), table.samples), test="slope", readout=ACC, expect="below",
        lines=[{"candidates": ["prune/p"], **budgets}, {"candidates": ["base/m"], **budgets}],
    )  # fmt: skip
    assert found.effect == pytest.approx((least - most) / 60 / 2)
    assert bool(found.blocked) == blocked


def test_slopes_over_levels_of_two_candidates_are_permuted_among_levels():
    levels = {
        name: {"base/m": share(0.95), "prune/a": share(0.9), "prune/b": share(right)}
        for name, right in (("1", 0.9), ("2", 0.6), ("3", 0.3))
    }
    lines = [
        {"candidates": [name], "levels": list(levels), "x": {"values": [1.0, 2.0, 3.0]}}
        for name in ("prune/b", "prune/a")
    ]
    found = judged(leveled(levels), test="slope", readout=ACC, lines=lines, expect="below")
    assert (found.effect, found.n, found.side) == (pytest.approx(-0.3), 180, "supported")
    assert found.p == pytest.approx(2 / 10_000)  # the least that 9999 permutations give


def two_suites(first, second, third=None) -> Results:
    """Return candidates with these shares right in suites s, t and u."""
    names = ["base/m", *(f"prune/p{i}" for i in range(1, len(first)))]
    parts = []
    for suite, values in (("s", first), ("t", second), ("u", third)):
        if values is not None:
            part = of_items({name: share(value, 1000) for name, value in zip(names, values, strict=True)})
            parts.append(Results(part.scores.assign(suite=suite), part.samples.assign(suite=suite)))
    return together(*parts)


def test_a_correlation_is_exact_and_may_hold_a_third_score_fixed():
    x = [0.9, 0.8, 0.7, 0.6, 0.5, 0.4]
    y = [0.2, 0.35, 0.3, 0.5, 0.45, 0.6]
    table = two_suites(x, y, x)
    names = table.candidates
    shared = {"test": "correlation", "candidates": names, "first": ACC, "second": ACC | {"suite": "t"}}
    found = judged(table, **shared, expect="negative")
    assert found.effect == pytest.approx(np.corrcoef(x, y)[0, 1])
    assert found.p == pytest.approx(correlation(x, y, "pearson").p)
    assert (found.side, found.n, found.units) == ("supported", 6, "candidates")
    with pytest.raises(Refusal):  # nothing is left of the first score
        judged(table, **shared, given=ACC | {"suite": "u"}, expect="negative")
    other = two_suites(x, y, [0.1, 0.3, 0.2, 0.15, 0.35, 0.25])
    assert "of the rest" in judged(other, **shared, given=ACC | {"suite": "u"}, expect="negative").unit


def test_scores_at_the_floor_correlate_with_nothing():
    table = two_suites([0.25, 0.1, 0.15, 0.2, 0.24, 0.25], [0.25, 0.12, 0.16, 0.19, 0.23, 0.25])
    table = Results(table.scores.assign(floor=0.25), table.samples)
    first, second = ({"suite": suite, "metric": "acc"} for suite in "st")
    found = judged(
        table, test="correlation", candidates=table.candidates, first=first, second=second, expect="positive"
    )
    assert found.blocked == "base/m is not clearly above the floor on s acc, t acc"
    assert found.floors == {"s acc": 0.25, "t acc": 0.25}


def test_a_fit_needs_bases_above_their_floor_and_scores_that_differ():
    x = [float(i) for i in range(10)]
    shared = {"test": "fit", "readout": ACC, "better": {"values": x}, "worse": {"values": x[::-1]}}
    low = two_suites([0.3 - 0.01 * i for i in range(10)], [0.5] * 10)
    low = Results(low.scores.assign(floor=0.29), low.samples)
    found = judged(low, **shared, candidates=low.candidates, share=True)
    assert found.blocked == "base/m is not clearly above the floor on s acc"
    same = two_suites([0.5] * 10, [0.5] * 10)
    with pytest.raises(Refusal, match="all candidates score the same on s acc"):
        judged(same, **shared, candidates=same.candidates)


def test_a_plateau_is_compared_with_the_reference():
    steps = np.array([10.0, 20, 40, 80, 160, 320])
    random = np.random.default_rng(0)
    rising = 0.7 - 0.5 * np.exp(-steps / 40)
    items = {"base/m": share(0.9, 400)} | {
        f"finetune/f{step:.0f}": (random.random(400) < right).astype(float).tolist()
        for step, right in zip(steps, rising, strict=True)
    }
    table = of_items(items)
    shared = {"test": "saturation", "readout": ACC, "candidates": table.candidates[1:], "expect": "below"}
    found = judged(table, **shared, x={"values": steps.tolist()})
    assert found.effect == pytest.approx(-0.2, abs=0.06)
    assert (found.side, found.blocked) == ("supported", "") and found.p < 0.01
    straight = of_items({"base/m": share(0.9)} | {f"finetune/f{i}": share(0.1 * i) for i in range(1, 5)})
    shared["candidates"] = straight.candidates[1:]
    assert "does not bend" in judged(straight, **shared, x={"values": [1.0, 2.0, 3.0, 4.0]}).blocked


def test_the_better_fit_is_that_of_leave_one_out():
    x = np.array([1.0, 2, 3, 4, 5, 6, 7, 8, 9, 10])
    y = 0.9 - 0.05 * x
    table = two_suites(y.tolist(), y.tolist())
    table = numbered(numbered(table, "bits", *x), "sparsity", *np.roll(x, 3))
    shared = {"test": "fit", "readout": ACC, "candidates": table.candidates}
    found = judged(table, **shared, better={"column": "bits"}, worse={"column": "sparsity"})
    assert (found.effect, found.side, found.n) == (pytest.approx(1.0), "supported", 10)
    assert found.p < 0.01
    turned = judged(table, **shared, better={"column": "sparsity"}, worse={"column": "bits"})
    assert turned.side == "contradicted" and turned.p == pytest.approx(found.p)
    random = np.random.default_rng(0)
    noisy = y + random.normal(0, 0.1, 10)
    without = [
        noisy[i] - np.polyval(np.polyfit(np.delete(x, i), np.delete(noisy, i), 1), x[i]) for i in range(10)
    ]
    assert _left_out(x, noisy, 1) == pytest.approx(without)


def fit_p(random, apart):
    """Return p of two numbers that both stand for what decides 14 scores, the second `apart` worse."""
    hidden = random.normal(size=14)
    y = hidden + random.normal(0, 0.3, 14)
    errors = [_left_out(hidden + random.normal(0, 0.4 + more, 14), y, 1) ** 2 for more in (0, apart)]
    return stats.permutation_test(
        (errors[1] - errors[0],), lambda v, axis: v.mean(axis=axis), permutation_type="samples",
        n_resamples=999, vectorized=True, rng=random,
    ).pvalue  # fmt: skip


def rest_p(random, link, count=8):
    """Return p of a correlation given a third number, all drawn for `count` candidates."""
    third = random.normal(size=count)
    first = third + random.normal(size=count)
    value = partial(first, third + link * (first - third) + random.normal(size=count), third)
    return 2 * stats.t.sf(abs(value) * np.sqrt((count - 3) / (1 - value**2)), count - 3)


def plateau_p(random, below):
    """Return p of a plateau of 300 items at five budgets that is the reference's, or below it."""
    x = np.array([10.0, 20, 40, 80, 160])
    chance = np.append(0.6 - below - 0.4 * np.exp(-x / 25), 0.6)
    own = random.random((300, 1)) * 0.5 + random.random((300, 6)) * 0.5
    items = (own < chance).astype(float)
    curve = saturation(x, items[:, :-1], reference=items[:, -1], seed=1, draws=199)
    share_below = float(((curve.excess < 0).sum() + 0.5) / 200)
    return 2 * min(share_below, 1 - share_below)


@pytest.mark.drill
def test_tests_of_few_candidates_err_at_their_level():
    random = np.random.default_rng(11)
    fits = [fit_p(random, 0.0) <= LEVEL for _ in range(800)]
    assert is_nominal(fits, LEVEL) and rate(fit_p(random, 2.0) <= LEVEL for _ in range(150))[0] > 0.5
    rest = [rest_p(random, 0.0) <= LEVEL for _ in range(800)]
    assert is_nominal(rest, LEVEL) and rate(rest_p(random, 2.0, 12) <= LEVEL for _ in range(150))[0] > 0.6
    ends = [plateau_p(random, 0.0) <= LEVEL for _ in range(300)]
    assert is_at_most(ends, 0.06) and rate(plateau_p(random, 0.15) <= LEVEL for _ in range(60))[0] > 0.6


def test_a_share_of_a_base_at_its_floor_is_refused():
    items = {name: [0.0, 1.0] for name in ("base/m", *(f"prune/p{i}" for i in range(8)))}
    table = leveled({"one": items}, floor=0.5)
    names = [f"prune/p{i}" for i in range(8)]
    axes = {"better": {"values": list(range(8))}, "worse": {"values": list(range(8))}}
    with pytest.raises(Refusal, match="base/m is not above the floor on s acc"):
        judged(table, test="fit", readout=ACC, candidates=names, share=True, **axes)
