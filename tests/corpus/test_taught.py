"""Taught data sets: what is stored, for which vocabulary, and the data they were made of."""

import json

import pytest

from stages.core.errors import Refusal
from stages.core.files import DATASETS
from stages.corpus.taught import downloaded, read_lesson
from tests import families, lessons
from tests.lessons import make_lesson

pytestmark = pytest.mark.usefixtures("workspace")


def test_a_lesson_has_the_same_bytes_each_time():
    contents = []
    for _ in range(2):
        make_lesson(method="logits")
        contents.append({file.name: file.read_bytes() for file in (DATASETS / "lesson").iterdir()})
    assert contents[0] == contents[1]
    files = {"dataset.json", "held_out.parquet", "teacher.safetensors", "train.parquet"}
    assert set(contents[0]) == files


def test_tokens_of_another_vocabulary_are_refused():
    make_lesson()
    other = families.tokenizer()
    other.add_tokens(["word"])
    with pytest.raises(Refusal, match=r"lesson has tokens of base/tiny, whose .* set teach\.lesson\.source"):
        read_lesson("lesson", other)


def test_a_lesson_made_from_a_lesson_names_the_data_set_behind_both():
    chosen = lessons.params(**lessons.TWICE)
    lessons.make(chosen)
    facts = json.loads((DATASETS / "lesson/dataset.json").read_text())
    assert facts["source"] == "logits of base/tiny on sums (reasoning-gym)"
    assert downloaded(chosen.teach, "lesson") == "sums"
