"""Data of stock tasks: files, columns and splits that a task cannot use are refused."""

from pathlib import Path

import pandas as pd
import pytest

from stages.core.errors import Refusal
from tests.scoring import scored
from tests.stock import ROWS, mirrored

QUESTIONS = [{"question": f"{i} and 1?", "answer": f"#### {i + 1}"} for i in range(3)]
CHOICES = {"id": "1", "question": "Which?", "choices": {"text": ["a", "b"], "label": ["A", "B"]}}


@pytest.mark.parametrize(
    ("task", "shots", "splits", "message"),
    [
        ("gsm8k", 0, {"test": [{"question": "a"}]}, r"gsm8k cannot .* columns are question: .*'answer'"),
        ("gsm8k", 0, {"test": [{"answer": "#### 2"}]}, r"gsm8k cannot .* columns are answer: .*'question'"),
        (
            "gsm8k", 1, {"test": QUESTIONS, "train": [{"question": "a"}] * 3},
            r"gsm8k cannot .* columns are question, answer: .*'answer'",
        ),
        (
            "gsm8k", 5, {"test": QUESTIONS, "train": QUESTIONS},
            r"train\.parquet has 3 examples .* takes 5; .* fewer",
        ),
        (
            "arc_easy", 0, {"test": [CHOICES | {"answerKey": "A"}, CHOICES | {"answerKey": "E"}]},
            r"arc_easy cannot .* 'E' is not in list",
        ),
        ("hellaswag", 0, {"validation": [{"ctx": "A man"}]}, r"hellaswag cannot .* columns are ctx: "),
    ],
)  # fmt: skip
def test_data_that_a_task_cannot_use_is_refused(task, shots, splits, message, workspace, few_stock_tasks):
    options = {"shots": shots} | ({} if task in ("arc_easy", "hellaswag") else {"max_gen_toks": 8})
    chosen = mirrored(task, options, configs={ROWS[task][0]: splits})
    with pytest.raises(Refusal, match=message):
        scored(chosen, "base/tiny", task.replace("_", "-"))


def test_examples_of_the_scored_split_are_never_the_item_itself(workspace, few_stock_tasks):
    chosen = mirrored("aime24", {"shots": 3, "max_gen_toks": 8})
    with pytest.raises(Refusal, match=r"train\.parquet has 2 examples for an item of aime24, which takes 3"):
        scored(chosen, "base/tiny", "aime24")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (
            lambda file: file.write_bytes(b"PAR1nonsense"),
            r"test\.parquet cannot be read as parquet: .* again",
        ),
        (lambda file: pd.read_parquet(file)[:0].to_parquet(file), r"test\.parquet has no item for gsm8k"),
    ],
)
def test_a_file_without_items_is_refused(damage, message, workspace, few_stock_tasks):
    chosen = mirrored("gsm8k", {"shots": 0})
    damage(Path("data/datasets/gsm8k/test.parquet"))
    with pytest.raises(Refusal, match=message):
        scored(chosen, "base/tiny", "gsm8k")
