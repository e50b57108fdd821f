"""Retention above the floor: its definition, its interval against t tests, and coverage."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from stages.reporting.statistics.paired import LEVEL
from stages.reporting.statistics.retention import retention
from tests.chance import is_at_most, is_nominal


def test_retention_takes_the_floor_off_both():
    dense, ours = [1.0] * 60 + [0.0] * 40, [1.0] * 50 + [0.0] * 50
    kept = retention(dense, ours, 0.25)
    assert kept.value == pytest.approx(0.25 / 0.35)
    assert kept.low < kept.value < kept.high < 1


@given(st.integers(0, 2**32 - 1), st.sampled_from([0.0, 0.25, 0.5]))
def test_a_retention_matches_its_definition_and_its_t_tests(seed, floor):
    random = np.random.default_rng(seed)
    easy = random.random(40)
    dense, ours = ((easy + random.normal(0, 0.3, 40) > cut).astype(float) for cut in (0.35, 0.55))
    kept = retention(dense, ours, floor)
    test = stats.ttest_1samp(dense, floor, alternative="greater") if dense.std() else None
    if test is not None and abs(test.pvalue - 0.025) > 1e-9:
        assert (kept is not None) == (test.pvalue < 0.025)
    if kept is None:
        return
    assert kept.value == pytest.approx((ours.mean() - floor) / (dense.mean() - floor))
    assert kept.low <= kept.value <= kept.high
    for end in (
        kept.low,
        kept.high,
    ):  # where the paired t test of ours - floor = end (dense - floor) has p = .05
        left = (ours - floor) - end * (dense - floor)
        if left.std() > 1e-9:
            assert stats.ttest_1samp(left, 0).pvalue == pytest.approx(0.05, rel=1e-6)


def test_retention_of_the_dense_model_is_one_and_near_the_floor_undefined():
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


def test_retention_covers_the_truth_and_is_seldom_defined_for_a_guesser():
    random = np.random.default_rng(3)
    hard = random.random((2000, 200))
    # Both know an item that is easy enough, and else guess among four choices: .5 and .3 known, .6 kept.
    luck = random.random((2, 2000, 200)) < 0.25
    dense, ours = ((hard < known) | guess for known, guess in zip((0.5, 0.3), luck, strict=True))
    kept = [retention(a, b, 0.25) for a, b in zip(dense, ours, strict=True)]
    assert all(kept)
    assert is_nominal([not share.low <= 0.6 <= share.high for share in kept], LEVEL)
    defined = [retention(a, b, 0.25) is not None for a, b in zip(luck[0], ours, strict=True)]
    assert is_at_most(defined, LEVEL / 2)
