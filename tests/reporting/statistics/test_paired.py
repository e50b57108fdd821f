"""Comparisons item by item: published examples, slow references, and error rates."""

import math
from itertools import product

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from stages.reporting.statistics import paired
from tests.chance import is_nominal, rate

LEVEL = paired.LEVEL


def test_mcnemar_gives_fagerlands_example():
    # Airway hyper-responsiveness before and after stem cell transplantation, 1 and 7 discordant pairs
    # (Bentur et al. 2009): exact p .070, mid-p .039 (Fagerland, Lydersen and Laake 2013, table 4).
    assert stats.binomtest(1, 8).pvalue == pytest.approx(0.070, abs=5e-4)
    assert paired.mcnemar(1, 7) == pytest.approx(0.039, abs=5e-4)
    assert paired.mcnemar(0, 0) == 1


@given(st.integers(0, 12), st.integers(0, 12))
def test_mcnemar_counts_all_ways_the_coins_may_fall(lost, won):
    ways = [abs(sum(sides)) for sides in product((-1, 1), repeat=min(lost + won, 12))]
    p = paired.mcnemar(lost, won)
    assert p == pytest.approx(paired.mcnemar(won, lost))
    assert 0 < p <= 1
    if lost + won <= 12:
        further, same = (sum(f(way, abs(lost - won)) for way in ways) for f in (int.__gt__, int.__eq__))
        assert p == pytest.approx((further + same / 2) / len(ways) if lost != won else 1)


def test_mcnemar_errs_at_its_level_and_finds_an_effect():
    random = np.random.default_rng(0)

    def rejections(lost: float, won: float) -> list[bool]:
        """Tests of 300 items, of which these shares are lost and won."""
        counts = random.multinomial(300, [lost, won, 1 - lost - won], 3000)
        known = {pair: paired.mcnemar(*pair) for pair in {(int(a), int(b)) for a, b, _ in counts}}
        return [known[int(a), int(b)] <= LEVEL for a, b, _ in counts]

    assert is_nominal(rejections(0.1, 0.1), LEVEL)
    assert rate(rejections(0.14, 0.06))[1] > 0.8


def test_intervals_against_hand_computed_values():
    # Differences 1, 2, 3: mean 2, stderr 1/sqrt(3); t with 2 degrees of freedom has 97.5 % at 4.302653.
    interval = paired.interval([1.0, 2.0, 3.0])
    assert interval.mean == 2
    assert interval.stderr == pytest.approx(1 / math.sqrt(3))
    assert (interval.low, interval.high) == pytest.approx(
        (2 - 4.302653 / math.sqrt(3), 2 + 4.302653 / math.sqrt(3))
    )
    # P(|T| > t) with 2 degrees of freedom is 1 - t / sqrt(2 + t^2); t = 2 sqrt(3).
    assert interval.p == pytest.approx(1 - math.sqrt(12 / 14))
    assert paired.interval([0.5]) is None
    assert paired.interval([1.0, math.nan]) is paired.interval([1.0, math.inf]) is None
    assert paired.interval([0.0, 0.0]).p == 1
    assert paired.interval([0.5, 0.5]).p == 0
    assert paired.discordant([1, 0, 1, 0], [0, 1, 0, 0]) == (2, 1)
    assert paired.discordant([1, 0, 1, 0], [0, 1, 0, 0], higher_is_better=False) == (1, 2)


def test_the_paired_interval_of_students_sleep_data():
    # Hours of sleep gained with two drugs, ten patients (Student 1908): t = 4.0621, p = .002833,
    # 95 % interval of the difference 0.7001 to 2.4599.
    first = [0.7, -1.6, -0.2, -1.2, -0.1, 3.4, 3.7, 0.8, 0.0, 2.0]
    second = [1.9, 0.8, 1.1, 0.1, -0.1, 4.4, 5.5, 1.6, 4.6, 3.4]
    interval = paired.interval([b - a for a, b in zip(first, second, strict=True)])
    assert interval.mean / interval.stderr == pytest.approx(4.0621, abs=5e-5)
    assert interval.p == pytest.approx(0.002833, abs=5e-7)
    assert (interval.low, interval.high) == pytest.approx((0.7001, 2.4599), abs=5e-5)


@given(st.lists(st.floats(-100, 100), min_size=2, max_size=30))
def test_an_interval_has_its_mean_and_has_zero_exactly_when_p_is_above_the_level(differences):
    interval = paired.interval(differences)
    assert interval.low <= interval.mean <= interval.high
    if abs(interval.p - LEVEL) > 1e-6:
        assert (interval.low <= 0 <= interval.high) == (interval.p > LEVEL)


def equivalence(differences, low, high):
    return paired.equivalence(paired.interval(differences), len(differences), low, high)


def test_equivalence_of_the_sleep_data_is_two_one_sided_tests():
    # The same ten patients: mean 1.58, standard error .38896, so t = (3 - 1.58) / .38896 above.
    gained = [1.2, 2.4, 1.3, 1.3, 0.0, 1.0, 1.8, 0.8, 4.6, 1.4]
    assert equivalence(gained, -3, 3) == pytest.approx(stats.t.sf(1.42 / 0.38896, 9), rel=1e-3)
    for low, high in ((-3, 3), (0.5, 2), (1, math.inf), (2, 3)):
        sides = [
            stats.ttest_1samp(gained, bound, alternative=side).pvalue
            for bound, side in ((low, "greater"), (high, "less"))
            if math.isfinite(bound)
        ]
        assert equivalence(gained, low, high) == pytest.approx(max(sides))
    assert (equivalence([0.1, 0.1], -1, 1), equivalence([2.0, 2.0], -1, 1)) == (0, 1)


@given(st.lists(st.floats(-2, 2), min_size=3, max_size=20), st.floats(0.01, 3))
def test_equivalent_is_a_90_percent_interval_inside_the_margin(differences, margin):
    interval = paired.interval(differences)
    p = equivalence(differences, -margin, margin)
    reach = stats.t.ppf(0.95, len(differences) - 1) * interval.stderr
    if abs(p - 0.05) > 1e-6:
        assert (p <= 0.05) == (-margin < interval.mean - reach and interval.mean + reach < margin)


def test_equivalence_errs_at_its_level_on_the_margin_and_holds_inside_it():
    random = np.random.default_rng(1)
    on, inside = (random.normal(mean, 1, (1500, 60)).tolist() for mean in (0.5, 0.0))
    assert is_nominal([equivalence(d, -0.5, 0.5) <= LEVEL for d in on], LEVEL)
    assert rate(equivalence(d, -0.5, 0.5) <= LEVEL for d in inside)[1] > 0.9
