"""The figures: drawn from finite numbers and headlines only, the same rows to the same bytes."""

import json
import math
from dataclasses import replace

import pandas as pd
import pytest

from stages.reporting.collect import Results
from stages.reporting.comparison import Comparison
from stages.reporting.figures import COLOURS, draw_difficulty, draw_quality, save_figure
from tests import project, results
from tests.claims import leveled
from tests.results import compared, of_items


@pytest.fixture(scope="module")
def comparison(whole) -> Comparison:
    wanted, folder = whole
    return compared(results.read(wanted, folder / "data/results"))


def test_dvc_plots_has_the_figures_families_and_colours():
    plot = json.loads((project.ROOT / "stages/reporting/plot.json").read_text())
    scale = plot["spec"]["layer"][0]["encoding"]["color"]["scale"]
    assert dict(zip(scale["domain"], scale["range"], strict=True)) == COLOURS


def test_figures_are_those_of_the_report(whole, comparison, tmp_path):
    for name, draw in (("quality", draw_quality), ("difficulty", draw_difficulty)):
        text = save_figure(draw(comparison), tmp_path / name)
        for suffix in ("svg", "png"):
            written = (whole[1] / f"data/report/{name}.{suffix}").read_bytes()
            assert (tmp_path / f"{name}.{suffix}").read_bytes() == written
        assert text == (tmp_path / f"{name}.svg").read_text()


def test_difficulty_is_drawn_of_headlines_by_likelihood_and_generation(comparison, tmp_path):
    rows = comparison.rows
    generated = rows[rows["readout"] == "generation"]
    others = [
        generated.assign(metric="tokens", value=100.0),
        generated.assign(readout="states", suite="elsewhere"),
    ]
    more = replace(comparison, rows=pd.concat([rows, *others], ignore_index=True))
    first, second = (
        save_figure(draw_difficulty(each), tmp_path / name)
        for each, name in ((comparison, "plain"), (more, "more"))
    )
    assert first == second


def test_nothing_to_draw_is_no_figure():
    comparison = compared(of_items({"base/m": [1.0, 0.0]}))
    assert draw_quality(comparison) is draw_difficulty(comparison) is None
    infinite = compared(of_items({"base/m": [math.inf, 2.0]}, metric="perplexity"))
    assert draw_quality(infinite) is None


def test_each_level_has_its_own_floor():
    answers = {"base/m": [1.0, 1.0, 0.0, 1.0], "prune/p": [1.0, 0.0, 0.0, 1.0]}
    table = leveled({"easy": answers, "hard": answers})
    floors = table.scores["difficulty"].map({"all": 0.2, "easy": 0.3, "hard": 0.1})
    figure = draw_difficulty(compared(Results(table.scores.assign(floor=floors), table.samples)))
    dotted = [line for axis in figure.axes for line in axis.get_lines() if line.get_linestyle() == ":"]
    drawn = [line.get_xydata().tolist() for line in dotted if len(line.get_xdata())]
    assert drawn == [[[0.3, 0], [0.1, 1]]] * 2  # a level is a place on the y axis
