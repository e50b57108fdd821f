"""Tests of trend: published examples and tables, all arrangements, and error rates."""

from itertools import permutations

import numpy as np
import pytest
from scipy import stats

from stages.core.errors import Refusal
from stages.reporting.statistics.paired import LEVEL
from stages.reporting.statistics.trend import page
from tests.chance import is_at_most, is_nominal, rate

# Breaking strength of cotton by falling dose of potash, three blocks (the same, table 7.5).
COTTON = [[7.46, 7.17, 7.76, 8.14, 7.63], [7.68, 7.57, 7.73, 8.15, 8.00], [7.21, 7.80, 7.74, 7.87, 7.93]]


def test_page_gives_the_books_example_and_pages_critical_values():
    trend = page(COTTON)
    assert (trend.statistic, trend.exact) == (158, True)
    # Page 1963, table 2: three blocks, five conditions: 150 at .05, 155 at .01, 160 at .001.
    assert 0.001 < trend.p < 0.01
    random = np.random.default_rng(2)
    p_of = {}
    while len(p_of) < 60 and not {149, 150, 154, 155, 159, 160} <= p_of.keys():
        lift = random.choice([1, 3, 10])
        risen = page(random.random((3, 5)) + np.arange(5) / lift)
        p_of[risen.statistic] = risen.p
    for level, value in ((0.05, 150), (0.01, 155), (0.001, 160)):
        assert p_of[value] <= level < p_of[value - 1]


def test_page_with_ties_is_the_spread_of_all_orders_within_blocks():
    blocks = np.array([[1.0, 1.0, 2.0], [0.0, 1.0, 1.0], [2.0, 1.0, 3.0], [0.0, 0.0, 1.0]])
    trend = page(blocks)
    ranks = stats.rankdata(blocks, axis=1)
    sums = np.zeros(1)
    for row in ranks:
        sums = np.add.outer(sums, [np.dot(order, (1, 2, 3)) for order in permutations(row)]).ravel()
    assert not trend.exact
    assert trend.statistic == (ranks * (1, 2, 3)).sum()
    assert trend.p == pytest.approx(stats.norm.sf((trend.statistic - sums.mean()) / sums.std()))
    assert page(np.ones((4, 3))).p == 1


@pytest.mark.parametrize(
    ("test", "values", "message"),
    [
        (page, [[1, 2], [1, 2]], r"\(2, 2\)"),
        (page, [[1, 2, np.nan], [1, 2, 3]], "1 of 6 values are NaN"),
    ],
)
def test_values_without_a_trend_are_refused(test, values, message):
    with pytest.raises(Refusal, match=message):
        test(values)


def test_tests_err_at_their_level_and_find_an_effect():
    random = np.random.default_rng(5)
    blocks = random.random((500, 10, 4))
    assert is_at_most([page(values).p <= LEVEL for values in blocks], LEVEL)
    assert is_nominal([page(values < 0.5).p <= LEVEL for values in random.random((600, 60, 4))], LEVEL)
    assert rate(page(values + np.arange(4) / 5).p <= LEVEL for values in blocks[:200])[1] > 0.9
