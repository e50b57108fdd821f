"""docs/tutorials/my-text.md, done as it is written, on a tiny model and made-up notes."""

import json
from pathlib import Path

import pandas as pd
import pytest

from stages.job.checks.counts import of_windows
from tests import pipeline, project
from tests.tutorials import lesson


@pytest.mark.drill
def test_my_text_from_a_file_to_a_trained_model(values):
    Path("texts").mkdir()
    note, chats = lesson.blocks("my-text", "json")
    (field,) = [key for key, value in json.loads(note).items() if isinstance(value, str)]
    lines = [json.dumps({field: line, "id": 1}) for line in project.text(7).splitlines()]
    Path("texts/notes.jsonl").write_text("\n".join([note.strip(), *lines]))
    more = [json.dumps({"prompt": f"Is it {number}?", "response": "Yes."}) for number in range(10)]
    Path("texts/chats.jsonl").write_text("\n".join([chats.strip(), *more]))
    for block in lesson.blocks("my-text"):
        lesson.add(values, block)
    news = values["datasets"]["blend"]["parts"]["news"]
    news |= {key: values["datasets"]["news"][key] for key in ("source", "file", "sha256")}
    params = lesson.checked(values)
    counted = of_windows(params)[1]
    assert any(line.startswith("notes: ") for line in counted)
    assert any("of notes, " in line and "of news" in line for line in counted)
    for name in ("base/tiny", "datasets/notes", "datasets/blend", "datasets/chats"):
        pipeline.download(params, name)
    for recipe in ("wanda-50-notes", "wanda-50-blend"):
        pipeline.prune(params, recipe)
    pipeline.finetune(params, "wanda-50-chats")
    assert pd.read_csv("data/curves/wanda-50-chats.csv")["heldout_loss"].notna().any()
    for candidate in values["evaluate"]["candidates"]:
        pipeline.evaluate(params, f"{candidate}/notes")
        scores = pd.read_parquet(f"data/results/{candidate}/notes/scores.parquet")
        assert (scores.value > 0).all()
    read = scores["calibration"].tolist()
    assert all("notes" in text and "chats" in text for text in read)
