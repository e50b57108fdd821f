"""The bootstrap against the book and scipy, and the error rates of its intervals."""

import numpy as np
import pytest
from scipy import stats

from stages.core.errors import Refusal
from stages.reporting.statistics.bootstrap import bootstrap
from stages.reporting.statistics.paired import LEVEL, interval
from tests.chance import is_nominal, rate

# Spatial ability of 26 children, test A (Efron and Tibshirani 1993, table 14.1).
SPATIAL = np.array([
    48, 36, 20, 29, 42, 42, 20, 42, 22, 41, 45, 14, 6,
    0, 33, 28, 34, 4, 32, 24, 47, 41, 24, 26, 30, 41,
], dtype=float)  # fmt: skip


def mean_difference(base, ours, strata=None, *, seed, draws=9999):
    """Estimate the mean of `ours` minus `base`."""
    kinds = np.zeros(len(base)) if strata is None else np.asarray(strata)
    shares = np.unique(kinds, return_counts=True)[1] / max(1, len(base))
    scores = np.stack([base, ours], axis=1).astype(float)
    return bootstrap(scores, lambda m: (m[..., 1] - m[..., 0]) @ shares, kinds, seed=seed, draws=draws)


def variance(means):
    return means[..., 0, 1] - means[..., 0, 0] ** 2


def test_intervals_match_the_book():
    # Table 14.2, 90 % intervals of the variance 171.5 with 2000 draws: percentile (100.8, 233.9),
    # BCa (115.8, 259.6). With 2000 draws chance moves these ends by a few units.
    moments = np.stack([SPATIAL, SPATIAL**2], axis=1)
    percentile = bootstrap(moments, variance, seed=0, level=0.1, method="percentile", draws=50_000)
    bca = bootstrap(moments, variance, seed=0, level=0.1, draws=50_000)
    assert percentile.value == pytest.approx(171.5, abs=0.05)
    assert (percentile.low, percentile.high) == pytest.approx((100.8, 233.9), abs=4)
    assert (bca.low, bca.high) == pytest.approx((115.8, 259.6), abs=5)


@pytest.mark.parametrize("method", ["bca", "percentile"])
def test_strata_match_scipys_samples(method):
    random = np.random.default_rng(0)
    samples = (random.exponential(1, 40), random.exponential(3, 25))
    kinds = np.repeat([0, 1], [40, 25])
    estimate = bootstrap(
        np.concatenate(samples)[:, None],
        lambda means: means[..., 1, 0] / means[..., 0, 0],
        kinds,
        seed=1,
        draws=40_000,
        method=method,
    )
    theirs = stats.bootstrap(
        samples,
        lambda a, b, axis: b.mean(axis=axis) / a.mean(axis=axis),
        n_resamples=40_000,
        method=method,
        rng=2,
    )
    assert estimate.stderr == pytest.approx(theirs.standard_error, rel=0.02)
    assert (estimate.low, estimate.high) == pytest.approx(tuple(theirs.confidence_interval), rel=0.02)


def test_items_are_drawn_whole():
    random = np.random.default_rng(3)
    base = random.normal(0, 5, 50)
    ours = base + random.normal(0.4, 1, 50)
    levels = random.permutation(np.repeat(["a", "b", "c"], [10, 15, 25]))
    for strata in (None, levels):
        estimate = mean_difference(base, ours, strata, seed=4)
        assert estimate.value == pytest.approx((ours - base).mean())
        assert estimate.stderr < 0.3  # of either score alone it is 0.7
        assert estimate == mean_difference(base, ours, strata, seed=4)
    # Levels differ in their means by design, which is not chance.
    apart = ours + 10 * (levels == "c")
    assert mean_difference(base, apart, levels, seed=4).stderr == pytest.approx(estimate.stderr, rel=1e-6)
    assert mean_difference(base, apart, seed=4).stderr > 2 * estimate.stderr


def test_p_is_the_level_at_which_an_end_of_the_interval_is_zero():
    random = np.random.default_rng(5)
    differences = random.exponential(1, 40) - 0.75
    estimate = mean_difference(np.zeros(40), differences, seed=6)
    at = bootstrap(differences[:, None], lambda m: m[..., 0, 0], seed=6, level=estimate.p)
    assert min(abs(at.low), abs(at.high)) < 0.01 * (at.high - at.low)
    assert (estimate.low <= 0 <= estimate.high) == (estimate.p > LEVEL)


def test_equal_scores_have_no_spread():
    estimate = mean_difference([1.0, 0.0, 1.0], [1.0, 0.0, 1.0], seed=0)
    assert (estimate.value, estimate.stderr, estimate.low, estimate.high, estimate.p) == (0, 0, 0, 0, 1)


def ratio(means):
    with np.errstate(divide="ignore", invalid="ignore"):
        return means[..., 0, 1] / means[..., 0, 0]


def test_ratios_that_are_infinite_or_undefined_in_some_draws_have_no_error():
    rare = np.array([1.0] * 5 + [0.0] * 15)
    apart = bootstrap(np.stack([rare, np.ones(20)], axis=1), ratio, seed=0)  # 1 / 0 in some draws
    assert apart.value == 4 and np.isnan(apart.stderr) and 2 <= apart.low < 4 < apart.high
    alike = bootstrap(np.stack([rare, rare], axis=1), ratio, seed=0)  # 0 / 0 in some draws, else 1
    assert (alike.value, alike.low, alike.high) == (1, 1, 1) and alike.p < 0.001
    once = np.array([1.0] + [0.0] * 19)
    with pytest.raises(Refusal, match=r"3\d{3} of 9999 draws leave the statistic undefined; score"):
        bootstrap(np.stack([once, once], axis=1), ratio, seed=0)


def test_too_few_items_are_refused():
    with pytest.raises(Refusal, match="single item"):
        mean_difference([1.0, 0.0, 1.0], [1.0, 1.0, 1.0], ["a", "a", "b"], seed=0)


def test_missing_scores_are_refused():
    with pytest.raises(Refusal, match="at least two items"):
        mean_difference([], [], seed=0)
    with pytest.raises(Refusal, match="1 of 8 scores are NaN or infinite"):
        mean_difference([1, 0, np.nan, 1], [0, 1, 1, 0], seed=0)


def test_tests_err_at_their_level_and_find_an_effect():
    random = np.random.default_rng(7)
    # Loss is skewed, as nats a token are; the same of both models up to noise.
    pairs = random.exponential(1, (600, 1, 80)) + random.normal(0, 0.3, (600, 2, 80))
    equal = [mean_difference(a, b, seed=1, draws=399).p <= LEVEL for a, b in pairs]
    assert is_nominal(equal, LEVEL)
    assert rate(mean_difference(a, b - 0.2, seed=1, draws=399).p <= LEVEL for a, b in pairs[:100])[1] > 0.8
    student = [interval(list(b - a)).p <= LEVEL for a, b in pairs]
    assert np.mean(np.equal(equal, student)) > 0.97
