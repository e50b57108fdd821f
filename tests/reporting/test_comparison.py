"""Comparisons of scores: noise, families, floors, and which items are paired."""

import html
import math
import re

import pandas as pd
import pytest

from stages.core import tables
from stages.reporting.collect import Results, competes, measure_of, records
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
        "base/m": "", "noise/a": "", "noise/b": "", "prune/near": "below noise", "prune/same": "below noise",
        "prune/luck": "not settled",  # five lost, none won: p = 1 / 2^5, the third smallest of five
        "prune/far": "worse", "prune/up": "better",
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


def test_repeats_of_a_recipe_bend_the_words_of_the_table():
    def right(count: int) -> list[float]:
        return [1.0] * count + [0.0] * (100 - count)

    items = {"base/m": right(80)} | {
        f"prune/{name}": right(count) for name, count in (("w", 70), ("w-1", 79), ("w-2", 84), ("far", 30))
    }
    table = of_items(items)
    assert by_candidate(compared(table)).loc["prune/w", "verdict"] == "worse"
    comparison = compared(table, noise={"wanda": ("prune/w", "prune/w-1", "prune/w-2")})
    rows = by_candidate(comparison)
    assert rows.loc["prune/w", "verdict"] == "below noise"
    assert rows.loc["prune/w", ["repeated_delta", "repeated_noise"]].tolist() == pytest.approx(
        [-0.0233, 2.484 * 0.0709], abs=1e-3
    )
    assert rows.loc[["prune/far", "base/m"], "repeated_delta"].isna().all()
    assert rows.loc["prune/far", "verdict"] == "worse"
    pooled = comparison.pooled.set_index("candidate")
    assert pooled.loc["prune/w", "verdict"] == "below noise" and pooled.loc["prune/far", "verdict"] == "worse"
    assert pooled.loc["prune/w", "repeated_delta"] == pytest.approx(-0.0233, abs=1e-3)


def test_repeats_of_the_reference_count_too():
    counts = {"base/m": 90, "prune/a": 60, "quantize/g": 80, "quantize/g-1": 60, "quantize/g-2": 70}
    table = of_items({name: [1.0] * n + [0.0] * (100 - n) for name, n in counts.items()})
    groups = {"gptq": ("quantize/g", "quantize/g-1", "quantize/g-2")}
    row = by_candidate(compared(table, reference="quantize/g", noise=groups)).loc["prune/a"]
    assert (row["delta"], row["repeated_delta"]) == (pytest.approx(-0.2), pytest.approx(-0.1))
    assert (row["repeated_noise"], row["verdict"]) == (pytest.approx(0.2484, abs=1e-3), "below noise")


def test_a_difference_within_the_noise_is_noise_however_sure():
    base = [2.0, 2.1, 2.2, 2.3]
    surely = [x + 0.01 for x in base]
    items = {"base/m": base, "noise/n": [x + 0.02 for x in base], "prune/p": surely}
    row = by_candidate(compared(of_items(items, metric="perplexity"))).loc["prune/p"]
    assert row["p"] < 1e-6
    assert row["verdict"] == "same within the margin"
    narrow = compared(of_items(items, metric="perplexity"), margin=0.005)
    assert by_candidate(narrow).loc["prune/p", "verdict"] == "below noise"
    without = compared(of_items({"base/m": base, "prune/p": surely}, metric="perplexity"))
    assert by_candidate(without).loc["prune/p", "verdict"] == "slightly worse"


def test_only_headlines_have_verdicts_and_are_corrected_for(whole):
    wanted, folder = whole
    comparison = compared(results.read(wanted, folder / "data/results"))
    rows = comparison.rows
    known = [measure_of(row) in comparison.headlines() for row in records(rows)]
    headline = (rows["difficulty"] == "all") & pd.Series(known, index=rows.index)
    family = rows[headline & competes(rows) & rows["p"].notna()]
    assert set(family["family"]) == {len(family)}
    assert family["p_corrected"].tolist() == holm(family["p"].tolist())
    others = rows.drop(family.index)
    assert set(others["family"]) == {0} and set(others["verdict"]) == {""}
    plain = html.unescape(TAG.sub("", (folder / "data/report/index.html").read_text()))
    assert f"over the {len(family)} headline scores compared" in plain


def right(count: int, of: int = 100) -> list[float]:
    return [1.0] * count + [0.0] * (of - count)


@pytest.mark.parametrize(
    ("ours", "of", "margin", "verdict"),
    [
        (970, 1000, 0.05, "slightly worse"),
        (970, 1000, 0.02, "worse"),
        (999, 1000, 0.02, "same within the margin"),
        (97, 100, 0.02, "not settled"),
        (45, 95, 0.6, "slightly worse"),
    ],
)
def test_a_loss_has_a_word_by_the_margin(ours, of, margin, verdict):
    table = of_items({"base/m": [1.0] * of, "prune/p": right(ours, of)})
    assert by_candidate(compared(table, margin=margin)).loc["prune/p", "verdict"] == verdict


def test_a_large_loss_is_never_called_noise():
    """.95 to .45 on 20 items is p < .01 alone; among many comparisons it is open, with what 20 items show."""
    many = {f"prune/p{i}": right(19, 20) for i in range(100)}
    table = of_items({"base/m": right(19, 20), "noise/n": right(19, 20), "prune/bad": right(9, 20)} | many)
    row = by_candidate(compared(table)).loc["prune/bad"]
    assert row["p_corrected"] > 0.05
    assert row["verdict"] == "not settled"
    assert row["smallest"] == pytest.approx(2.8016 * math.sqrt(0.5 / 20), rel=1e-3)


def test_few_identical_answers_do_not_show_that_models_are_the_same():
    for count, verdict in ((40, "not settled"), (400, "same within the margin")):
        table = of_items({"base/m": [1.0] * count, "prune/p": [1.0] * count})
        assert by_candidate(compared(table)).loc["prune/p", "verdict"] == verdict


def test_the_reference_may_be_another_candidate():
    table = of_items({"base/m": right(90), "finetune/f": right(50), "prune/p": right(48)})
    rows = by_candidate(compared(table, reference="finetune/f"))
    assert rows["reference"].tolist()[0] == rows["reference"].tolist()[2] == "finetune/f"
    assert pd.isna(rows.loc["finetune/f", "reference"])
    assert rows["delta"].tolist()[::2] == pytest.approx([0.4, -0.02])


def test_answers_are_pooled_over_suites_and_readouts_by_item():
    said = {"readout": "generation", "metric": "exact_match"}
    parts = [of_items({"base/m": right(80), "noise/n": right(79), "prune/p": right(74)}) for _ in range(2)]
    other = Results(*(frame.assign(suite="t") for frame in (parts[1].scores, parts[1].samples)))
    written = of_items({"base/m": right(80), "noise/n": right(80), "prune/p": right(74)}, **said)
    text = of_items({"base/m": [2.0] * 4, "noise/n": [2.0] * 4, "prune/p": [9.0] * 4}, metric="perplexity")
    text = Results(*(frame.assign(suite="u") for frame in (text.scores, text.samples)))
    (row,) = records(compared(together(parts[0], other, written, text)).pooled)
    assert (row["candidate"], row["suites"], row["pairs"], row["lost"]) == ("prune/p", 2, 200, 12)
    assert row["change"] == pytest.approx(-0.06)
    assert row["p"] == pytest.approx(2 * 0.5**12 - 0.5**12)  # McNemar's, an item once
    assert row["noise"] == pytest.approx((0.5 + 1) / 200)
    assert row["verdict"] == "worse"


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


@pytest.mark.parametrize("stale", ["noise/n", "prune/p", "base/m"])
def test_candidates_that_answered_other_items_have_no_pairs(stale):
    table = of_items({"base/m": right(80), "noise/n": right(79), "prune/p": right(74)})
    table.samples.loc[table.samples["candidate"].eq(stale), "prompt_hash"] = "items before an edit"
    comparison = compared(table)
    rows = by_candidate(comparison)
    assert pd.isna(rows.loc["prune/p", "pairs"]) == (stale != "noise/n")
    assert [row["pairs"] for row in records(comparison.pooled)] == ([100] if stale == "noise/n" else [])


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
    assert (long["verdict"], short["verdict"], long["family"]) == ("worse", "below noise", 2)
    assert comparison.headlines() == [("s", "t", "generation", "pass@1", "exact_match", None, 64)]
    assert comparison.noise.set_index("budget")["delta"].to_dict() == {64: 0, 8: 0.5}


def test_filters_are_compared_each_with_itself():
    comparison = compared(filtered())
    rows = comparison.rows[comparison.rows["candidate"] == "prune/p"]
    assert rows["filter"].fillna("none").tolist() == ["strict", "loose", "none"]
    assert rows["verdict"].tolist() == ["worse", "", ""]  # only the first filter is a headline
    assert rows["family"].tolist() == [1, 0, 0]
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
    assert rows["verdict"].tolist() == ["not settled", "worse"]
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
