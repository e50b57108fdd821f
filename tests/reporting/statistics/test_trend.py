"""Tests of trend and of correlation: published examples and tables, all arrangements, and error rates."""

from itertools import combinations, permutations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from stages.core.errors import Refusal
from stages.reporting.statistics.correlation import correlation
from stages.reporting.statistics.paired import LEVEL
from stages.reporting.statistics.trend import jonckheere, page
from tests.chance import is_at_most, is_nominal, rate

# Pieces finished knowing nothing, roughly and accurately how one does (Hollander and Wolfe 1999, table 6.6).
PIECES = [[40, 35, 38, 43, 44, 41], [38, 40, 47, 44, 40, 42], [48, 40, 45, 43, 46, 44]]
# Breaking strength of cotton by falling dose of potash, three blocks (the same, table 7.5).
COTTON = [[7.46, 7.17, 7.76, 8.14, 7.63], [7.68, 7.57, 7.73, 8.15, 8.00], [7.21, 7.80, 7.74, 7.87, 7.93]]


def counted(groups):
    return sum(
        (later > one) + (later == one) / 2
        for left, right in combinations(groups, 2)
        for one in left
        for later in right
    )


def test_jonckheere_is_the_books_example():
    found = jonckheere(PIECES)
    assert (found.statistic, found.exact) == (79, False)
    # The book's J* of 2.02 takes no notice of ties: (79 - 54) / sqrt(153). With ties the variance is smaller.
    assert found.p == pytest.approx(stats.norm.sf(2.02), abs=2e-3)
    assert found.p < stats.norm.sf(25 / np.sqrt(153))
    random = np.random.default_rng(0)
    everyone = np.ravel(PIECES)
    shuffled = [jonckheere(np.split(random.permutation(everyone), 3)).statistic for _ in range(4000)]
    variance = ((54 - 79) / stats.norm.isf(found.p)) ** 2
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
    found = jonckheere(np.split(np.array(values), ends))
    every = [counted(np.split(np.array(order), ends)) for order in permutations(values)]
    assert found.exact
    assert found.statistic == counted(np.split(np.array(values), ends))
    assert found.p == pytest.approx(np.mean([one >= found.statistic for one in every]))


@given(st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=6), min_size=2, max_size=4))
def test_jonckheere_counts_pairs_and_a_tie_by_half(groups):
    found = jonckheere(groups)
    assert found.statistic == counted(groups)
    assert 0 < found.p <= 1
    if len({value for group in groups for value in group}) == 1:
        assert found.p == 1


def test_normal_and_exact_jonckheere_agree_where_both_serve():
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


def test_page_is_the_books_example_and_has_pages_critical_values():
    found = page(COTTON)
    assert (found.statistic, found.exact) == (158, True)
    # Page 1963, table 2: three blocks, five conditions: 150 at .05, 155 at .01, 160 at .001.
    assert 0.001 < found.p < 0.01
    random = np.random.default_rng(2)
    p_of = {}
    while len(p_of) < 60 and not {149, 150, 154, 155, 159, 160} <= p_of.keys():
        lift = random.choice([1, 3, 10])
        trend = page(random.random((3, 5)) + np.arange(5) / lift)
        p_of[trend.statistic] = trend.p
    for level, value in ((0.05, 150), (0.01, 155), (0.001, 160)):
        assert p_of[value] <= level < p_of[value - 1]


def test_page_with_ties_is_the_spread_of_all_orders_within_blocks():
    blocks = np.array([[1.0, 1.0, 2.0], [0.0, 1.0, 1.0], [2.0, 1.0, 3.0], [0.0, 0.0, 1.0]])
    found = page(blocks)
    ranks = stats.rankdata(blocks, axis=1)
    sums = np.zeros(1)
    for row in ranks:
        sums = np.add.outer(sums, [np.dot(order, (1, 2, 3)) for order in permutations(row)]).ravel()
    assert not found.exact
    assert found.statistic == (ranks * (1, 2, 3)).sum()
    assert found.p == pytest.approx(stats.norm.sf((found.statistic - sums.mean()) / sums.std()))
    assert page(np.ones((4, 3))).p == 1


def test_correlation_has_the_critical_values_of_spearmans_table():
    # Zar 1972, two-sided at .05: 1 of five pairs, .886 of six, .786 of seven, .738 of eight.
    for count, critical in ((5, 1.0), (6, 0.886), (7, 0.786), (8, 0.738)):
        random = np.random.default_rng(count)
        orders = np.array([random.permutation(count) for _ in range(3000)])
        rho = 1 - 6 * ((orders - np.arange(count)) ** 2).sum(axis=1) / (count**3 - count)
        for size, passes in (
            (rho[rho >= critical - 5e-4].min(), True),
            (rho[rho < critical - 5e-4].max(), False),
        ):
            order = orders[np.argmin(abs(rho - size))]
            found = correlation(np.arange(count), order)
            assert found.value == pytest.approx(size)
            assert (found.exact, found.p <= 0.05) == (True, passes)


def test_correlation_of_a_published_table():
    # Llama-3.2-1B at seven widths (arXiv 2512.22671): MMLU against TruthfulQA-MC2, r = -.68 of seven models.
    mmlu = [0.311, 0.251, 0.266, 0.261, 0.269, 0.261, 0.255]
    mc2 = [0.377, 0.403, 0.415, 0.425, 0.430, 0.431, 0.466]
    found = correlation(mmlu, mc2, "pearson")
    assert found.value == pytest.approx(-0.68, abs=5e-3)
    every = [abs(stats.pearsonr(order, mc2).statistic) for order in permutations(mmlu)]
    assert found.p == pytest.approx(np.mean(np.array(every) >= abs(found.value) - 1e-12))


def test_many_pairs_are_drawn_and_agree_with_the_t_distribution():
    random = np.random.default_rng(4)
    x = random.normal(size=40)
    y = 0.3 * x + random.normal(size=40)
    found = correlation(x, y, "pearson", seed=1)
    assert not found.exact
    assert found.p == pytest.approx(stats.pearsonr(x, y).pvalue, abs=0.01)
    assert found == correlation(x, y, "pearson", seed=1)
    assert correlation(x, x, seed=1).p == pytest.approx(1e-5)


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        (lambda: jonckheere([[1, 2]]), "at least two groups"),
        (lambda: jonckheere([[1, 2], []]), r"\[2, 0\]"),
        (lambda: page([[1, 2], [1, 2]]), r"\(2, 2\)"),
        (lambda: correlation([1, 2, 3], [1, 1, 1]), "not all the same"),
        (lambda: correlation([1, 2, 3], [1, 2]), "3 and 2 values"),
        (lambda: correlation([1, 2, np.nan, 4], [1, 2, 3, 4]), "1 of 8 values are NaN or inf"),
        (lambda: correlation([1, 2, 3, 4], [1, np.inf, 3, 4], "pearson"), "1 of 8 values are NaN"),
        (lambda: jonckheere([[1, 2, np.nan], [2, 3, 4]]), "1 of 6 values are NaN"),
        (lambda: page([[1, 2, np.nan], [1, 2, 3]]), "1 of 6 values are NaN"),
    ],
)
def test_what_has_no_trend_or_correlation_is_refused(asked, said):
    with pytest.raises(Refusal, match=said):
        asked()


def test_tests_err_at_their_level_and_find_what_is_there():
    random = np.random.default_rng(5)

    def of_groups(rise, right):
        draws = random.random((800, 4, 40)) + rise * np.arange(4)[:, None]
        return [jonckheere(one < right if right else one).p <= LEVEL for one in draws]

    assert is_nominal(of_groups(0.0, None), LEVEL)  # 160 untied numbers: normal
    assert is_nominal(of_groups(0.0, 0.6), LEVEL)  # right or wrong, all tied: normal
    assert rate(of_groups(-0.1, 0.6))[1] > 0.9
    small = random.random((800, 3, 5))
    assert is_at_most([jonckheere(one).p <= LEVEL for one in small], LEVEL)  # exact
    blocks = random.random((500, 10, 4))
    assert is_at_most([page(one).p <= LEVEL for one in blocks], LEVEL)
    assert is_nominal([page(one < 0.5).p <= LEVEL for one in random.random((600, 60, 4))], LEVEL)
    assert rate(page(one + np.arange(4) / 5).p <= LEVEL for one in blocks[:200])[1] > 0.9
    pairs = random.normal(size=(400, 2, 6))
    assert is_at_most([correlation(*pair).p <= LEVEL for pair in pairs], LEVEL)
    assert rate(correlation(a, a + b / 10).p <= LEVEL for a, b in pairs[:100])[1] > 0.8
