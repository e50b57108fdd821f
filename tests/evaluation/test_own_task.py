"""A user's own task is scored as its YAML says, from the files beside it."""

import json
from pathlib import Path

import pytest

from stages.core.consent import ALLOW
from stages.core.errors import Refusal
from stages.core.files import sha256
from stages.job.params import Params
from tests.owntask import ROWS, write_task
from tests.pipeline import do, download, params
from tests.scoring import changed, scored


def own(**options) -> Params:
    """Download the task in the folder `mine` and return params with its suite."""
    chosen = params("llama", {})
    datasets = json.loads(chosen.model_dump_json())["datasets"]
    task = {"kind": "task", "source": "path:mine", "yaml": "qa.yaml", "sha256": sha256(Path("mine"))}
    suite = {"task": "path:mine/qa.yaml", "batch_size": 2, **options}
    project = changed(
        chosen,
        datasets={**datasets, "qa": task},
        suites={"perplexity": {}, "graded": {}, "benchmark": {"qa": suite}},
    )
    do(project)
    download(project, "datasets/qa")
    return project


def test_its_metric_its_items_and_its_name_are_in_the_tables(workspace):
    write_task(Path("mine"))
    scores, samples = scored(own(), "base/tiny", "qa")
    assert scores[["task", "metric", "num_items", "shots"]].to_dict("records") == [
        {"task": "qa", "metric": "exact_match", "num_items": len(ROWS), "shots": 0}
    ]
    assert scores.task_version.tolist() == ["1"]
    assert scores.dataset_source.tolist() == ["path:mine"]
    assert samples.target.tolist() == [row["answer"] for row in ROWS]


def test_its_code_scores_where_the_environment_allows_it(workspace, monkeypatch):
    mine = write_task(Path("mine"))
    (mine / "qa.yaml").write_text(
        (mine / "qa.yaml").read_text().replace("metric: exact_match", "metric: half")
        + "process_results: !function mine.score\n"
    )
    (mine / "mine.py").write_text("def score(doc, results):\n    return {'half': 0.5}\n")
    monkeypatch.setenv(ALLOW, "1")
    project = own()
    scores, _ = scored(project, "base/tiny", "qa")
    assert scores[["metric", "value"]].to_dict("records") == [{"metric": "half", "value": 0.5}]
    monkeypatch.delenv(ALLOW)
    with pytest.raises(Refusal, match=r"runs the code of mine\.score"):
        scored(project, "base/tiny", "qa")


def test_code_that_cannot_be_imported_is_refused(workspace, monkeypatch):
    mine = write_task(Path("mine"))
    with (mine / "qa.yaml").open("a") as file:
        file.write("process_results: !function lost.score\n")
    monkeypatch.setenv(ALLOW, "1")
    with pytest.raises(Refusal, match=r"mine/qa.yaml names code that cannot be imported \(ImportError"):
        scored(own(), "base/tiny", "qa")


def test_programs_run_only_where_the_suite_allows_it(workspace):
    mine = write_task(Path("mine"))
    with (mine / "qa.yaml").open("a") as file:
        file.write("unsafe_code: true\n")
    with pytest.raises(Refusal, match="runs the programs that the model writes"):
        scored(own(), "base/tiny", "qa")
