"""docs/tutorials/my-task.md, done as it is written, on a tiny model."""

from pathlib import Path

import pandas as pd
import pytest

from tests import pipeline
from tests.tutorials import lesson


@pytest.mark.drill
def test_my_task_from_a_yaml_to_scores(values):
    Path("my_tasks").mkdir()
    (items,) = lesson.blocks("my-task", "json")
    Path("my_tasks/test.jsonl").write_text(items)
    (task,) = lesson.blocks("my-task", file="my_tasks/qa.yaml")
    Path("my_tasks/qa.yaml").write_text(task)
    for block in lesson.blocks("my-task"):
        lesson.add(values, block)
    params = lesson.checked(values)
    for name in ("base/tiny", "datasets/qa"):
        pipeline.download(params, name)
    pipeline.evaluate(params, "base/tiny/qa")
    scores = pd.read_parquet("data/results/base/tiny/qa/scores.parquet")
    assert scores[["task", "metric", "num_items"]].to_dict("records") == [
        {"task": "qa", "metric": "acc", "num_items": len(items.splitlines())}
    ]
