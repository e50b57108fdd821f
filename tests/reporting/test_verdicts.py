"""Verdicts of a study: correction, controls, blocks, and what is written."""

import json
import math

import pytest

from stages.reporting.statistics.holm import holm
from stages.reporting.study import Missing
from stages.reporting.verdicts import judge_studies, nested_verdicts
from tests.claims import ACC, difference, judged, study
from tests.reporting.hypotheses.test_contrasts import SLOWER, timed
from tests.results import of_items

RIGHT = [1.0] * 60


def right(count: int) -> list[float]:
    return [1.0] * count + [0.0] * (60 - count)


TABLE = of_items({"base/m": RIGHT, "prune/a": right(54), "prune/b": right(20), "prune/c": right(59)})


def test_p_is_corrected_within_the_study_alone():
    one = {name: difference(f"prune/{name}") for name in ("a", "b", "c")}
    studies = {"first": study(**one), "second": study(a=one["a"])}
    verdicts = judge_studies(TABLE, studies)
    assert [(v.study, v.hypothesis) for v in verdicts] == [
        ("first", "a"), ("first", "b"), ("first", "c"), ("second", "a"),
    ]  # fmt: skip
    raw = [v.finding.p for v in verdicts[:3]]
    assert [v.p_holm for v in verdicts[:3]] == holm(raw)
    assert verdicts[3].p_holm == verdicts[3].finding.p == judged(TABLE, **one["a"]).p
    assert [v.verdict for v in verdicts] == ["supported", "supported", "undecided", "supported"]
    assert "60 items show" in verdicts[2].why
    opposite = judge_studies(TABLE, {"s": study(b=difference("prune/b", expect="above"))})
    assert opposite[0].verdict == "contradicted"


def test_a_hypothesis_without_data_is_undecided_and_corrects_nothing():
    one = {name: difference(f"prune/{name}") for name in ("a", "b")}
    missing = {"time": Missing(claim="It is faster.", why="no suite has timings.")}
    whole = study(**one).model_copy(update={"no_data": missing})
    verdicts = judge_studies(TABLE, {"s": whole})
    assert verdicts[:2] == judge_studies(TABLE, {"s": study(**one)})
    last = verdicts[2]
    assert (last.hypothesis, last.verdict, last.claim) == ("time", "undecided", "It is faster.")
    assert last.why == "no data: no suite has timings."
    written = json.loads(json.dumps(nested_verdicts(verdicts), allow_nan=False))["s"]["time"]
    assert (written["verdict"], written["effect"], written["p_holm"], written["items"]) == (
        "undecided",
        None,
        None,
        0,
    )


def test_a_hypothesis_needs_its_control():
    settings = {
        "a": difference("prune/b", control="b"),
        "b": difference("prune/c", control="c"),
        "c": difference("prune/a"),
    }
    verdicts = {v.hypothesis: v for v in judge_studies(TABLE, {"s": study(**settings)})}
    assert {name: v.verdict for name, v in verdicts.items()} == {
        "a": "undecided", "b": "undecided", "c": "supported",
    }  # fmt: skip
    assert verdicts["a"].control == "b: undecided"
    assert verdicts["a"].why == "its control b is undecided."
    assert verdicts["b"].control == "c: supported"


def test_what_blocks_is_the_reason_whatever_p_is():
    floored = TABLE.__class__(TABLE.scores.assign(floor=1.0), TABLE.samples)
    (verdict,) = judge_studies(floored, {"s": study(b=difference("prune/b"))})
    assert verdict.finding.p < 1e-6
    assert (verdict.verdict, verdict.why) == ("undecided", "base/m is not clearly above the floor on s acc.")


def test_a_missing_score_leaves_its_hypothesis_undecided_and_no_other():
    wrong = {"a": difference("prune/a", "base/m", {"suite": "s", "metric": "x"}), "b": difference("prune/zz")}
    verdicts = judge_studies(TABLE, {"s": study(**wrong, c=difference("prune/c"))})
    assert [v.verdict for v in verdicts[:2]] == ["undecided", "undecided"]
    assert verdicts[0].why == "s has no metric 'x'; allowed: acc."
    assert verdicts[1].why == "prune/zz has no scores."
    (alone,) = judge_studies(TABLE, {"s": study(c=difference("prune/c"))})
    assert verdicts[2] == alone


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_scores_that_are_not_finite_leave_every_test_undecided(bad):
    def nats(more: float, odd: bool = False) -> list[float]:
        return [bad if odd and i < 3 else 2 + more + i / 100 for i in range(24)]

    names = ["base/m", *(f"prune/{letter}" for letter in "abcdefgh")]
    table = of_items(
        {name: nats(0.1 * i, name == "prune/b") for i, name in enumerate(names)}, metric="perplexity"
    )
    text = {"suite": "s", "metric": "perplexity"}
    candidates, values = names[1:], [float(i) for i in range(8)]
    line = {"candidates": candidates, "x": {"values": values}}
    verdicts = judge_studies(table, {"s": study(
        contrast=difference("prune/b", "base/m", text), trend={
            "test": "trend", "readout": text, "candidates": candidates, "expect": "rises"},
        slope={"test": "slope", "readout": text, "lines": [line], "expect": "above"},
        correlation={
            "test": "correlation", "candidates": candidates, "first": text, "second": text | {"level": "add"},
            "expect": "positive"},
        saturation={"test": "saturation", "readout": text, **line, "expect": "below"},
        fit={
            "test": "fit", "readout": text, "candidates": candidates, "better": {"values": values},
            "worse": {"values": values[::-1]}},
    )})  # fmt: skip
    assert {v.verdict for v in verdicts} == {"undecided"}
    told = "3 of 24 scores of prune/b on s perplexity are not finite."
    assert [v.why for v in verdicts if v.hypothesis != "correlation"] == [told] * 5


def test_the_metrics_file_holds_numbers_and_texts_only():
    assert nested_verdicts([]) == {}
    nested = nested_verdicts(judge_studies(TABLE, {"s": study(b=difference("prune/b"))}))
    entry = nested["s"]["b"]
    assert (entry["verdict"], entry["effect"], entry["items"]) == ("supported", pytest.approx(-2 / 3), 60)
    assert json.loads(json.dumps(nested, allow_nan=False)) == nested
    assert all(
        value is None or not isinstance(value, float) or math.isfinite(value) for value in entry.values()
    )


def test_the_same_tables_give_the_same_verdicts():
    settings = {"k": difference("prune/b", "base/m", ACC, measure="retention")}
    assert judge_studies(with_floor(), {"s": study(**settings)}) == judge_studies(
        with_floor(), {"s": study(**settings)}
    )


def with_floor():
    return TABLE.__class__(TABLE.scores.assign(floor=0.25), TABLE.samples)


def test_verdicts_on_measurements_are_corrected_among_themselves():
    scores = {name: difference(f"prune/{name}") for name in ("a", "b")}
    slower = SLOWER | {"expect": "above", "bound": 0.0}
    table = timed(m=[1.0, 1.01, 0.99], p=[1.1, 1.12, 1.11])
    verdicts = judge_studies(TABLE, {"s": study(**scores, time=slower)}, measured=table)
    assert [verdict.measured for verdict in verdicts] == [False, False, True]
    assert verdicts[:2] == judge_studies(TABLE, {"s": study(**scores)})
    assert verdicts[2].p_holm == verdicts[2].finding.p
    assert nested_verdicts(verdicts)["s"]["time"]["repeats"] == 6
