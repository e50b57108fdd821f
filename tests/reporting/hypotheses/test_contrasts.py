"""Contrasts on tables: sides, readouts, shares, curves, floors and noise."""

import contextlib

import numpy as np
import pandas as pd
import pytest
from pydantic import ValidationError

from stages.core.errors import Refusal
from stages.reporting.collect import Results
from stages.reporting.hypotheses.cells import Cells, Unknown
from stages.reporting.hypotheses.evidence import Evidence
from stages.reporting.measured import Measured
from stages.reporting.verdicts import judge_studies
from tests.claims import ACC, difference, hypothesis, judged, leveled, study
from tests.results import of_items, together

RIGHT = [1.0] * 60
HALF = [1.0] * 30 + [0.0] * 30
FEW = [1.0] * 6 + [0.0] * 54


def test_a_difference_has_its_effect_side_and_floor():
    table = leveled({"all-of-it": {"base/m": RIGHT, "prune/p": HALF}}, floor=0.25)
    found = judged(table, **difference("prune/p"))
    assert (found.effect, found.side, found.n, found.unit) == (-0.5, "supported", 60, "share right")
    assert found.floors == {"s acc": 0.25}
    assert found.p == pytest.approx(2 * 0.5**30 - 0.5**30)
    assert judged(table, **difference("prune/p", expect="above")).side == "contradicted"


def test_a_reference_at_its_floor_blocks():
    table = leveled({"a": {"base/m": FEW, "prune/p": [0.0] * 60}}, floor=0.1)
    assert judged(table, **difference("prune/p")).blocked == "base/m is not clearly above the floor on s acc"
    above = Results(table.scores.assign(floor=0.0), table.samples)
    assert not judged(above, **difference("prune/p")).blocked


def test_a_candidate_at_its_floor_everywhere_blocks_an_interaction():
    lost = [0.0] * 60
    levels = {"easy": {"base/m": RIGHT, "prune/p": lost}, "hard": {"base/m": HALF, "prune/p": lost}}
    hard, easy = ACC | {"level": "hard"}, ACC | {"level": "easy", "weight": -1.0}
    found = judged(leveled(levels), **difference("prune/p", "base/m", hard, easy))
    assert found.effect == 0.5  # it turns over: hard items "lose less"
    assert "prune/p is at the floor on every readout" in found.blocked
    levels["easy"]["prune/p"] = RIGHT
    found = judged(leveled(levels), **difference("prune/p", "base/m", hard, easy))
    assert (found.effect, found.side, found.blocked, found.n) == (-0.5, "supported", "", 120)
    assert found.p < 0.001


def test_both_readouts_of_an_item_are_one_item():
    said = {"readout": "generation", "metric": "exact_match"}
    chosen = of_items({"base/m": RIGHT, "prune/p": HALF})
    written = of_items({"base/m": RIGHT, "prune/p": HALF}, **said)
    both = [ACC, {"suite": "s", "metric": "exact_match", "weight": -1.0}]
    found = judged(together(chosen, written), **difference("prune/p", "base/m", *both))
    assert (found.effect, found.n, found.p) == (0, 60, 1)  # the same items fail in both


def test_retention_is_above_the_floor_or_above_a_candidate():
    items = {"base/m": [1.0] * 48 + [0.0] * 12, "prune/p": [1.0] * 30 + [0.0] * 30, "prune/q": FEW}
    table = leveled({"a": items}, floor=0.2)
    sides = [{"weight": 1.0, "candidate": "prune/p"}]
    shared = {
        "test": "contrast",
        "sides": sides,
        "readouts": [ACC],
        "measure": "retention",
        "expect": "below",
    }
    kept = judged(table, **shared, bound=0.9)
    assert kept.effect == pytest.approx((0.5 - 0.2) / (0.8 - 0.2))
    assert kept.low < 0.5 < kept.high and kept.side == "supported" and kept.p < 0.01
    assert judged(table, **shared, zero="prune/q").effect == pytest.approx((0.5 - 0.1) / (0.8 - 0.1))
    with pytest.raises(Unknown, match="has no floor to take a share above"):
        judged(leveled({"a": items}, floor=None), **shared)


RECOVERED = {
    "test": "contrast", "sides": [{"weight": 1.0, "candidate": "prune/p"}], "readouts": [ACC],
    "measure": "retention", "zero": "prune/z", "expect": "below",
}  # fmt: skip


def test_a_recovered_share_needs_a_reference_above_its_zero():
    same = of_items({"base/m": HALF, "prune/z": HALF, "prune/p": HALF})
    above = of_items({"base/m": FEW, "prune/z": HALF, "prune/p": RIGHT})
    for table in (same, above):
        with pytest.raises(Refusal, match="base/m is not clearly better than prune/z on s acc"):
            judged(table, **RECOVERED, bound=0.5)
    lost = of_items({"base/m": RIGHT, "prune/z": FEW, "prune/p": HALF})
    found = judged(lost, **RECOVERED, bound=0.9)
    assert found.blocked == "" and found.effect == pytest.approx(0.4 / 0.9)
    nats = {
        name: [level + i / 1000 for i in range(24)]
        for name, level in (("base/m", 2), ("prune/z", 4), ("prune/p", 3))
    }
    text = of_items(nats, metric="perplexity")
    readout = {"readouts": [{"suite": "s", "metric": "perplexity"}]}
    assert judged(text, **RECOVERED | readout).effect == pytest.approx(0.5)  # a lower perplexity is better


def test_recovered_shares_err_at_their_level_where_nothing_was_lost():
    random = np.random.default_rng(0)
    said = 0
    for _ in range(60):
        items = {
            name: (random.random(240) < 0.6).astype(float).tolist()
            for name in ("base/m", "prune/z", "prune/p")
        }
        with contextlib.suppress(Refusal):
            said += judged(of_items(items), **RECOVERED, bound=1.0).p <= 0.05
    assert said <= 7  # one in twenty, and their spread; a third without the guard


def test_a_share_of_what_may_be_nothing_has_no_known_smallest_effect():
    table = leveled({"a": {"base/m": [1.0] * 12 + [0.0] * 8, "prune/p": [1.0] * 9 + [0.0] * 11}}, floor=0.25)
    test = difference("prune/p") | {"measure": "retention"}
    test["sides"] = test["sides"][:1]
    found = judged(table, **test)
    assert found.effect == pytest.approx((0.45 - 0.25) / (0.6 - 0.25))
    assert found.smallest is None  # drawn again, the reference is at times at the floor
    (verdict,) = judge_studies(table, {"t": study(a=test)})
    assert verdict.why.endswith("20 items show no effect of known size.")


def sized(table: Results, **sizes: int) -> Results:
    """Set the ideal size of each recipe."""
    name = table.scores["candidate"].str.split("/").str[1]
    return Results(table.scores.assign(bytes_ideal=name.map(sizes)), table.samples)


def test_curves_are_read_at_one_size_and_never_beyond_their_ends():
    def share(count: int) -> list[float]:
        return [1.0] * count + [0.0] * (60 - count)

    items = {"base/m": RIGHT, "prune/a": share(50), "prune/b": share(30), "quantize/q": share(50)}
    table = sized(leveled({"a": items}), m=800, a=400, b=100, q=200)
    sides = [{"weight": 1.0, "candidate": "quantize/q"}, {"weight": -1.0, "curve": ["prune/a", "prune/b"]}]
    shared = {"test": "contrast", "sides": sides, "readouts": [ACC], "expect": "above"}
    found = judged(table, **shared, at={"by": "bytes_ideal", "candidate": "quantize/q"})
    assert found.effect == pytest.approx(50 / 60 - 40 / 60)  # 200 is the middle of 100 and 400 as logarithms
    assert (found.side, found.blocked) == ("supported", "") and found.p < 0.01
    beyond = judged(table, **shared, at={"by": "bytes_ideal", "value": 50.0})
    assert beyond.blocked == "bytes_ideal 50 lies outside the curve, which goes from 100 to 400"


def test_a_measured_x_widens_the_interval():
    random = np.random.default_rng(0)
    items = {
        "base/m": [1.0] * 90 + [0.0] * 10,
        "prune/a": [1.0] * 80 + [0.0] * 20,
        "prune/b": [1.0] * 20 + [0.0] * 80,
    }
    windows = random.normal(3, 0.05, 24)
    sides = [{"weight": 1.0, "curve": ["prune/a", "prune/b"]}]
    at = {"by": "perplexity", "suite": "news", "value": float(np.exp(3.5))}
    widths = []
    for noise in (0.01, 0.8):
        text = of_items(
            {
                name: (windows + shift + random.normal(0, noise, 24)).tolist()
                for name, shift in (("base/m", -0.2), ("prune/a", 0.0), ("prune/b", 1.0))
            },
            metric="perplexity",
        )
        text = Results(text.scores.assign(suite="news"), text.samples.assign(suite="news"))
        found = judged(
            together(of_items(items), text),
            test="contrast",
            sides=sides,
            readouts=[ACC],
            at=at,
            expect="above",
        )
        assert found.effect == pytest.approx(0.5, abs=0.25)
        widths.append(found.high - found.low)
    assert widths[1] > 1.5 * widths[0]


def test_an_effect_no_larger_than_noise_is_blocked():
    moved = [0.0] * 3 + [1.0] * 57
    table = of_items({"base/m": RIGHT, "noise/n": moved, "prune/p": [0.0] * 2 + [1.0] * 58})
    found = judged(table, **difference("prune/p"))
    assert found.noise == pytest.approx(0.05)
    assert found.blocked == "the effect is 0.0333 from its bound, within numerical noise (0.05)"
    assert not judged(table, **difference("prune/p", expect="within", bound=0.1)).blocked


def test_agreement_is_that_of_scores():
    table = of_items({"base/m": RIGHT, "prune/p": HALF, "quantize/q": HALF, "prune/r": HALF[::-1]})
    sides = [
        {"weight": 1.0, "candidate": "prune/p", "agrees_with": "quantize/q"},
        {"weight": -1.0, "candidate": "prune/p", "agrees_with": "prune/r"},
    ]
    found = judged(table, test="contrast", sides=sides, readouts=[ACC], expect="above")
    assert (found.effect, found.side) == (1.0, "supported")


def test_scores_that_do_not_exist_are_named():
    table = of_items({"base/m": RIGHT, "prune/p": HALF})
    for readout, message in (
        ({"suite": "s", "metric": "accuracy"}, "s has no metric 'accuracy'; allowed: acc."),
        (ACC | {"level": "hard"}, "s has no level 'hard'; allowed: all."),
        (ACC | {"filter": "strict"}, "s acc strict has no filter 'strict'; allowed: none."),
    ):
        with pytest.raises(Unknown, match=message):
            judged(table, **difference("prune/p", "base/m", readout))
    budgets = [of_items({"base/m": RIGHT, "prune/p": HALF}, budget=budget) for budget in (8, 64)]
    with pytest.raises(Unknown, match="not a single score; add one of budget: 8, 64"):
        judged(together(*budgets), **difference("prune/p"))


def test_items_that_nobody_shares_are_refused():
    table = of_items({"base/m": RIGHT, "prune/p": HALF})
    other = table.samples["candidate"].eq("prune/p")
    table.samples.loc[other, "prompt_hash"] = "other" + table.samples.loc[other, "prompt_hash"]
    with pytest.raises(Refusal, match="no item of s acc was answered by all candidates"):
        judged(table, **difference("prune/p"))
    part = pd.concat([table.samples[~other], table.samples[~other].head(40).assign(candidate="prune/p")])
    assert judged(Results(table.scores, part), **difference("prune/p")).n == 40


def timed(batch_size: int = 1, busy: float = 0.0, **seconds: list[float]) -> Measured:
    """Return measured seconds a token of each candidate, `base/m` as `m`."""
    names = {name: "base/m" if name == "m" else f"prune/{name}" for name in seconds}
    figures = pd.DataFrame(
        [
            {"candidate": names[name], "batch_size": batch_size, "others_busy": busy, "threads": 1}
            for name in seconds
        ],
        columns=Measured().figures.columns,
    ).assign(seconds_per_token=[np.median(values) for values in seconds.values()])
    repeats = [
        {"candidate": names[name], "batch_size": batch_size, "repeat": i, "seconds_per_token": value}
        for name, values in seconds.items()
        for i, value in enumerate(values)
    ]
    return Measured(figures, pd.DataFrame(repeats))


SLOWER = {
    "test": "contrast", "unit": "repeat", "expect": "within", "bound": 0.05,
    "sides": [{"weight": 1.0, "candidate": "prune/p"}, {"weight": -1.0, "candidate": "base/m"}],
    "timings": [{"figure": "seconds_per_token", "batch_size": 1}],
}  # fmt: skip
EMPTY = of_items({"base/m": [1.0, 0.0]})


def of_times(measured: Measured, **settings: object) -> Evidence:
    return hypothesis(**SLOWER | settings).judge(Cells(EMPTY, measured=measured))


def test_times_are_compared_as_ratios_by_repeat():
    steady = [1.0, 1.001, 0.999, 1.002, 1.0]
    found = of_times(timed(m=steady, p=[1.2 * value for value in steady]))
    assert found.effect == pytest.approx(np.log(1.2))
    assert (found.side, found.n, found.units, found.blocked) == ("contradicted", 10, "repeats", "")
    assert found.p < 0.001
    same = of_times(timed(m=steady, p=[1.01 * value for value in steady]))
    assert same.side == "supported" and same.p < 0.001
    assert of_times(timed(m=steady, p=[1.2 * value for value in steady]), expect="above").p < 0.001


def test_times_without_a_difference_rarely_show_one():
    draw = np.random.default_rng(0)
    p = []
    for _ in range(400):
        base, ours = (list(draw.lognormal(center, 0.02, 5)) for center in (0, 0.05))
        p.append(of_times(timed(m=base, p=ours), expect="above").p)
    assert 0.025 <= np.mean(np.array(p) <= 0.05) <= 0.08  # the bound itself is the null


def test_times_of_a_busy_machine_or_another_one_are_not_judged():
    steady = [1.0, 1.001, 0.999]
    busy = of_times(timed(busy=0.3, m=steady, p=steady))
    assert "other processes took 30% of the machine while prune/p was measured" in busy.blocked
    both = timed(m=steady, p=steady)
    moved = Measured(both.figures.assign(processor=["a", "b"]), both.repeats)
    assert of_times(moved).blocked == "the measurements differ in processor"
    with pytest.raises(Unknown, match="prune/p was not measured at batch size 1; add both to profile"):
        of_times(timed(m=steady))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"unit": "item"}, "unit item needs readouts and no timings"),
        ({"readouts": [ACC]}, "unit repeat needs timings and no readouts"),
        ({"measure": "retention"}, "has no retention"),
    ],
)
def test_a_unit_has_its_own_settings(settings, words):
    with pytest.raises(ValidationError, match=words):
        hypothesis(**SLOWER | settings)


def test_a_measured_number_can_be_an_x():
    table = of_items({"base/m": RIGHT, "prune/p": HALF})
    line = {"candidates": ["base/m", "prune/p"], "x": {"column": "seconds_per_token", "batch_size": 1}}
    settings = {"test": "slope", "readout": ACC, "lines": [line], "expect": "above"}
    tested = hypothesis(**settings)
    assert tested.measured() == [("base/m", 1), ("prune/p", 1)]
    assert tested.judge(Cells(table, measured=timed(m=[2.0], p=[1.0]))).effect == pytest.approx(0.5)
    with pytest.raises(ValidationError, match="batch_size goes with a measured column"):
        hypothesis(**settings | {"lines": [line | {"x": {"column": "sparsity", "batch_size": 1}}]})
