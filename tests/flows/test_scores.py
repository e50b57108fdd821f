"""Scores on the terminal: whole or partial results, beside what it takes to read them."""

import json

import pytest
import yaml
from rich.console import Console
from typer.testing import CliRunner

from flows import scores
from flows.cli import app
from stages.core.errors import Refusal
from stages.core.files import MODELS, RECORD, write_json
from stages.job.params import Params
from stages.reporting.words import number, size
from tests import results

CANDIDATES = ["base/smollm2", "noise/smollm2-batch-5", "quantize/gptq-w4g64", "finetune/wanda-50-lora"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A project with the results of four candidates and no report."""
    top = tmp_path_factory.mktemp("scores")
    raw = yaml.safe_load((results.ROOT / "params.yaml").read_text())
    raw["evaluate"]["candidates"] = CANDIDATES
    raw["profile"]["candidates"] = []
    (top / "params.yaml").write_text(yaml.safe_dump(raw, sort_keys=False))
    results.write(top / "data/results", results.params(evaluate=raw["evaluate"]))
    return top


@pytest.fixture
def params(folder, monkeypatch) -> Params:
    monkeypatch.chdir(folder)
    return results.params(evaluate={"candidates": CANDIDATES}, profile=_profile())


def _profile() -> dict:
    return {**yaml.safe_load((results.ROOT / "params.yaml").read_text())["profile"], "candidates": []}


def test_a_score_stands_beside_interval_base_floor_word_and_size(params):
    shown = scores.computed(params)
    assert shown.notes == []
    rows = {(row["candidate"], row["suite"], row["metric"]): row for row in shown.scores}
    assert {candidate for candidate, _, _ in rows} == set(CANDIDATES)
    ours = rows["quantize/gptq-w4g64", "arithmetic", "acc"]
    base = rows["base/smollm2", "arithmetic", "acc"]
    assert 0 <= ours["low"] < ours["value"] < ours["high"] <= 1
    assert ours["of_reference"] == pytest.approx(ours["value"] / base["value"])
    assert ours["reference"] == "base/smollm2" and base["reference"] is None and not base["verdict"]
    assert ours["floor"] is not None and ours["bytes_on_disk"] > 0
    assert ours["verdict"] and ours["word"].startswith(ours["verdict"])
    console = Console(width=200)
    with console.capture() as captured:
        scores.show_scores(shown.scores, console)
    text = captured.get()
    assert "arithmetic: acc (higher is better)" in text and "news: perplexity (lower is better)" in text
    assert ours["word"] in text and f"{ours['low']:.3f} to {ours['high']:.3f}" in text


def test_readable_rows_say_what_the_terminal_says(params):
    rows = scores.computed(params).scores
    readable = scores.readable(rows)
    assert [row["candidate"] for row in readable] == [row["candidate"] for row in rows]
    console = Console(width=200, record=True)
    scores.show_scores(rows, console)
    printed = console.export_text()
    for row in readable:
        line = next(
            line for line in printed.splitlines() if row["candidate"] in line and row["score"] in line
        )
        assert row["95 % interval"] in line and row["bits a weight"] in line
    assert {len(row) for row in readable} == {10}
    assert all(isinstance(value, str) for row in readable for value in row.values())


def test_no_figure_is_cut_on_a_terminal_of_80(params):
    rows = scores.computed(params).scores
    console = Console(width=80)
    with console.capture() as captured:
        scores.show_scores(rows, console)
    text = captured.get()
    assert "…" not in text
    for row in rows:
        assert number(row["value"], row["metric"]) in text
        assert size(row["bytes_on_disk"]) in text and f"{row['bits_per_weight']:.2f}" in text
        assert all(word in text for word in (row["word"] or "").split())


def test_a_candidate_comes_with_its_recipe_suites_and_commands(params):
    shown = CliRunner().invoke(app, ["show", "finetune/wanda-50-lora", "--json"])
    assert shown.exit_code == 0
    facts = json.loads(shown.output)
    assert facts["lineage"] == ["base/smollm2", "prune/wanda-50", "finetune/wanda-50-lora"]
    assert facts["recipes"]["prune/wanda-50"]["sparsity"] == 0.5
    assert set(facts["suites"]) == {"news", "speeches", "arithmetic"}
    assert facts["commands"]["make"] == "prunequant run finetune@wanda-50-lora"
    assert {row["candidate"] for row in facts["scores"]} == {"finetune/wanda-50-lora"}
    console = Console(width=200)
    with console.capture() as captured:
        scores.show_described(facts, console)
    assert "method: lora" in captured.get() and "graded@finetune/wanda-50-lora-arithmetic" in captured.get()


def test_partial_results_are_shown_and_said_to_be_partial(params, tmp_path, folder, monkeypatch):
    (tmp_path / "data/results/base/smollm2").mkdir(parents=True)
    (tmp_path / "data/results/base/smollm2/news").symlink_to(folder / "data/results/base/smollm2/news")
    monkeypatch.chdir(tmp_path)
    shown = scores.computed(params, ["base/smollm2"])
    assert [row["suite"] for row in shown.scores] == ["news"]
    assert shown.notes == [
        "not evaluated yet: base/smollm2/speeches, base/smollm2/arithmetic",
        "words compare the 1 of 12 evaluations that are there",
    ]
    recipe = params.quantize["gptq-w4g64"].model_dump(mode="json")
    record = MODELS / "quantize/gptq-w4g64" / RECORD
    for bits, edited in ((4, False), (3, True)):
        record.parent.mkdir(parents=True, exist_ok=True)
        write_json(record, {"recipes": {"quantize/gptq-w4g64": recipe | {"bits": bits}}})
        notes = scores.computed(params, ["quantize/gptq-w4g64"]).notes
        assert any("other recipes" in note for note in notes) == edited


def test_what_is_no_candidate_or_has_no_results_is_refused(params, tmp_path, monkeypatch):
    with pytest.raises(Refusal, match="did you mean 'quantize/gptq-w4g64'"):
        scores.computed(params, ["quantize/gptq-w4g6"])
    monkeypatch.chdir(tmp_path)
    with pytest.raises(Refusal, match="nothing is evaluated yet"):
        scores.computed(params)
    out = {"path": "data/results/base/smollm2/arithmetic", "md5": "0.dir", "size": 1}
    lock = {"schema": "2.0", "stages": {"graded@base/smollm2-arithmetic": {"cmd": "", "outs": [out]}}}
    (tmp_path / "dvc.lock").write_text(yaml.safe_dump(lock))
    with pytest.raises(Refusal, match=r"dvc.lock knows 1; `dvc checkout graded` .* `dvc pull graded` from"):
        scores.computed(params)
    assert scores.summarized() == []
