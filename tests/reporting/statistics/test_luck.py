"""The luck of a draw: Student's and Welch's tests over repeats, and how often they err."""

import numpy as np
import pytest
from scipy import stats

from stages.reporting.statistics.luck import luck_of
from stages.reporting.statistics.paired import LEVEL

MARSH = ([77.7, 77.4, 76.9, 77.0, 75.6], [75.0, 74.8, 77.4, 77.0, 75.0, 74.9])


def test_one_recipe_is_students_t_and_several_are_welchs():
    single = stats.ttest_1samp(MARSH[0], 76.0)
    luck = luck_of(float(np.mean(MARSH[0])), [MARSH[0]])
    assert (luck.freedom, luck.p(76.0)) == (pytest.approx(4), pytest.approx(single.pvalue))
    assert luck.noise == pytest.approx(single.confidence_interval()[1] - np.mean(MARSH[0]))
    both = stats.ttest_ind(*MARSH, equal_var=False)
    luck = luck_of(float(np.mean(MARSH[0]) - np.mean(MARSH[1])), MARSH)
    assert (luck.freedom, luck.p(0)) == (pytest.approx(both.df), pytest.approx(both.pvalue))


def test_three_repeats_ask_for_two_and_a_half_deviations_and_five_for_one_and_a_quarter():
    for repeats, factor in (([-1.0, 0.0, 1.0], 2.484), ([-2.0, -1.0, 0.0, 1.0, 2.0], 1.242)):
        assert luck_of(0.0, [repeats]).noise == pytest.approx(factor * np.std(repeats, ddof=1), abs=1e-3)


def test_equal_repeats_leave_no_luck():
    luck = luck_of(0.5, [[1.0, 1.0, 1.0]])
    assert (luck.noise, luck.p(0.5), luck.p(0.0)) == (0.0, 1.0, 0.0)


@pytest.mark.parametrize(
    ("spreads", "repeats"), [((1,), 3), ((1,), 5), ((1, 1), 3), ((1, 4), 3), ((1, 1), 5), ((1, 4), 5)]
)
def test_draws_alone_are_called_an_effect_as_often_as_the_level_says(spreads, repeats):
    drawn = np.random.default_rng(0).normal(size=(3000, len(spreads), repeats))
    drawn *= np.array(spreads)[None, :, None]
    signs = np.array([1.0, -1.0])[: len(spreads)]
    errs = np.mean([luck_of(float(signs @ x.mean(axis=1)), list(x)).p(0) <= LEVEL for x in drawn])
    assert 0.03 <= errs <= 0.06
