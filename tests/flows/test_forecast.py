"""The forecast of a run: what is stale by DVC, and the minutes of stages of the same kind."""

import json

import pytest
import yaml

from flows import forecast, graph
from flows.graph import Stage
from stages.core.files import RUNS, write_json
from tests import finished as sweep
from tests import project


def ran(name: str, seconds: float, state: str = "done") -> None:
    """Write the record of a stage's last run."""
    write_json(RUNS / f"{name}.json", {"state": state, "cpu_seconds": seconds})


@pytest.fixture
def rows(workspace, inputs, monkeypatch):
    """Return a function that forecasts a run in which some stages are stale."""
    values = project.params(inputs)
    values["prune"]["wanda-30"] = {**values["prune"]["wanda-50"], "sparsity": 0.3}
    values["prune"]["wanda-20"] = {**values["prune"]["wanda-50"], "sparsity": 0.2}
    values["evaluate"]["candidates"] = ["base/tiny", "prune/wanda-30"]
    (workspace / "params.yaml").write_text(yaml.safe_dump(values, sort_keys=False))

    def stage(name: str, result: str, *upstream: str) -> Stage:
        return Stage(name, "", upstream, (f"data/provenance/{result}.json",))

    stages = {
        each.name: each
        for each in (
            stage("model@tiny", "download/base/tiny"),
            stage("prune@wanda-50", "prune/wanda-50", "model@tiny"),
            stage("prune@wanda-30", "prune/wanda-30", "model@tiny"),
            stage("prune@wanda-20", "prune/wanda-20", "model@tiny"),
            stage("prune@magnitude-50", "prune/magnitude-50", "model@tiny"),
            stage("graded@base/tiny-arithmetic", "evaluate/base/tiny/arithmetic", "model@tiny"),
            stage("graded@prune/wanda-30-arithmetic", "evaluate/prune/wanda-30/arithmetic", "prune@wanda-30"),
        )
    }

    def forecast_of(*stale: str, lock: dict | None = None) -> dict[str, forecast.StageKind]:
        recipes = {f"prune@{name}": {f"prune.{name}": values["prune"][name]} for name in values["prune"]}
        entries = {name: {"params": {"params.yaml": recipes.get(name, {})}} for name in stages}
        monkeypatch.setattr(forecast, "locked_stages", lambda: entries | (lock or {}))
        monkeypatch.setattr(
            graph, "consult", lambda _: (stages, {name: [f"{name} is modified"] for name in stale})
        )
        return {row.kind: row for row in forecast.forecast()}

    return forecast_of


def test_a_stage_takes_what_it_took_or_what_its_kind_takes(rows):
    ran("prune/wanda-50", 60)
    ran("prune/wanda-20", 600, state="failed")
    ran("evaluate/base/tiny/arithmetic", 30)
    seen = rows("prune@wanda-30", "prune@wanda-50", "prune@magnitude-50")
    assert seen["prune wanda, tiny"][1:5] == (3, 2, 1, 2.0)
    assert seen["prune magnitude, tiny"][1:5] == (1, 1, 0, None), "nothing is guessed from another method"
    assert seen["evaluate arithmetic, tiny"][1:5] == (2, 1, 0, 0.5), "what depends on a stale stage runs too"
    assert seen["prune magnitude, tiny"].why == "prune@magnitude-50 is modified"
    assert seen["evaluate arithmetic, tiny"].why == "a stage above it runs"
    assert seen["model"].why == ""
    assert seen["model"][1:5] == (1, 0, 0, 0.0)


@pytest.mark.parametrize(
    ("stage", "settings"),
    [
        ("prune@wanda-50", {"prune.wanda-50": {"method": "wanda", "sparsity": 0.9}}),
        ("model@tiny", {"models.tiny": {"source": "path:another"}}),
    ],
)
def test_runs_with_other_settings_do_not_count(rows, stage, settings):
    ran("prune/wanda-50", 60)
    lock = {stage: {"params": {"params.yaml": settings}}}
    assert rows("prune@wanda-50", lock=lock)["prune wanda, tiny"][1:5] == (3, 1, 0, None)


def test_the_table_says_what_it_does_not_know(rows):
    ran("prune/wanda-50", 60)
    table = forecast.forecast_table(list(rows("prune@wanda-30", "prune@magnitude-50").values()))
    cells = list(zip(*(column.cells for column in table.columns), strict=True))
    assert ("prune magnitude, tiny", "1", "0", "none ran here", "prune@magnitude-50 is modified") in cells
    assert cells[-1] == ("all", "3 of 7", "0", "1.0 and more", "")
    assert not any(cell[0] == "model" for cell in cells)


@pytest.mark.drill
def test_a_finished_project_has_nothing_to_run(copy):
    rows = json.loads(sweep.prunequant(copy, "plan", "--json"))
    assert sum(row["would_run"] for row in rows) == 0
    assert sum(row["stages"] for row in rows) == len(sweep.STAGES)
    sweep.edit(copy, "prune.wanda-50.sparsity", 0.4)
    would = {
        row["kind"]: row for row in json.loads(sweep.prunequant(copy, "plan", "--json")) if row["would_run"]
    }
    assert would["prune wanda, tiny"]["measured"] == 0, "its run had another sparsity"
    assert would["prune wanda, tiny"]["minutes"] is None
    assert would["evaluate news, tiny"]["minutes"] > 0, "others were scored on the same suite"
    assert "prune magnitude, tiny" not in would
