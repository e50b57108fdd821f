"""Comparisons of scores: noise, families, floors, and which items are paired."""

import html
import math
import re

import pandas as pd
import pytest

from stages.core import tables
from stages.reporting.collect import Results, competes, records
from stages.reporting.comparison import compare_revisions
from stages.reporting.statistics.holm import holm
from stages.reporting.words import share
from tests import results
from tests.results import compared, of_items, together

TAG = re.compile(r"<[^>]+>")


def by_candidate(comparison) -> pd.DataFrame:
    return comparison.rows.set_index("candidate")


def test_noise_is_the_distance_of_noise_candidates_from_their_source():
    base = [1.0] * 60 + [0.0] * 40
    comparison = compared(of_items({
        "base/m": base,
        "noise/a": [0.0, *base[1:]],         # 0.59, 0.01 away
        "noise/b": [1.0] * 63 + [0.0] * 37,  # 0.63, 0.03 away: the largest counts
        "prune/near": [1.0] * 58 + [0.0] * 42,
        "prune/luck": [1.0] * 55 + [0.0] * 45,
        "prune/far": [1.0] * 50 + [0.0] * 50,
        "prune/up": [1.0] * 70 + [0.0] * 30,
        "prune/same": base,
    }))  # fmt: skip
    rows = by_candidate(comparison)
    assert rows["noise"].tolist() == pytest.approx([0.03] * 8)
    assert rows["verdict"].to_dict() == {
        "base/m": "", "noise/a": "within noise", "noise/b": "within noise", "prune/near": "within noise",
        "prune/luck": "within noise",  # five lost, none won: p = 1 / 2^5, the third smallest of five
        "prune/far": "worse", "prune/up": "better", "prune/same": "identical",
    }  # fmt: skip
    assert rows.loc["prune/luck", ["p", "p_corrected", "family"]].tolist() == pytest.approx(
        [1 / 32, 3 / 32, 5]
    )
    assert rows.loc["prune/far", "p_corrected"] == pytest.approx(5 / 2**10)  # as that of prune/up
    assert rows.loc[["noise/a", "noise/b"], "p_corrected"].isna().all()
    assert (rows.loc["prune/far", "lost"], rows.loc["prune/far", "won"]) == (10, 0)
    assert set(comparison.competitors["candidate"]) == {
        "base/m", *(f"prune/{name}" for name in ("near", "luck", "far", "up", "same")),
    }  # fmt: skip
    assert comparison.noise["reference"].tolist() == ["base/m", "base/m"]


def test_a_difference_within_the_noise_is_noise_however_sure():
    base = [2.0, 2.1, 2.2, 2.3]
    surely = [x + 0.01 for x in base]
    items = {"base/m": base, "noise/n": [x + 0.02 for x in base], "prune/p": surely}
    row = by_candidate(compared(of_items(items, metric="perplexity"))).loc["prune/p"]
    assert row["p"] < 1e-6
    assert row["verdict"] == "within noise"
    without = compared(of_items({"base/m": base, "prune/p": surely}, metric="perplexity"))
    assert by_candidate(without).loc["prune/p", "verdict"] == "worse"


def test_p_values_are_corrected_within_a_family_of_overall_scores_and_one_of_levels(whole):
    wanted, folder = whole
    rows = compared(results.read(wanted, folder / "data/results")).rows
    judged = rows[competes(rows) & rows["p"].notna()]
    overall = judged["difficulty"] == "all"
    assert judged["p_corrected"].notna().all()
    for family in (judged[overall], judged[~overall]):
        assert set(family["family"]) == {len(family)}
        assert family["p_corrected"].tolist() == holm(family["p"].tolist())
    plain = html.unescape(TAG.sub("", (folder / "data/report/index.html").read_text()))
    assert f"The {overall.sum()} comparisons of overall scores are one family" in plain
    assert f"the {(~overall).sum()} of single levels of difficulty another" in plain
    assert not rows[~competes(rows)]["p_corrected"].notna().any()


def test_the_share_kept_above_the_floor_is_shown_where_it_is_defined(whole):
    wanted, folder = whole
    rows = compared(results.read(wanted, folder / "data/results")).rows
    text = (folder / "data/report/index.html").read_text()
    kept = rows[rows["retention"].notna()]
    assert len(kept)
    assert (kept["readout"] == "likelihood").all()  # the other readout's floor is not known here
    for row in records(kept[competes(kept)]):
        expected = (row["value"] - row["floor"]) / (row["reference_value"] - row["floor"])
        assert row["retention"] == pytest.approx(expected)
        assert row["retention_low"] <= row["retention"] <= row["retention_high"]
        if row["difficulty"] == "all":
            ends = f"({share(row['retention_low'])} to {share(row['retention_high'])})"
            assert f'{share(row["retention"])} <span class="soft">{ends}' in text


def test_a_dense_model_at_the_floor_has_nothing_to_keep():
    table = of_items({"base/m": [1.0] * 30 + [0.0] * 70, "prune/p": [1.0] * 10 + [0.0] * 90})
    for floor, defined in ((0.25, False), (0.0, True), (math.nan, False)):
        table.scores["floor"] = floor
        row = compared(table).rows.iloc[1]
        assert (not math.isnan(row["retention"])) == defined
    table.scores.loc[1, "value"] = 0.12  # not the mean of the items' scores
    table.scores["floor"] = 0.0
    assert math.isnan(compared(table).rows.iloc[1]["retention"])


def test_responders_without_knowledge_do_not_compete():
    base = [1.0] * 60 + [0.0] * 40
    comparison = compared(
        of_items({"base/m": base, "floor/dot": [0.0] * 100, "prune/p": base[10:] + [0.0] * 10})
    )
    assert set(comparison.competitors["candidate"]) == {"base/m", "prune/p"}
    rows = by_candidate(comparison)
    assert rows.loc["prune/p", "family"] == 1
    assert math.isnan(rows.loc["floor/dot", "p_corrected"])


def test_a_higher_perplexity_is_a_loss_and_its_error_is_paired():
    base, ours = [2.0, 3.0, 4.0], [2.3, 2.9, 4.4]
    row = compared(of_items({"base/m": base, "prune/p": ours}, metric="perplexity")).rows.iloc[1]
    assert (row["lost"], row["won"]) == (2, 1)
    assert row["delta"] == pytest.approx(math.exp(3.2) - math.exp(3.0))
    # d ppl = ppl_ours * d nats_ours - ppl_base * d nats_base, item by item.
    moved = [math.exp(3.2) * b - math.exp(3.0) * a for a, b in zip(base, ours, strict=True)]
    assert row["delta_stderr"] == pytest.approx(pd.Series(moved).sem())
    assert (row["low"] + row["high"]) / 2 == pytest.approx(0.2)


def test_only_the_same_prompts_are_paired():
    table = of_items({"base/m": [1, 0, 1, 0], "prune/p": [0, 0, 1, 1]})
    other = table.samples["candidate"].eq("prune/p") & table.samples["doc_id"].eq(0)
    table.samples.loc[other, "prompt_hash"] = "another prompt"
    row = compared(table).rows.iloc[1]
    assert (row["pairs"], row["lost"], row["won"]) == (3, 0, 1)


RIGHT, SOME, WRONG = [1.0] * 40, [1.0] * 20 + [0.0] * 20, [0.0] * 40
THINKING = {"readout": "generation", "metric": "pass@1", "counted": "exact_match"}
FILTERED = {"readout": "generation", "metric": "exact_match"}


def thinking() -> Results:
    """Return results at two budgets: at 64 the pruned model loses all, at 8 nothing, but there is noise."""
    long = {"base/m": RIGHT, "noise/n": RIGHT, "prune/p": WRONG}
    short = {"base/m": SOME, "noise/n": RIGHT, "prune/p": SOME}
    return together(of_items(long, **THINKING, budget=64), of_items(short, **THINKING, budget=8))


def filtered() -> Results:
    """Return results by two filters and, beside them, of a metric without a filter."""
    return together(
        of_items({"base/m": RIGHT, "prune/p": WRONG}, **FILTERED, filter="strict"),
        of_items({"base/m": SOME, "prune/p": SOME}, **FILTERED, filter="loose"),
        of_items({"base/m": WRONG, "prune/p": RIGHT}, readout="generation", metric="other"),
    )


@pytest.mark.parametrize("stored", [False, True])
def test_budgets_are_compared_each_with_itself(stored, tmp_path):
    table = thinking()
    if stored:
        tables.write_tables(tmp_path, table.scores, table.samples)
        table = Results(*(pd.read_parquet(tmp_path / name) for name in (tables.SCORES, tables.SAMPLES)))
    comparison = compared(table)
    rows = comparison.competitors.set_index(["candidate", "budget"])
    long, short = rows.loc[("prune/p", 64)], rows.loc[("prune/p", 8)]
    assert (long["delta"], long["pairs"], long["lost"], long["noise"]) == (-1, 40, 40, 0)
    assert (short["delta"], short["pairs"], short["lost"], short["noise"]) == (0, 40, 0, 0.5)
    assert (long["verdict"], short["verdict"], long["family"]) == ("worse", "identical", 2)
    assert comparison.headlines() == [("s", "t", "generation", "pass@1", "exact_match", None, 64)]
    assert comparison.noise.set_index("budget")["delta"].to_dict() == {64: 0, 8: 0.5}


def test_filters_are_compared_each_with_itself():
    comparison = compared(filtered())
    rows = comparison.rows[comparison.rows["candidate"] == "prune/p"]
    assert rows["filter"].fillna("none").tolist() == ["strict", "loose", "none"]
    assert rows["verdict"].tolist() == ["worse", "identical", "better"]
    assert set(rows["family"]) == {3}
    assert comparison.headlines() == [("s", "t", "generation", "exact_match", None, "strict", None)]


def test_draws_are_no_items():
    table = thinking()
    drawn = table.samples.assign(draw=0, score=0.5)
    both = Results(table.scores, pd.concat([table.samples, drawn.astype(table.samples.dtypes)]))
    pd.testing.assert_frame_equal(compared(both).rows, compared(table).rows)


def test_revisions_are_compared_measure_by_measure():
    old = together(
        of_items({"base/m": RIGHT}, **THINKING, budget=64), of_items({"base/m": RIGHT}, **THINKING, budget=8)
    )
    new = together(
        of_items({"base/m": RIGHT}, **THINKING, budget=64), of_items({"base/m": WRONG}, **THINKING, budget=8)
    )
    rows = compare_revisions(old, new, 0.02)
    assert rows["verdict"].tolist() == ["identical", "worse"]
    assert rows["family"].tolist() == [2, 2]


@pytest.mark.parametrize(
    ("measures", "chosen"),
    [
        ([("acc", None), ("acc_norm", None)], ("acc", None)),
        (
            [("exact_match", "strict-match"), ("exact_match", "flexible-extract")],
            ("exact_match", "strict-match"),
        ),
        (
            [("inst_level_strict_acc", None), ("prompt_level_strict_acc", None)],
            ("prompt_level_strict_acc", None),
        ),
        ([("bleu", None), ("rouge", None)], ("bleu", None)),
    ],
)
def test_a_benchmark_has_a_single_headline(measures, chosen):
    parts = [of_items({"base/m": [1.0, 0.5]}, metric=metric, filter=kept) for metric, kept in measures]
    headlines = compared(together(*parts)).headlines()
    assert headlines == [("s", "t", "likelihood", chosen[0], None, chosen[1], None)]
