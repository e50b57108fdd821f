"""Repeats of a recipe bend contrasts and slopes: an effect that other draws may turn is undecided."""

import numpy as np
import pytest
from scipy import stats

from stages.reporting.collect import Results
from stages.reporting.statistics.paired import LEVEL
from tests.claims import difference, judged
from tests.results import of_items

NEWS = {"suite": "s", "metric": "perplexity"}
WANDA = ("prune/w", "prune/w-1", "prune/w-2")
GPTQ = ("quantize/g", "quantize/g-1", "quantize/g-2")
BOTH = {"wanda": WANDA, "gptq": GPTQ}


def texts(shifts: dict[str, float], noise: float = 0.01, seed: int = 0) -> Results:
    """Return nats a token of 24 windows of each candidate, its shift above the base's."""
    random = np.random.default_rng(seed)
    windows = random.normal(3, 0.3, 24)
    items = {"base/m": windows.tolist()} | {
        name: (windows + shift + random.normal(0, noise, 24)).tolist() for name, shift in shifts.items()
    }
    return of_items(items, metric="perplexity")


SPREAD = texts(dict(zip(WANDA, (0.05, -0.02, 0.01), strict=True)))


def test_an_effect_that_other_draws_may_turn_is_blocked():
    worse = difference("prune/w", "base/m", NEWS, expect="above")
    sure = judged(SPREAD, **worse)
    assert (sure.side, sure.blocked, sure.repeats) == ("supported", "", None) and sure.p < 1e-6
    found = judged(SPREAD, {"wanda": WANDA}, **worse)
    assert (found.effect, found.p) == (sure.effect, sure.p)
    assert found.repeats.value == pytest.approx(0.0133, abs=0.003)
    assert found.repeats.noise == pytest.approx(2.484 * 0.035, abs=0.01)
    numbers = f"{found.repeats.value:.3g} ± {found.repeats.noise:.3g}"
    why = f"over the repeats of its recipes the effect is {numbers}, so other draws may turn it"
    assert found.blocked == why
    close = texts(dict(zip(WANDA, (0.05, 0.052, 0.047), strict=True)), noise=0.001)
    assert judged(close, {"wanda": WANDA}, **worse).blocked == ""


def test_the_same_within_a_bound_must_hold_over_repeats():
    within = difference("prune/w", "base/m", NEWS, expect="within", bound=0.06)
    assert judged(SPREAD, **within).side == "supported"
    assert "other draws may turn it" in judged(SPREAD, {"wanda": WANDA}, **within).blocked
    near = texts(dict(zip(WANDA, (0.005, -0.005, 0.0), strict=True)), noise=0.001)
    assert judged(near, {"wanda": WANDA}, **within).blocked == ""


def test_the_mean_of_all_repeats_and_one_of_them_have_the_same_luck():
    sides = [{"weight": 1 / 3, "candidate": name} for name in WANDA] + [
        {"weight": -1.0, "candidate": "base/m"}
    ]
    mean = {"test": "contrast", "sides": sides, "readouts": [NEWS], "expect": "above"}
    one = judged(SPREAD, {"wanda": WANDA}, **difference("prune/w", "base/m", NEWS)).repeats
    assert judged(SPREAD, {"wanda": WANDA}, **mean).repeats.noise == pytest.approx(one.noise)


def test_shares_curves_and_slopes_carry_the_spread_through():
    right = {"base/m": 50, "prune/w": 40, "prune/w-1": 34, "prune/w-2": 31, "prune/x": 20}
    answers = of_items({name: [1.0] * n + [0.0] * (60 - n) for name, n in right.items()})
    table = Results(answers.scores.assign(floor=0.0), answers.samples)
    acc, groups = {"suite": "s", "metric": "acc"}, {"wanda": WANDA}
    spread = np.std([40 / 60, 34 / 60, 31 / 60], ddof=1) * 2.484
    kept = {"test": "contrast", "readouts": [acc], "measure": "retention", "expect": "below", "bound": 0.9}
    share = judged(table, groups, **kept, sides=[{"weight": 1.0, "candidate": "prune/w"}])
    assert share.repeats.value == pytest.approx(35 / 50)
    assert share.repeats.noise == pytest.approx(spread * 60 / 50, rel=1e-3)
    line = {"candidates": ["prune/w", "prune/x"], "x": {"values": [0.0, 2.0]}}
    slope = judged(table, groups, test="slope", readout=acc, lines=[line], expect="below")
    assert slope.repeats.value == pytest.approx((20 - 35) / 60 / 2)
    assert slope.repeats.noise == pytest.approx(spread / 2, rel=1e-3)
    halfway = {"by": "bytes_ideal", "value": 200.0}
    sized = table.scores.assign(bytes_ideal=table.scores["candidate"].map({"prune/w": 400, "prune/x": 100}))
    curve = judged(
        Results(sized.fillna({"bytes_ideal": 1}), table.samples), groups, test="contrast", readouts=[acc],
        sides=[{"weight": 1.0, "curve": ["prune/w", "prune/x"]}], at=halfway, expect="above", bound=0.1,
    )  # fmt: skip
    assert curve.repeats.value == pytest.approx((35 + 20) / 60 / 2)
    assert curve.repeats.noise == pytest.approx(spread / 2, rel=1e-3)


def test_agreement_has_no_repeats():
    sides = [{"weight": 1.0, "candidate": "prune/w-1", "agrees_with": "prune/w-2"}]
    shared = {"test": "contrast", "readouts": [NEWS], "expect": "above", "bound": -0.5}
    assert judged(SPREAD, {"wanda": WANDA}, sides=sides, **shared).repeats is None


@pytest.mark.parametrize("other", ["base/m", "quantize/g"])
def test_a_verdict_needs_students_or_welchs_test_over_repeats(other):
    random = np.random.default_rng(1)
    outcomes = []
    for seed, effect in enumerate((0.0, 0.0, 0.1, 0.5)):
        shifts = random.normal(0, 0.05, 6) + effect * np.repeat([1, 0], 3)
        table = texts(dict(zip([*WANDA, *GPTQ], shifts, strict=True)), seed=seed)
        found = judged(table, BOTH, **difference("prune/w", other, NEWS, expect="above"))
        means = table.samples.groupby("candidate")["score"].mean()
        ours, theirs = ([float(means[name]) for name in group] for group in (WANDA, GPTQ))
        test = (
            stats.ttest_1samp(ours, means["base/m"])
            if other == "base/m"
            else stats.ttest_ind(ours, theirs, equal_var=False)
        )
        assert found.repeats.p(0) == pytest.approx(test.pvalue)
        holds = test.pvalue <= LEVEL and (test.statistic > 0) == (found.side == "supported")
        assert (found.blocked == "") == holds
        outcomes.append(holds)
    assert {*outcomes} == {True, False}
