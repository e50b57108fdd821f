"""The files for other tools against the rows that they come from: nothing lost, nothing invented."""

import json
import re

import numpy as np
import pandas as pd
import pytest
import yaml
from scipy import stats

from stages.reporting.collect import measure_of, records
from stages.reporting.export import headline_metrics, nested_metrics, summarize, wilson
from stages.reporting.words import labels
from tests import results
from tests.results import compared, of_items, together


def test_every_row_is_in_the_tables(whole):
    wanted, folder = whole
    read = results.read(wanted, folder / "data/results")
    written = pd.read_parquet(folder / "data/report/results.parquet")
    pd.testing.assert_frame_equal(written[list(read.scores.columns)], read.scores)
    assert len(pd.read_parquet(folder / "data/report/samples.parquet")) == len(read.samples)


def test_metrics_and_summary_are_the_overall_scores(whole):
    wanted, folder = whole
    scores = results.read(wanted, folder / "data/results").scores
    metrics = json.loads((folder / "data/report/metrics.json").read_text())
    summary = pd.read_csv(folder / "data/report/summary.csv").set_index("candidate")
    assert list(metrics) == list(wanted.evaluate.candidates) == list(summary.index)
    overall = scores[scores["difficulty"] == "all"]
    assert len(overall) == sum(len(values) for suites in metrics.values() for values in suites.values())
    for row in records(overall):
        assert metrics[row["candidate"]][row["suite"]][row["metric"]] == row["value"]
        assert summary.loc[row["candidate"], f"{row['suite']}.{row['metric']}"] == pytest.approx(row["value"])
        assert summary.loc[row["candidate"], "bytes_on_disk"] == row["bytes_on_disk"]


def test_headlines_stand_beside_interval_reference_and_verdict(whole):
    wanted, folder = whole
    lines = records(pd.read_csv(folder / "data/report/headlines.csv"))
    rows = pd.read_parquet(folder / "data/report/results.parquet")
    scores = {
        (row["candidate"], row["suite"], row["metric"]): row
        for row in records(rows[rows["difficulty"] == "all"])
    }
    assert len(lines) == 4 * len(wanted.evaluate.candidates)
    for line in lines:
        row = scores[line["candidate"], line["suite"], line["metric"]]
        assert line["low"] <= line["value"] <= line["high"] and line["value"] == pytest.approx(row["value"])
        assert (line["verdict"] or "") == row["verdict"]
        assert (line["word"] or "").startswith(row["verdict"])
        if line["reference"] is not None:
            assert line["of_reference"] == pytest.approx(row["value"] / row["reference_value"])
        if line["metric"] != "perplexity":
            assert line["low"] >= 0 and line["high"] <= 1 and line["floor"] == pytest.approx(row["floor"])


def test_dvc_shows_a_short_row_of_each_candidate(whole, capsys):
    from dvc.compare import show_metrics

    wanted, folder = whole
    shown = {
        file.relative_to(folder).as_posix(): json.loads(file.read_text())
        for path in yaml.safe_load((results.ROOT / "dvc.yaml").read_text())["metrics"]
        for file in ([folder / path] if path.endswith(".json") else sorted((folder / path).rglob("*.json")))
    }
    verdicts = {"data/report/verdicts.json": {}, "data/report/measured_verdicts.json": {}}
    assert {path: values for path, values in shown.items() if path in verdicts} == verdicts  # no study
    rows = {f"data/report/metrics/{name}.json" for name in wanted.evaluate.candidates}
    assert set(shown) == rows | set(verdicts)
    show_metrics({"": {"data": {path: {"data": values} for path, values in shown.items()}}})
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["Path", "acc", "exact_match", "news", "speeches"]
    assert max(map(len, lines)) <= 100, "the width of `dvc metrics show`"
    every = json.loads((folder / "data/report/metrics.json").read_text())
    for candidate in wanted.evaluate.candidates:
        scores, exact = shown[f"data/report/metrics/{candidate}.json"], every[candidate]
        expected = {suite: exact[suite]["perplexity"] for suite in ("news", "speeches")}
        assert scores == pytest.approx(expected | exact["arithmetic"], rel=5e-5)


MEASURES = [
    {"readout": "generation", "metric": "pass@1", "counted": "exact_match", "budget": 64},
    {"readout": "generation", "metric": "pass@1", "counted": "exact_match", "budget": 8},
    {"readout": "generation", "metric": "exact_match", "filter": "strict"},
    {"readout": "generation", "metric": "exact_match", "filter": "loose"},
    {"metric": "exact_match"},
]


def test_no_measure_hides_another():
    table = together(
        *(
            of_items({"base/m": [1.0] * place + [0.0] * (9 - place), "prune/p": [1.0]}, **measure)
            for place, measure in enumerate(MEASURES)
        )
    )
    values = nested_metrics(table.scores)["base/m"]["s"]
    label = labels(table.scores)
    assert len(values) == len(MEASURES)
    for row in records(table.scores[table.scores["candidate"] == "base/m"]):
        assert values[label[measure_of(row)]] == row["value"]
    summary = summarize(compared(table)).set_index("candidate")
    headlines = [column for column in summary if column.startswith("s.")]
    assert headlines == ["s.exact_match, strict, generation", "s.exact_match, likelihood"]
    assert summary.loc["base/m", headlines].tolist() == pytest.approx([2 / 9, 4 / 9])
    short = {"exact_match, strict, generation": 0.22222, "exact_match, likelihood": 0.44444}
    assert headline_metrics(compared(table))["base/m"] == short


def test_a_short_name_means_one_measure():
    measured = {
        "s": ({"metric": "acc"}, {"metric": "exact_match", "readout": "generation"}),
        "t": ({"metric": "acc"}, {"metric": "f1", "readout": "generation"}),
        "u": ({"metric": "acc"},),
    }
    parts = []
    for suite, measures in measured.items():
        for measure in measures:
            part = of_items({"base/m": [1.0, 0.0]}, **measure)
            for table in (part.scores, part.samples):
                table["suite"] = suite
            parts.append(part)
    assert list(headline_metrics(compared(together(*parts)))["base/m"]) == [
        "s.acc", "exact_match", "t.acc", "f1", "u",
    ]  # fmt: skip


def test_json_has_neither_nan_nor_infinity():
    scores = of_items({"base/m": [1.0], "prune/p": [1.0]}).scores
    scores["value"] = [float("nan"), float("inf")]
    assert nested_metrics(scores) == {"base/m": {"s": {"acc": None}}, "prune/p": {"s": {"acc": None}}}


def test_plots_have_the_columns_that_dvc_draws(whole):
    _, folder = whole
    plots = yaml.safe_load((results.ROOT / "dvc.yaml").read_text())["plots"]
    for entry in plots:
        ((path, settings),) = entry.items()
        drawn = pd.read_csv(folder / path)
        template = (results.ROOT / settings["template"]).read_text()
        assert {settings["x"], settings["y"]} <= set(drawn)
        assert set(re.findall(r'"field": "(\w+)"', template)) - {"rev"} <= set(drawn)
        assert not drawn["candidate"].str.startswith("noise/").any()
        assert len(drawn) == 2 * 10


def shares(right: np.ndarray, count: int) -> pd.DataFrame:
    """The intervals of `right` right answers of `count`, by number of right answers."""
    value = pd.Series(right / count)
    return wilson(value, (value * (1 - value) / (count - 1)) ** 0.5, pd.Series(count, value.index))


def test_the_interval_of_a_share_is_wilsons():
    ours = shares(np.arange(121), 120)
    for right in (0, 1, 30, 119, 120):
        theirs = stats.binomtest(right, 120).proportion_ci(method="wilson")
        assert ours.loc[right].tolist() == pytest.approx([*theirs], abs=0.0005)
        assert ours.loc[right, "low"] <= right / 120 <= ours.loc[right, "high"]
    assert ours.loc[0, "high"] == pytest.approx(0.031, abs=0.001)


@pytest.mark.parametrize("truth", [0.01, 0.05, 0.5, 0.97])
def test_the_interval_of_a_share_holds_the_truth_in_nineteen_of_twenty(truth):
    ours = shares(np.arange(121), 120)
    holds = (ours["low"] <= truth) & (truth <= ours["high"])
    assert 0.92 < stats.binom(120, truth).pmf(np.arange(121))[holds].sum() < 0.99
