"""Correlations of a few pairs: published tables, all pairings, and error rates."""

from itertools import permutations

import numpy as np
import pytest
from scipy import stats

from stages.core.errors import Refusal
from stages.reporting.statistics.correlation import correlation
from stages.reporting.statistics.paired import LEVEL
from tests.chance import is_at_most, rate


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
            ranked = correlation(np.arange(count), order)
            assert ranked.value == pytest.approx(size)
            assert (ranked.exact, ranked.p <= 0.05) == (True, passes)


def test_correlation_of_a_published_table():
    # Llama-3.2-1B at seven widths (arXiv 2512.22671): MMLU against TruthfulQA-MC2, r = -.68 of seven models.
    mmlu = [0.311, 0.251, 0.266, 0.261, 0.269, 0.261, 0.255]
    mc2 = [0.377, 0.403, 0.415, 0.425, 0.430, 0.431, 0.466]
    widths = correlation(mmlu, mc2, "pearson")
    assert widths.value == pytest.approx(-0.68, abs=5e-3)
    every = [abs(stats.pearsonr(order, mc2).statistic) for order in permutations(mmlu)]
    assert widths.p == pytest.approx(np.mean(np.array(every) >= abs(widths.value) - 1e-12))


def test_pairings_of_many_pairs_are_drawn_and_agree_with_the_t_distribution():
    random = np.random.default_rng(4)
    x = random.normal(size=40)
    y = 0.3 * x + random.normal(size=40)
    drawn = correlation(x, y, "pearson", seed=1)
    assert not drawn.exact
    assert drawn.p == pytest.approx(stats.pearsonr(x, y).pvalue, abs=0.01)
    assert drawn == correlation(x, y, "pearson", seed=1)
    assert correlation(x, x, seed=1).p == pytest.approx(1e-5)


@pytest.mark.parametrize(
    ("x", "y", "message"),
    [
        ([1, 2, 3], [1, 1, 1], "not all the same"),
        ([1, 2, 3], [1, 2], "3 and 2 values"),
        ([1, 2, np.nan, 4], [1, 2, 3, 4], "1 of 8 values are NaN or inf"),
        ([1, 2, 3, 4], [1, np.inf, 3, 4], "1 of 8 values are NaN"),
    ],
)
def test_values_without_a_correlation_are_refused(x, y, message):
    for kind in ("spearman", "pearson"):
        with pytest.raises(Refusal, match=message):
            correlation(x, y, kind)


def test_correlations_err_at_their_level_and_find_an_effect():
    pairs = np.random.default_rng(5).normal(size=(400, 2, 6))
    assert is_at_most([correlation(*pair).p <= LEVEL for pair in pairs], LEVEL)
    assert rate(correlation(a, a + b / 10).p <= LEVEL for a, b in pairs[:100])[1] > 0.8
