"""The page of a study holds its verdicts, and keeps what was written by hand."""

import json
import re
from pathlib import Path

import pandas as pd
import pytest
import yaml

from benchmarks import study_page
from stages.reporting.collect import Results
from stages.reporting.comparison import headline_measures
from stages.reporting.effects import draw_effects
from tests import project
from tests.results import of_items, together

RIGHT, WRONG = [1.0] * 20, [0.0] * 20
ENTRY = {
    "verdict": "supported", "effect": 0.2, "low": 0.1, "high": 0.3, "unit": "share right", "p_holm": 0.001,
    "items": 60, "smallest": 0.08, "why": "p = 0.001 after correction.", "over_repeats": 0.18,
    "claim_low": 0.0, "claim_high": None,
}  # fmt: skip
POINT = ENTRY | {"low": None, "high": None}
NOTHING = ENTRY | {"verdict": "undecided", "effect": None, "low": None, "high": None, "why": "no data: none."}


RUNS = [Path("data/runs/prune/w.json"), Path("data/runs/prune/not-yet.json")]
"""What the project's stages name; the record of a stage that it had once lies beside them."""


@pytest.fixture
def ran(whole, tmp_path):
    """A project whose report has verdicts."""
    for name in ("results.parquet", "summary.csv"):
        to = tmp_path / "data/report" / name
        to.parent.mkdir(parents=True, exist_ok=True)
        to.write_bytes((whole[1] / "data/report" / name).read_bytes())
    claims = {"a1": "Fewer bits.", "a3": "Time | bits.", "c5": "Time a token."}
    study = {
        "hypotheses": {name: {"claim": claim} for name, claim in claims.items()},
        "no_data": {"a2": {"claim": "Facts go first."}},
    }
    (tmp_path / "params.yaml").write_text(yaml.safe_dump({"studies": {"falls": study}}))
    verdicts = {"falls": {"a1": ENTRY, "a2": NOTHING, "a3": POINT}}
    (tmp_path / "data/report/verdicts.json").write_text(json.dumps(verdicts))
    measured = {"falls": {"c5": ENTRY | {"unit": "ms"}}}
    (tmp_path / "data/report/measured_verdicts.json").write_text(json.dumps(measured))
    record = {
        "cpu_seconds": 90, "commit": "0123456789", "python": "3.11.7",
        "versions": {"torch": "2.13.0", "transformers": "5", "lm-eval": "1"},
    }  # fmt: skip
    (tmp_path / "data/runs/prune").mkdir(parents=True)
    for name in ("w", "gone"):
        (tmp_path / f"data/runs/prune/{name}.json").write_text(json.dumps(record))
    return tmp_path


def test_a_page_holds_results_and_keeps_prose(ran):
    page = study_page.write_page("falls", ran, ran / "pages", RUNS)
    text = page.read_text()
    assert "| `a1` | Fewer bits. | supported | 0.2 (0.1 to 0.3) share right; over repeats 0.18 |" in text
    assert "| `a2` | Facts go first. | undecided | no data: none. |" in text
    assert "| `a3` | Time \\| bits. | supported | 0.2 share right; over repeats 0.18 |" in text
    assert "| `c5` | Time a token. | supported | 0.2 (0.1 to 0.3) ms; over repeats 0.18 |" in text
    assert "CPU minutes: 2 (prune 1.5). Code of commit 0123456" in text
    for picture in re.findall(r"\]\((\S+\.png)\)", text):
        assert (page.parent / picture).stat().st_size > 1000
    with_prose = "before\n" + text + "after\n"
    page.write_text(with_prose)
    assert study_page.write_page("falls", ran, ran / "pages", RUNS).read_text() == with_prose


def test_what_has_not_run_has_no_page(ran):
    with pytest.raises(SystemExit, match="holds no verdicts of other"):
        study_page.write_page("other", ran, ran / "pages", RUNS)
    (ran / "pages").mkdir()
    (ran / "pages/falls.md").write_text("no marks")
    with pytest.raises(SystemExit, match="needs the lines"):
        study_page.write_page("falls", ran, ran / "pages", RUNS)


def test_every_page_tells_of_every_hypothesis():
    pages = sorted(study_page.PAGES.glob("*.md"))
    assert pages
    for page in pages:
        file = project.ROOT / f"studies/{page.stem}.yaml"
        names = re.findall(r"^\| `([^`]+)`", page.read_text(), re.MULTILINE)
        hypotheses = yaml.safe_load(file.read_text())["shared"]["hypotheses"]
        stems = [re.sub(r"\{\w+\}", "", name).rstrip("-") for name in hypotheses]
        assert all(any(name.startswith(stem) for name in names) for stem in stems)


def bounds(figure):
    lines = [line for axis in figure.axes for line in axis.lines if line.get_linestyle() == ":"]
    return [float(line.get_xdata()[0]) for line in lines]


def test_effects_are_drawn_by_unit_and_verdict():
    figure = draw_effects({"a": ENTRY, "b": ENTRY | {"unit": "nats"}, "c": ENTRY | {"verdict": "undecided"}})
    labels = [[tick.get_text() for tick in axis.get_yticklabels()] for axis in figure.axes]
    assert labels == [["a", "c"], ["b"]]
    assert bounds(figure) == []
    ends = {
        "a": ENTRY | {"claim_low": -0.05, "claim_high": 0.05},
        "b": ENTRY | {"claim_low": None, "claim_high": 0.98},
    }
    assert bounds(draw_effects(ends)) == [-0.05, 0.05, 0.98]
    assert draw_effects({"d": NOTHING}) is None


def test_scores_are_drawn_of_competitors_and_headlines(whole):
    rows = pd.read_parquet(whole[1] / "data/report/results.parquet")
    floor = rows.head(1).assign(candidate="floor/uniform", value=99.0)
    figure = study_page.draw_scores(pd.concat([rows, floor], ignore_index=True))
    drawn = {y for axis in figure.axes for line in axis.get_lines() for y in line.get_ydata()}
    assert 99.0 not in drawn and len(figure.axes) == len(headline_measures(rows))
    assert study_page.draw_scores(floor) is None


def test_scores_are_drawn_across_budgets_a_line_a_candidate():
    parts = [
        of_items({"base/m": RIGHT, "prune/p": WRONG}, readout="generation", metric="pass@1", budget=budget)
        for budget in (8, 64)
    ]
    other = of_items({"base/m": RIGHT, "prune/p": WRONG})
    rows = together(
        *parts, Results(*(frame.assign(suite="t") for frame in (other.scores, other.samples)))
    ).scores
    rows = rows.assign(prune_method=rows["candidate"].map({"prune/p": "wanda"}))
    figure = study_page.draw_scores(rows, "budget", ["prune_method"])
    (axis,) = figure.axes  # the suite that does not think has no panel
    lines = [line for line in axis.lines if len(line.get_xdata()) == 2 and line.get_marker() == "o"]
    assert [list(line.get_xdata()) for line in lines] == [[8, 64], [8, 64]]
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == ["dense", "wanda", "floor"]
