"""The data that the page holds: equal to the tables, safe inside a script, and small."""

import html
import json
import math
import random
import re
from types import SimpleNamespace

import pandas as pd
import pytest

from stages.core.tables import ITEM
from stages.reporting.collect import Results, by_measure, records
from stages.reporting.judging import Report
from stages.reporting.page.board import board, relative
from stages.reporting.page.browse import browse
from stages.reporting.page.by_block import block_rows, by_artifact, not_finite, recovery_curves
from stages.reporting.page.packing import as_json, inline_script, zipped
from stages.reporting.page.points import AXES, chart_data
from stages.reporting.words import labels
from tests import results
from tests.reporting.opened import Page, unpacked
from tests.results import compared, of_items


@pytest.fixture(scope="module")
def page(whole):
    return Page.of(whole[1])


@pytest.fixture(scope="module")
def rows(whole):
    wanted, folder = whole
    return compared(results.read(wanted, folder / "data/results"))


def test_the_charts_hold_the_scores_of_the_tables(page, rows):
    charts = page.data["charts"]
    whole = rows.competitors[rows.competitors["difficulty"] == "all"]
    scores = by_measure(whole)
    for place, measure in enumerate(rows.headlines()):
        for row in records(scores[measure]):
            point = next(p for p in charts["points"] if p["candidate"] == row["candidate"])
            share, low, high, value, verdict = point["scores"][place]
            assert value == row["value"] and verdict == row["verdict"]
            assert (point["disk"], point["ideal"]) == (row["bytes_on_disk"] / 1e6, row["bytes_ideal"] / 1e6)
            if row["reference"] is None:
                assert (share, low, high) == (1.0, None, None)
                continue
            assert share == pytest.approx(row["value"] / row["reference_value"])
            assert low <= share * 1.001 and share <= high * 1.001
            if row["metric"] == "perplexity":
                assert (low, high) == pytest.approx((math.exp(row["low"]), math.exp(row["high"])))
    assert charts["axes"] == AXES  # two models were measured


def test_blocks_are_those_of_the_records(page):
    rows = page.data["charts"]["blocks"]
    drawn = dict.fromkeys(row["artifact"] for row in rows)
    wanda, lora, gptq = "prune/wanda-50", "finetune/wanda-50-lora", "quantize/gptq-w4g64"
    assert {wanda, lora, gptq, "prune/magnitude-50"} <= drawn.keys()
    assert not {"base/smollm2", "quantize/rtn-w4g64"} & drawn.keys(), "neither zeros nor errors"
    chosen = {name: [row for row in rows if row["artifact"] == name] for name in (wanda, lora, gptq)}
    assert [(row["block"], row["sparsity"], row["error"]) for row in chosen[wanda]] == [
        (0, 0.4, 0.125), (1, 0.6, 0.25),
    ]  # fmt: skip
    assert [row["error"] for row in chosen[lora]] == [None, None], "its source's error is not its own"
    assert [row["sparsity"] for row in chosen[gptq]] == [0.0, 0.0001]


def test_a_training_behind_several_candidates_is_one_curve():
    note = {"curve": {"tokens": [0, 8], "held_out_loss": [2.0, 1.5]}}
    tuned = {"finetune/a": note, "quantize/b": {"bos": False}}
    rows = recovery_curves({"finetune/a": {"notes": {"finetune/a": note}}, "quantize/b": {"notes": tuned}})
    assert [(row["artifact"], row["tokens"], row["loss"]) for row in rows] == [
        ("finetune/a", 0, 2.0), ("finetune/a", 8, 1.5),
    ]  # fmt: skip
    assert recovery_curves({"base/m": {}}) == []


def test_equal_names_are_told_apart_and_errors_that_are_not_finite_are_named():
    errors = {"block_errors": {"tokens": 8, "errors": [0.1, None, 0.3]}}
    made = {
        name: {"sparsity_by_block": [0.5, 0.5], "notes": {name: errors}} for name in ("prune/x", "quantize/x")
    }
    made["prune/y"] = {"sparsity_by_block": [0.5, None], "notes": {}}
    rows = block_rows(made, [*made, "base/m"])
    assert {row["name"] for row in rows} == {"prune/x", "quantize/x", "y"}
    assert by_artifact(rows, "error") == {"prune/x": [0.1, None, 0.3], "quantize/x": [0.1, None, 0.3]}
    assert by_artifact(rows, "sparsity")["prune/x"] == [0.5, 0.5, None]
    assert not_finite(made, list(made)) == [("prune/x", "1"), ("quantize/x", "1")]


def charts_of(shares, sizes, bases):
    """Return the charts of candidates with `shares` of 100 items right, each made from its base."""
    table = of_items({name: [1.0] * right + [0.0] * (100 - right) for name, right in shares.items()})
    scores = table.scores
    scores["base"] = scores["candidate"].map(bases)
    scores["bytes_on_disk"] = scores["bytes_ideal"] = scores["candidate"].map(sizes)
    rows = compared(table)
    shown = board(rows, labels(rows.rows), 0.02, None)
    return chart_data(shown, dict.fromkeys(shares, "dense"), [], SimpleNamespace(report=Report()))


def test_a_front_holds_the_models_of_one_base():
    shares = {"base/m": 100, "prune/a": 50, "prune/b": 40, "base/n": 50, "prune/c": 45, "prune/lone": 100}
    sizes = {"base/m": 10, "prune/a": 5, "prune/b": 6, "base/n": 9, "prune/c": 4, "prune/lone": 1}
    bases = dict.fromkeys(("base/m", "prune/a", "prune/b"), "m") | {"base/n": "n", "prune/c": "n"}
    charts = charts_of(shares, sizes, bases | {"prune/lone": "gone"})
    # `b` is larger and worse than `a`; the base of `lone` was not evaluated, so it has no share.
    assert charts["fronts"]["disk"] == [[[0, 1], [3, 4]]]
    assert [point["scores"][0][0] for point in charts["points"]] == [1.0, 0.5, 0.4, 1.0, 0.9, None]


def test_the_static_table_has_the_same_shares(page):
    lines = re.findall(r'<tr role="row" data-candidate="([^"]+)">(.*?)</tr>', page.text, re.DOTALL)
    assert len(lines) == len(page.data["charts"]["points"]) > 5
    for (candidate, line), point in zip(lines, page.data["charts"]["points"], strict=True):
        assert candidate == point["candidate"]
        cells = re.findall(r'<td [^>]*data-key="m\d+" data-v="([^"]+)"><a [^>]*>([^<]+)</a>', line)
        measures = page.data["charts"]["measures"]
        for (value, text), (share, *_), measure in zip(cells, point["scores"], measures, strict=True):
            assert float(value) == share
            if candidate != "base/smollm2":
                assert html.unescape(text) == relative(share, "perplexity" if measure["ratio"] else "acc")


def test_the_answer_is_there_without_scripts(page):
    answers = page.data["answer"]
    texts = answers["answers"]["base/smollm2"]["bytes_on_disk"]
    static = page.read.split("What to ship")[1].split("All candidates")[0]
    shown = [text for _, _, text in answers["texts"][texts[2][-1]]]  # 2 %, of any size
    assert len(shown) >= 2 and all(" ".join(text.split()) in static for text in shown)


def test_items_hold_every_answer_and_each_text_once(page, whole, rows):
    samples = results.read(whole[0], whole[1] / "data/results").samples
    texts = page.items["texts"]
    assert len(texts) == len(set(texts))
    place = next(i for i, m in enumerate(page.data["charts"]["measures"]) if "acc" in m["name"])
    for candidate in ("base/smollm2", "prune/wanda-50"):
        ours = samples[(samples["candidate"] == candidate) & (samples["metric"] == "acc")]
        expected = {(int(r["doc_id"]), r["target"], r["response"], r["score"]) for r in records(ours)}
        answered = page.answers(candidate, place)
        assert {(a["item"], a["target"], a["response"], a["score"]) for a in answered} == expected
        assert all(a["prompt"].startswith(f"question {a['item']} of ") for a in answered)


def many(count: int) -> Results:
    right = [float(i % 3 > 0) for i in range(count)]
    flipped = [1 - x if i % 10 == 0 else x for i, x in enumerate(right)]
    answered = of_items({"base/m": right, "prune/p": flipped})
    draw = random.Random(0)
    texts = [f"answer {draw.randrange(10**9)} of {i}" for i in range(len(answered.samples))]
    answered.samples["response"] = pd.Series(texts, dtype="str")
    return answered


def test_a_choice_is_shown_by_its_text_and_not_by_its_number():
    answered = of_items({"base/m": [1.0, 0.0], "prune/p": [0.0, 1.0]}, readout="likelihood", metric="acc")
    answered.samples["target"] = pd.Series(["1", "0"] * 2, dtype="str")
    answered.samples["response"] = pd.Series(["1", "1", "0", "0"], dtype="str")
    asked = answered.samples[[*ITEM, "difficulty", "target"]].drop_duplicates([*ITEM])
    items = asked.assign(prompt="?", prompt_characters=1, choices=[[" eight", " ten"]] * len(asked))
    answered = Results(answered.scores, answered.samples, items)
    headlines = compared(answered).headlines()
    text, _ = browse(answered, headlines, ["base/m", "prune/p"], {"prune/p": "base/m"})
    columns = json.loads(unpacked(text))
    (measure,) = columns["measures"]

    def shown(places: list[int]) -> list[str]:
        return [columns["texts"][place] for place in places]

    assert shown(measure["target"]) == [" ten", " eight"]
    assert shown(measure["answers"]["base/m"]["response"]) == [" ten", " ten"]
    assert shown(measure["answers"]["prune/p"]["response"]) == [" eight", " eight"]


@pytest.mark.parametrize(("limit", "rest"), [(1_000_000, True), (20_000, False), (3_000, False)])
def test_items_beyond_the_limit_are_sampled_and_flipped_ones_come_first(limit, rest):
    answered = many(1000)
    headlines = compared(answered).headlines()
    text, sentence = browse(answered, headlines, ["base/m", "prune/p"], {"prune/p": "base/m"}, limit)
    assert len(text) <= limit
    (measure,) = json.loads(unpacked(text))["measures"]
    kept = len(measure["item"])
    base, ours = (measure["answers"].get(name, {"score": []})["score"] for name in ("base/m", "prune/p"))
    flips = sum(a != b for a, b in zip(base, ours, strict=True))
    if rest:
        assert kept == 1000 and sentence == "" and flips == 100
    else:
        assert kept < 1000 and f"{kept:,} of 1,000 items" in sentence
        assert flips == 100 if "all items that a candidate flipped" in sentence else flips < 100


def test_long_texts_lose_their_beginning_with_a_mark_and_a_sentence():
    answered = of_items({"base/m": [1.0, 0.0], "prune/p": [1.0, 1.0]})
    answered.samples["response"] = pd.Series(["a" * 4001, "b", "c" * 4000, "d"], dtype="str")
    headlines = compared(answered).headlines()
    text, sentence = browse(answered, headlines, ["base/m", "prune/p"], {"prune/p": "base/m"})
    texts = json.loads(unpacked(text))["texts"]
    assert "…" + "a" * 4000 in texts and "c" * 4000 in texts and "b" in texts
    assert sentence == "1 long text has an ellipsis (…) in place of all but the last 4,000 characters."


def test_json_cannot_end_its_script():
    hostile = {"</script><script>": ["<!--", "&amp;", "\u2028", math.inf, math.nan, None]}
    text = as_json(hostile)
    assert not set("<>&\u2028") & set(text)
    assert json.loads(text) == {"</script><script>": ["<!--", "&amp;", "\u2028", None, None, None]}
    assert unpacked(zipped("é" * 1000)) == "é" * 1000
    with pytest.raises(ValueError, match="end of a script"):
        inline_script("x = '</SCRIPT>'")


def test_a_page_of_thirty_candidates_stays_small(page):
    """Libraries and items do not grow with candidates; all else here is of ten."""
    parts = [page.element("packed-libraries"), page.element("packed-items")]
    rest = len(page.text) - sum(map(len, parts))
    assert len(parts[0]) + 3 * rest < 1_500_000
