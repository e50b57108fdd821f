"""Effects over items against published examples, and how often their tests err."""

import numpy as np
import pytest
from scipy import stats
from scipy.special import expit, logit

from stages.core.errors import Refusal
from stages.reporting.hypotheses import effect
from stages.reporting.hypotheses.cells import ItemGrid
from stages.reporting.hypotheses.effect import decide, drawn, permuted, read_between, weighted_sum
from stages.reporting.statistics.paired import LEVEL, equivalence, interval, mcnemar
from tests.chance import is_nominal, rate


def grid(*parts) -> ItemGrid:
    """Return a grid of strata `[items, terms]`, each with terms of its own."""
    columns = [part.shape[1] for part in parts]
    values = np.full((sum(map(len, parts)), sum(columns)), np.nan)
    row = column = 0
    for part in parts:
        values[row : row + len(part), column : column + part.shape[1]] = part
        row, column = row + len(part), column + part.shape[1]
    return ItemGrid(values, np.repeat(np.arange(len(parts)), [len(part) for part in parts]))


def answers(random, count, shares):
    """Return right and wrong answers `[count, shares]` that share the difficulty of their item."""
    own = random.normal(size=(count, 1))
    return (random.random((count, len(shares))) < expit(1.3 * logit(np.array(shares)) + own)).astype(float)


def test_a_difference_of_right_answers_is_mcnemars():
    pairs = np.array([[1, 0]] * 9 + [[0, 1]] * 2 + [[1, 1]] * 29, float)
    found = weighted_sum(grid(pairs), np.array([-1.0, 1.0]))
    assert found.value == pytest.approx(-7 / 40)
    assert found.p(0) == pytest.approx(mcnemar(9, 2))
    assert found.smallest == pytest.approx(
        (stats.norm.ppf(0.975) + stats.norm.ppf(0.8)) * np.sqrt((11 / 40) / 40)
    )


def test_a_difference_in_differences_matches_card_and_krueger():
    # Full-time employment in the balanced sample, change of means and standard errors (Card and Krueger
    # 1994, table 3, row 4): New Jersey .47 (.48), Pennsylvania -2.28 (1.25), difference 2.75 (1.34).
    def stores(count, change, stderr):
        shape = np.linspace(-1, 1, count)
        before = np.random.default_rng(count).normal(21, 9, count)
        after = before + change + shape / shape.std(ddof=1) * stderr * np.sqrt(count)
        return np.stack([before, after], axis=1)

    found = weighted_sum(grid(stores(290, 0.47, 0.48), stores(70, -2.28, 1.25)), np.array([-1.0, 1, 1, -1]))
    assert found.value == pytest.approx(2.75)
    assert (found.high - found.low) / 2 == pytest.approx(1.34 * stats.t.ppf(0.975, 90), rel=0.02)
    assert 0.02 < found.p(0) < 0.07


def test_an_effect_within_a_bound_is_two_one_sided_tests():
    changes = np.random.default_rng(0).normal(0.01, 0.2, 400)
    found = weighted_sum(grid(np.stack([np.zeros(400), changes], axis=1)), np.array([-1.0, 1.0]))
    expected = equivalence(interval(changes.tolist()), 400, -0.05, 0.05)
    p, side = decide(found, "within", 0.05)
    assert (p, side) == (pytest.approx(expected), "supported")
    assert decide(found, "within", 0.001)[1] == "contradicted"
    assert decide(found, "above", -0.02)[1] == "supported" != decide(found, "above", 0.02)[1]


def test_items_that_never_differ_still_have_a_smallest_effect():
    found = weighted_sum(grid(np.ones((120, 2))), np.array([-1.0, 1.0]))
    assert (found.value, found.p(0)) == (0, 1)
    assert found.smallest == pytest.approx(2.8016 * np.sqrt(3) / 120, rel=1e-3)


def test_a_single_item_is_refused():
    with pytest.raises(Refusal, match="single item"):
        weighted_sum(grid(np.ones((5, 1)), np.ones((1, 1))), np.array([1.0, -1.0]))


def test_a_share_is_permuted_with_what_it_is_taken_of():
    random = np.random.default_rng(1)
    whole = answers(random, 80, [0.8])[:, 0]
    strata = np.repeat([0, 1], 40)
    half = permuted(whole / 2, np.array([-1.0, 1.0]), strata, whole)
    assert (half.value, half.p) == (pytest.approx(0), 1)  # every item keeps exactly half
    lost = np.where(strata == 0, whole, 0.0)
    assert permuted(lost, np.array([-1.0, 1.0]), strata, whole).p < 0.001


def test_curves_are_read_on_straight_lines_in_any_order():
    x = np.array([[3.0, 1.0, 2.0], [1.0, 2.0, 3.0]])
    y = np.array([[30.0, 10.0, 20.0], [10.0, 20.0, 40.0]])
    assert read_between(x, y, np.array([1.5, 2.5])).tolist() == [15, 30]
    assert read_between(x[0], y[0], np.array(3.0)) == 30
    assert read_between(np.array([1.0, 1.0]), np.array([2.0, 4.0]), np.array(1.0)) == 3  # two points at one x


def shares_of_levels(random, dense, ours, count=60):
    """Return p of a growing share lost over levels with these shares right."""
    parts = [answers(random, count, pair) for pair in zip(dense, ours, strict=True)]
    values = np.concatenate(parts)
    x = np.arange(len(parts)) - (len(parts) - 1) / 2
    return permuted(
        values[:, 0] - values[:, 1], x / (x**2).sum(), np.repeat(np.arange(len(parts)), count), values[:, 0]
    ).p


def interaction(random, easy, hard, count=60):
    """Return p of a difference of differences between two levels."""
    parts = [answers(random, count, pair) for pair in (easy, hard)]
    return weighted_sum(grid(*parts), np.array([-1.0, 1, 1, -1])).p(0)


def retained(random, first, second, count=120):
    """Return p of a difference of two shares kept of the same items."""
    values = answers(random, count, [*first, *second])
    return drawn(grid(values), lambda m: m[..., 1] / m[..., 0] - m[..., 3] / m[..., 2]).p(0)


def matched(random, shift):
    """Return p of a difference of two curves at one perplexity, each measured with error."""
    x = np.array([0, 0.5, 1.0, 0, 0.7, 1.2])
    windows = 3 + x + random.normal(0, 0.3, (24, 1)) + random.normal(0, 0.05, (24, 6))
    items = answers(random, 120, 0.65 - 0.3 * x + shift * (np.arange(6) > 2))
    table = grid(windows, items)

    def apart(means):
        at = np.full(means.shape[:-1], 3.5)
        curves = [read_between(means[..., k : k + 3], means[..., k + 6 : k + 9], at) for k in (0, 3)]
        return curves[1] - curves[0]

    return drawn(table, apart).p(0)


@pytest.fixture
def quick(monkeypatch):
    """Draw and permute less often."""
    monkeypatch.setattr(effect, "_PERMUTATIONS", 399)
    whole = effect.bootstrap
    monkeypatch.setattr(effect, "bootstrap", lambda *args, **more: whole(*args, **more, draws=399))


CASES = {
    "levels": (
        lambda random: shares_of_levels(random, [0.9, 0.75, 0.6], [0.72, 0.6, 0.48]),
        lambda random: shares_of_levels(random, [0.9, 0.75, 0.6], [0.85, 0.55, 0.3]),
    ),
    "interaction": (
        lambda random: interaction(random, (0.9, 0.75), (0.65, 0.5)),
        lambda random: interaction(random, (0.9, 0.85), (0.7, 0.4)),
    ),
    "retention": (
        lambda random: retained(random, (0.6, 0.48), (0.5, 0.4)),
        lambda random: retained(random, (0.6, 0.54), (0.6, 0.36)),
    ),
    "matched": (lambda random: matched(random, 0.0), lambda random: matched(random, 0.15)),
}
"""For each kind of effect, its p without an effect and with one."""


@pytest.mark.drill
@pytest.mark.parametrize("case", CASES)
def test_tests_err_at_their_level_and_find_an_effect(case, quick):
    without, there = CASES[case]
    random = np.random.default_rng(7)
    errs = [without(random) <= LEVEL for _ in range(800)]
    assert 0.03 <= np.mean(errs) <= 0.065 and is_nominal(errs, LEVEL)
    assert rate(there(random) <= LEVEL for _ in range(150))[0] > 0.6


def test_a_few_simulations_err_rarely(quick):
    random = np.random.default_rng(3)
    for without, there in CASES.values():
        assert sum(without(random) <= LEVEL for _ in range(15)) <= 4
        assert sum(there(random) <= LEVEL for _ in range(15)) >= 6
