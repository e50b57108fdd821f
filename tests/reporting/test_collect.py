"""Reading results: exactly those that params.yaml names, and measures whose key has missing values."""

import pandas as pd
import pytest

from stages.core import tables
from stages.core.errors import Refusal
from stages.reporting.collect import KEY, by_measure, collect, measure_of, noise_by_measure, records
from tests import results

FEW = {"candidates": ["base/smollm2", "noise/smollm2-batch-5", "prune/wanda-50", "quantize/gptq-w4g64"]}


def test_every_row_is_read_in_the_order_of_params(whole):
    wanted, folder = whole
    read = results.read(wanted, folder / "data/results")
    assert list(read.scores.drop(columns=tables.PARAMETERS_REMOVED)) == list(tables.SCORE_COLUMNS)
    assert read.candidates == list(wanted.evaluate.candidates)
    assert read.suites == ["news", "speeches", "arithmetic"]


def test_only_results_that_params_name_are_read(tmp_path):
    results.write(tmp_path, results.params())
    assert results.read(results.params(evaluate=FEW), tmp_path).candidates == FEW["candidates"]


def test_all_missing_results_are_named_at_once(tmp_path):
    wanted = results.params(evaluate=FEW)
    results.write(tmp_path, wanted)
    for name in ("prune/wanda-50/news", "base/smollm2/arithmetic"):
        (tmp_path / name / "samples.parquet").unlink()
    with pytest.raises(Refusal) as refused:
        results.read(wanted, tmp_path)
    assert "2 of 12" in str(refused.value)
    assert "prune/wanda-50/news" in str(refused.value)
    assert "base/smollm2/arithmetic" in str(refused.value)
    assert "gptq" not in str(refused.value)


def test_a_report_of_no_suite_is_refused():
    with pytest.raises(Refusal, match="no suite"):
        collect([], ["base/smollm2"], [])


def test_two_scores_of_one_measure_are_a_bug(tmp_path):
    wanted = results.params(evaluate={"candidates": ["base/smollm2"]})
    results.write(tmp_path, wanted)
    path = tmp_path / "base/smollm2/news/scores.parquet"
    once = pd.read_parquet(path)
    pd.concat([once, once]).to_parquet(path)
    with pytest.raises(ValueError, match="two scores of one measure"):
        results.read(wanted, tmp_path)


def test_records_have_plain_values(tmp_path):
    results.of_items({"base/m": [1.0], "prune/p": [0.0]}).scores.to_parquet(tmp_path / "scores.parquet")
    base, pruned = records(pd.read_parquet(tmp_path / "scores.parquet"))
    assert base["lineage"] == ["base/m"] and pruned["lineage"] == ["base/m", "prune/p"]
    assert (base["source"], pruned["source"]) == (None, "base/m")
    assert base["bits"] is base["counted"] is base["budget"] is base["stderr"] is None


MIXED = results.together(  # a missing value in every column of the key that may have one
    results.of_items({"base/m": [1.0, 0.0], "noise/n": [1.0, 1.0]}, metric="acc"),
    results.of_items({"base/m": [1.0, 0.0], "noise/n": [1.0, 0.0]}, metric="exact_match", filter="strict"),
    results.of_items({"base/m": [1.0, 0.0], "noise/n": [0.0, 0.0]}, metric="exact_match", filter="loose"),
    results.of_items(
        {"base/m": [1.0, 0.0], "noise/n": [1.0, 1.0]}, metric="pass@1", counted="exact_match", budget=8
    ),
    results.of_items(
        {"base/m": [0.0, 0.0], "noise/n": [0.0, 0.0]}, metric="pass@1", counted="exact_match", budget=64
    ),
)


def test_rows_are_grouped_by_measure_in_the_order_of_appearance():
    groups = by_measure(MIXED.scores)
    assert [key[3:] for key in groups] == [
        ("acc", None, None, None), ("exact_match", None, "strict", None),
        ("exact_match", None, "loose", None), ("pass@1", "exact_match", None, 8),
        ("pass@1", "exact_match", None, 64),
    ]  # fmt: skip
    for key, rows in groups.items():
        assert [measure_of(row) for row in records(rows)] == [key, key]


@pytest.mark.parametrize("stored", [False, True])
def test_noise_is_measured_by_base_and_measure(stored, tmp_path):
    scores = MIXED.scores
    if stored:
        scores.to_parquet(tmp_path / "scores.parquet")
        scores = pd.read_parquet(tmp_path / "scores.parquet")
    noise = noise_by_measure(scores)
    assert list(noise) == ["base", *KEY, "noise"]
    by_key = {measure_of(row)[3:]: row["noise"] for row in records(noise)}
    assert by_key == {
        ("acc", None, None, None): 0.5, ("exact_match", None, "strict", None): 0.0,
        ("exact_match", None, "loose", None): 0.5, ("pass@1", "exact_match", None, 8): 0.5,
        ("pass@1", "exact_match", None, 64): 0.0,
    }  # fmt: skip
    assert len(scores.merge(noise, on=["base", *KEY])) == len(scores)


def test_noise_is_the_largest_over_tables_and_unknown_without_its_source():
    quiet = results.of_items({"base/m": [1.0, 0.0], "noise/n": [1.0, 0.0]}).scores
    loud = results.of_items({"base/m": [1.0, 0.0], "noise/n": [1.0, 1.0]}).scores
    assert noise_by_measure(quiet, loud)["noise"].tolist() == [0.5]
    assert noise_by_measure(loud[loud["candidate"] == "noise/n"]).empty
    assert noise_by_measure(loud[loud["candidate"] == "base/m"]).empty
