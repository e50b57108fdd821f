"""Comparisons item by item: published examples, slow references, and how often they err."""

import math
from itertools import product

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from stages.reporting.statistics import paired
from stages.reporting.statistics.holm import holm
from stages.reporting.statistics.retention import retention
from tests.chance import is_at_most, is_nominal, rate

LEVEL = paired.LEVEL


def test_mcnemar_is_fagerlands_example():
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


def test_mcnemar_errs_at_its_level_and_finds_what_is_there():
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
    found = paired.interval([1.0, 2.0, 3.0])
    assert found.mean == 2
    assert found.stderr == pytest.approx(1 / math.sqrt(3))
    assert (found.low, found.high) == pytest.approx(
        (2 - 4.302653 / math.sqrt(3), 2 + 4.302653 / math.sqrt(3))
    )
    # P(|T| > t) with 2 degrees of freedom is 1 - t / sqrt(2 + t^2); t = 2 sqrt(3).
    assert found.p == pytest.approx(1 - math.sqrt(12 / 14))
    assert paired.interval([0.5]) is None
    assert paired.interval([0.0, 0.0]).p == 1
    assert paired.interval([0.5, 0.5]).p == 0
    assert paired.discordant([1, 0, 1, 0], [0, 1, 0, 0]) == (2, 1)
    assert paired.discordant([1, 0, 1, 0], [0, 1, 0, 0], higher_is_better=False) == (1, 2)


def test_the_paired_interval_is_students_sleep_data():
    # Hours of sleep gained with two drugs, ten patients (Student 1908): t = 4.0621, p = .002833,
    # 95 % interval of the difference 0.7001 to 2.4599.
    one = [0.7, -1.6, -0.2, -1.2, -0.1, 3.4, 3.7, 0.8, 0.0, 2.0]
    two = [1.9, 0.8, 1.1, 0.1, -0.1, 4.4, 5.5, 1.6, 4.6, 3.4]
    found = paired.interval([b - a for a, b in zip(one, two, strict=True)])
    assert found.mean / found.stderr == pytest.approx(4.0621, abs=5e-5)
    assert found.p == pytest.approx(0.002833, abs=5e-7)
    assert (found.low, found.high) == pytest.approx((0.7001, 2.4599), abs=5e-5)


@given(st.lists(st.floats(-100, 100), min_size=2, max_size=30))
def test_an_interval_holds_its_mean_and_zero_exactly_when_p_is_above_the_level(differences):
    found = paired.interval(differences)
    assert found.low <= found.mean <= found.high
    if abs(found.p - LEVEL) > 1e-6:
        assert (found.low <= 0 <= found.high) == (found.p > LEVEL)


def test_equivalence_of_the_sleep_data_is_two_one_sided_tests():
    # The same ten patients: mean 1.58, standard error .38896, so t = (3 - 1.58) / .38896 above.
    gained = [1.2, 2.4, 1.3, 1.3, 0.0, 1.0, 1.8, 0.8, 4.6, 1.4]
    assert paired.equivalence(gained, -3, 3) == pytest.approx(stats.t.sf(1.42 / 0.38896, 9), rel=1e-3)
    for low, high in ((-3, 3), (0.5, 2), (1, math.inf), (2, 3)):
        sides = [
            stats.ttest_1samp(gained, bound, alternative=side).pvalue
            for bound, side in ((low, "greater"), (high, "less"))
            if math.isfinite(bound)
        ]
        assert paired.equivalence(gained, low, high) == pytest.approx(max(sides))
    assert paired.equivalence([0.1], -1, 1) is None
    assert (paired.equivalence([0.1, 0.1], -1, 1), paired.equivalence([2.0, 2.0], -1, 1)) == (0, 1)


@given(st.lists(st.floats(-2, 2), min_size=3, max_size=20), st.floats(0.01, 3))
def test_equivalent_is_a_90_percent_interval_inside_the_margin(differences, margin):
    found = paired.interval(differences)
    p = paired.equivalence(differences, -margin, margin)
    reach = stats.t.ppf(0.95, len(differences) - 1) * found.stderr
    if abs(p - 0.05) > 1e-6:
        assert (p <= 0.05) == (-margin < found.mean - reach and found.mean + reach < margin)


def test_equivalence_errs_at_its_level_on_the_margin_and_finds_what_is_inside():
    random = np.random.default_rng(1)
    on, inside = (random.normal(mean, 1, (1500, 60)).tolist() for mean in (0.5, 0.0))
    assert is_nominal([paired.equivalence(d, -0.5, 0.5) <= LEVEL for d in on], LEVEL)
    assert rate(paired.equivalence(d, -0.5, 0.5) <= LEVEL for d in inside)[1] > 0.9


def test_holm_is_the_textbook_example():
    # Of .01, .04, .03 and .005 Holm rejects the first and the last at .05.
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    # Six p-values and what R's p.adjust(method = "holm") makes of them.
    six = holm([0.01, 0.04, 0.20, 0.03, 0.005, 0.07])
    assert six == pytest.approx([0.05, 0.12, 0.20, 0.12, 0.03, 0.14])
    assert holm([]) == []


@given(st.lists(st.floats(0, 1), max_size=12))
def test_holm_is_the_step_down_procedure(p_values):
    corrected = holm(p_values)
    for level in (0.01, 0.05, 0.3, 0.9):
        rejected, order = set(), sorted(range(len(p_values)), key=lambda i: p_values[i])
        for rank, place in enumerate(order):
            if p_values[place] > level / (len(order) - rank) * (1 - 1e-12):
                break
            rejected.add(place)
        assert rejected <= {i for i, p in enumerate(corrected) if p <= level}
        assert {i for i, p in enumerate(corrected) if p <= level * (1 - 1e-9)} <= rejected


@given(st.lists(st.floats(0, 1), max_size=12), st.integers(0, 12))
def test_what_is_not_compared_is_not_counted(p_values, place):
    with_gap = [*p_values[:place], math.nan, *p_values[place:]]
    corrected = holm(with_gap)
    gap = min(place, len(p_values))
    assert math.isnan(corrected.pop(gap))
    assert corrected == holm(p_values)


def test_holm_keeps_false_alarms_of_a_family_at_the_level():
    random = np.random.default_rng(2)
    nulls = random.random((4000, 20))
    assert is_nominal([min(holm(row)) <= LEVEL for row in nulls], 1 - (1 - LEVEL / 20) ** 20)
    # Ten real effects beside ten nulls: still few false alarms, and more found than Bonferroni finds.
    real = stats.norm.sf(random.normal(3, 1, (2000, 10)))
    families = [holm([*row, *null]) for row, null in zip(real, nulls[:2000, :10], strict=True)]
    assert is_at_most([min(row[10:]) <= LEVEL for row in families], LEVEL)
    assert np.mean([np.mean(np.array(row[:10]) <= LEVEL) for row in families]) > np.mean(real <= LEVEL / 20)


def test_retention_takes_the_floor_off_both():
    dense, ours = [1.0] * 60 + [0.0] * 40, [1.0] * 50 + [0.0] * 50
    found = retention(dense, ours, 0.25)
    assert found.value == pytest.approx(0.25 / 0.35)
    assert found.low < found.value < found.high < 1


@given(st.integers(0, 2**32 - 1), st.sampled_from([0.0, 0.25, 0.5]))
def test_a_retention_is_its_definition_test_and_roots(seed, floor):
    random = np.random.default_rng(seed)
    easy = random.random(40)
    dense, ours = ((easy + random.normal(0, 0.3, 40) > cut).astype(float) for cut in (0.35, 0.55))
    found = retention(dense, ours, floor)
    test = stats.ttest_1samp(dense, floor, alternative="greater") if dense.std() else None
    if test is not None and abs(test.pvalue - 0.025) > 1e-9:
        assert (found is not None) == (test.pvalue < 0.025)
    if found is None:
        return
    assert found.value == pytest.approx((ours.mean() - floor) / (dense.mean() - floor))
    assert found.low <= found.value <= found.high
    for end in (
        found.low,
        found.high,
    ):  # where the paired t test of ours - floor = end (dense - floor) has p = .05
        left = (ours - floor) - end * (dense - floor)
        if left.std() > 1e-9:
            assert stats.ttest_1samp(left, 0).pvalue == pytest.approx(0.05, rel=1e-6)


def test_retention_of_the_dense_model_itself_is_one_and_of_too_little_undefined():
    dense = [1.0] * 60 + [0.0] * 40
    itself = retention(dense, dense, 0.25)
    assert (itself.value, itself.low, itself.high) == pytest.approx((1, 1, 1))
    assert retention([1.0] * 30 + [0.0] * 70, dense, 0.25) is None  # .30 of 100 is not clearly above .25
    assert retention([0.0] * 50, dense[:50], 0.25) is None
    assert retention([1.0], [1.0], 0.0) is None
    for odd in (math.nan, math.inf):
        assert retention([*dense, odd], [*dense, 1.0], 0.25) is None
        assert retention([*dense, 1.0], [*dense, odd], 0.25) is None
        assert retention(dense, dense, odd) is None
        assert paired.interval([1.0, odd]) is None


def test_retention_covers_the_truth_and_is_seldom_told_of_a_guesser():
    random = np.random.default_rng(3)
    hard = random.random((2000, 200))
    # Both know an item if it is easy enough, and guess one in four otherwise: .5 and .3 known, .6 kept.
    luck = random.random((2, 2000, 200)) < 0.25
    dense, ours = ((hard < known) | guess for known, guess in zip((0.5, 0.3), luck, strict=True))
    found = [retention(a, b, 0.25) for a, b in zip(dense, ours, strict=True)]
    assert all(found)
    assert is_nominal([not one.low <= 0.6 <= one.high for one in found], LEVEL)
    told = [retention(a, b, 0.25) is not None for a, b in zip(luck[0], ours, strict=True)]
    assert is_at_most(told, LEVEL / 2)
