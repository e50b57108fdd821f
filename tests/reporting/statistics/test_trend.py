"""Tests of trend: published examples and tables, all arrangements, and error rates."""

from itertools import combinations, permutations

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from scipy import stats

from stages.core.errors import Refusal
from stages.reporting.statistics.paired import LEVEL
from stages.reporting.statistics.trend import jonckheere, page
from tests.chance import is_at_most, is_nominal, rate

# Pieces finished with no, rough and accurate feedback (Hollander and Wolfe 1999, table 6.6).
PIECES = [[40, 35, 38, 43, 44, 41], [38, 40, 47, 44, 40, 42], [48, 40, 45, 43, 46, 44]]
# Breaking strength of cotton by falling dose of potash, three blocks (the same, table 7.5).
COTTON = [[7.46, 7.17, 7.76, 8.14, 7.63], [7.68, 7.57, 7.73, 8.15, 8.00], [7.21, 7.80, 7.74, 7.87, 7.93]]


def counted(groups):
    return sum(
        (later > earlier) + (later == earlier) / 2
        for left, right in combinations(groups, 2)
        for earlier in left
        for later in right
    )


def test_jonckheere_gives_the_books_example():
    trend = jonckheere(PIECES)
    assert (trend.statistic, trend.exact) == (79, False)
    # The book's J* of 2.02 takes no notice of ties: (79 - 54) / sqrt(153). With ties the variance is smaller.
    assert trend.p == pytest.approx(stats.norm.sf(2.02), abs=2e-3)
    assert trend.p < stats.norm.sf(25 / np.sqrt(153))
    random = np.random.default_rng(0)
    everyone = np.ravel(PIECES)
    shuffled = [jonckheere(np.split(random.permutation(everyone), 3)).statistic for _ in range(4000)]
    variance = ((54 - 79) / stats.norm.isf(trend.p)) ** 2
    assert np.mean(shuffled) == pytest.approx(54, abs=4 * np.sqrt(variance / 4000))
    assert np.var(shuffled) == pytest.approx(variance, rel=4 * np.sqrt(2 / 4000))


@settings(deadline=None)
@given(
    st.lists(st.integers(1, 3), min_size=2, max_size=4).filter(lambda sizes: sum(sizes) <= 6), st.randoms()
)
def test_exact_jonckheere_counts_every_arrangement(sizes, random):
    values = list(range(sum(sizes)))
    random.shuffle(values)
    ends = np.cumsum(sizes)[:-1]
    trend = jonckheere(np.split(np.array(values), ends))
    every = [counted(np.split(np.array(order), ends)) for order in permutations(values)]
    assert trend.exact
    assert trend.statistic == counted(np.split(np.array(values), ends))
    assert trend.p == pytest.approx(np.mean([other >= trend.statistic for other in every]))


@given(st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=6), min_size=2, max_size=4))
@example([[0], [0] * 6])  # whose variance floating-point numbers do not sum to 0
def test_jonckheere_counts_pairs_and_a_tie_by_half(groups):
    trend = jonckheere(groups)
    assert trend.statistic == counted(groups)
    assert 0 < trend.p <= 1
    if len({value for group in groups for value in group}) == 1:
        assert trend.p == 1


def test_normal_and_exact_jonckheere_agree():
    random = np.random.default_rng(1)
    groups = [random.random(20) for _ in range(3)]
    exact = jonckheere(groups)
    normal = jonckheere([*groups[:2], np.append(groups[2], groups[2].max())])
    assert (exact.exact, normal.exact) == (True, False)
    assert normal.p == pytest.approx(exact.p, abs=0.03)
    # Two groups are the test of Mann, Whitney and Wilcoxon.
    a, b = random.random(9), random.random(8)
    assert jonckheere([a, b]).p == pytest.approx(
        stats.mannwhitneyu(b, a, alternative="greater", method="exact").pvalue
    )


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
        (jonckheere, [[1, 2]], "at least two groups"),
        (jonckheere, [[1, 2], []], r"\[2, 0\]"),
        (page, [[1, 2], [1, 2]], r"\(2, 2\)"),
        (jonckheere, [[1, 2, np.nan], [2, 3, 4]], "1 of 6 values are NaN"),
        (page, [[1, 2, np.nan], [1, 2, 3]], "1 of 6 values are NaN"),
    ],
)
def test_values_without_a_trend_are_refused(test, values, message):
    with pytest.raises(Refusal, match=message):
        test(values)


def test_tests_err_at_their_level_and_find_an_effect():
    random = np.random.default_rng(5)

    def of_groups(rise, right):
        draws = random.random((800, 4, 40)) + rise * np.arange(4)[:, None]
        return [jonckheere(values < right if right else values).p <= LEVEL for values in draws]

    assert is_nominal(of_groups(0.0, None), LEVEL)  # 160 untied numbers: normal
    assert is_nominal(of_groups(0.0, 0.6), LEVEL)  # right or wrong, all tied: normal
    assert rate(of_groups(-0.1, 0.6))[1] > 0.9
    small = random.random((800, 3, 5))
    assert is_at_most([jonckheere(values).p <= LEVEL for values in small], LEVEL)  # exact
    blocks = random.random((500, 10, 4))
    assert is_at_most([page(values).p <= LEVEL for values in blocks], LEVEL)
    assert is_nominal([page(values < 0.5).p <= LEVEL for values in random.random((600, 60, 4))], LEVEL)
    assert rate(page(values + np.arange(4) / 5).p <= LEVEL for values in blocks[:200])[1] > 0.9
