"""A user's own task: its YAML, its data in every format, and what is no task."""

import json
from pathlib import Path

import pandas as pd
import pytest

from stages.core.consent import ALLOW
from stages.core.errors import Refusal
from stages.core.files import sha256
from stages.sources.task import OwnTask, read_task
from tests.owntask import ROWS, write_task


def task(folder: Path, yaml: str = "qa.yaml") -> OwnTask:
    return OwnTask(kind="task", source=f"path:{folder}", yaml=yaml, sha256=sha256(folder))


@pytest.mark.parametrize("kind", ["json", "jsonl", "csv", "parquet"])
def test_the_data_of_every_format_is_the_same(kind, tmp_path):
    write_task(tmp_path / "mine", kind)
    (tmp_path / "written").mkdir()
    facts = task(tmp_path / "mine").write(tmp_path / "written")
    assert facts == {"task": "qa", "splits": ["test"]}
    rows = pd.read_parquet(tmp_path / "written" / "test.parquet")
    assert rows[["question", "answer"]].to_dict("records") == [
        {"question": row["question"], "answer": row["answer"]} for row in ROWS
    ]
    assert (tmp_path / "written" / "task" / "qa.yaml").read_text() == (tmp_path / "mine/qa.yaml").read_text()


def test_included_fields_and_several_files_a_split_are_read(tmp_path):
    mine = write_task(tmp_path / "mine")
    (mine / "more.jsonl").write_text((mine / "test.jsonl").read_text())
    config = (mine / "qa.yaml").read_text().replace("task: qa\n", "")
    (mine / "base.yaml").write_text(config.replace("test: test.jsonl", "test: [test.jsonl, more.jsonl]"))
    (mine / "qa.yaml").write_text("task: qa\ninclude: base.yaml\n")
    (tmp_path / "written").mkdir()
    task(mine).write(tmp_path / "written")
    assert len(pd.read_parquet(tmp_path / "written" / "test.parquet")) == 2 * len(ROWS)


@pytest.mark.parametrize(
    ("old", "new", "sentence"),
    [
        ("task: qa\n", "", r"qa.yaml defines no single task; write `task: <name>`"),
        ("task: qa\n", "task: qa\ngroup: all\n", "defines no single task"),
        ("task: qa\n", "task: qa\nclass: mine.Task\n", "names a Python class"),
        ("task: qa\n", "task: [qa\n", "is not YAML"),
        ("task: qa\n", "task: qa\ninclude: qa.yaml\n", "is included by itself"),
        ("task: qa\n", "task: qa\ninclude: ../qa.yaml\n", "is missing|lies outside"),
        ("dataset_path: json", "dataset_path: org/qa", r"has dataset_path 'org/qa'; set it to json, csv or"),
        ("test.jsonl", "lost.jsonl", r"names lost.jsonl, which is no file of its folder"),
        ("test.jsonl", "../qa.jsonl", r"names ../qa.jsonl, which is no file of its folder"),
    ],
)
def test_what_is_no_task_is_refused(old, new, sentence, tmp_path):
    mine = write_task(tmp_path / "mine")
    (tmp_path / "qa.jsonl").write_text("{}")
    (mine / "qa.yaml").write_text((mine / "qa.yaml").read_text().replace(old, new))
    with pytest.raises(Refusal, match=sentence):
        task(mine).write(tmp_path)


@pytest.mark.parametrize(
    ("content", "sentence"),
    [("{", "test.jsonl, as json, cannot be loaded"), ("", "test.jsonl(, as json, cannot| has no)")],
)
def test_damaged_data_is_refused(content, sentence, tmp_path):
    mine = write_task(tmp_path / "mine")
    (mine / "test.jsonl").write_text(content)
    with pytest.raises(Refusal, match=sentence):
        task(mine).write(tmp_path)


def test_a_folder_in_place_of_the_yaml_is_refused(tmp_path):
    (write_task(tmp_path / "mine") / "inner").mkdir()
    with pytest.raises(Refusal, match="inner is a folder; name the task's YAML file"):
        task(tmp_path / "mine", "inner").write(tmp_path)


def test_code_is_refused_unless_the_environment_allows_it(tmp_path, monkeypatch):
    mine = write_task(tmp_path / "mine")
    config = (mine / "qa.yaml").read_text() + "process_results: !function mine.score\n"
    (mine / "qa.yaml").write_text(config)
    monkeypatch.delenv(ALLOW, raising=False)
    with pytest.raises(Refusal, match=f"runs the code of mine.score; if you trust it, set {ALLOW}=1"):
        task(mine).write(tmp_path)
    monkeypatch.setenv(ALLOW, "1")
    assert read_task(mine, "qa.yaml")["process_results"].name == "mine.score"


def test_equal_tasks_give_equal_bytes(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    mine = task(write_task(tmp_path / "mine"))
    mine.download("qa")
    written = tmp_path / "data/datasets/qa"
    before = {file.name: file.read_bytes() for file in written.rglob("*") if file.is_file()}
    mine.download("qa")
    assert {file.name: file.read_bytes() for file in written.rglob("*") if file.is_file()} == before
    assert json.loads((written / "dataset.json").read_text())["yaml"] == "qa.yaml"
