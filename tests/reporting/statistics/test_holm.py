"""Holm's correction: textbook examples, its definition, and false alarms in simulated families."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from stages.reporting.statistics.holm import holm
from stages.reporting.statistics.paired import LEVEL
from tests.chance import is_at_most, is_nominal


def test_holm_gives_the_textbook_example():
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
def test_a_missing_comparison_is_not_counted(p_values, place):
    with_gap = [*p_values[:place], math.nan, *p_values[place:]]
    corrected = holm(with_gap)
    gap = min(place, len(p_values))
    assert math.isnan(corrected.pop(gap))
    assert corrected == holm(p_values)


def test_holm_keeps_false_alarms_of_a_family_at_the_level():
    random = np.random.default_rng(2)
    nulls = random.random((4000, 20))
    assert is_nominal([min(holm(row)) <= LEVEL for row in nulls], 1 - (1 - LEVEL / 20) ** 20)
    # Ten real effects beside ten nulls: still few false alarms, and more detected than by Bonferroni.
    real = stats.norm.sf(random.normal(3, 1, (2000, 10)))
    families = [holm([*row, *null]) for row, null in zip(real, nulls[:2000, :10], strict=True)]
    assert is_at_most([min(row[10:]) <= LEVEL for row in families], LEVEL)
    assert np.mean([np.mean(np.array(row[:10]) <= LEVEL) for row in families]) > np.mean(real <= LEVEL / 20)
