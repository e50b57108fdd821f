"""Every row that any kind of suite makes fits the schema of the result tables."""

from functools import cache
from pathlib import Path
from typing import Any, get_type_hints

import pytest
from pydantic import TypeAdapter

from stages.core.tables import MEASURE, Sample, Score, sample_table
from stages.evaluation.shared import SharedPrefixLM
from stages.job.params import Params
from tests import families
from tests.pipeline import download, params
from tests.scoring import changed
from tests.stock import mirrored
from tests.thinking import RULES

THINKING = RULES | {"budgets": [0, 4], "draws": 2}


def perplexity() -> Params:
    news = {
        "windows": 3, "sequence_length": 32, "batch_size": 2,
        "emergence": {"windows": 64, "sequence_length": 4, "steps": 2, "width": 4},
    }  # fmt: skip
    return changed(params("llama", {}), suites={"perplexity": {"news": news}, "graded": {}, "benchmark": {}})


def graded(**options: Any) -> Params:
    suite = {"shots": 1, "batch_size": 3, "chat_template": True} | options
    return changed(
        params("llama", {}), suites={"perplexity": {}, "graded": {"arithmetic": suite}, "benchmark": {}}
    )


def benchmark(task: str, **options: Any) -> Params:
    chosen = mirrored(task, options)
    if task == "ifeval":
        Path("data/datasets/ifeval/nltk_data/tokenizers/punkt_tab").mkdir(parents=True)
    return chosen


CASES = {
    "perplexity and emergence": (perplexity, {}),
    "graded": (graded, {}),
    "graded, thinking": (graded, {"thinking": THINKING}),
    "choices": (benchmark, {"task": "arc_easy"}),
    "whole texts": (benchmark, {"task": "wikitext"}),
    "two filters, thinking": (
        benchmark,
        {"task": "gsm8k", "shots": 1, "max_gen_toks": 8, "thinking": THINKING},
    ),
    "several truths an item": (benchmark, {"task": "ifeval", "max_gen_toks": 8}),
}


@cache
def adapter(hint: Any) -> TypeAdapter:
    return TypeAdapter(hint)


def check_types(row: Score | Sample) -> None:
    """Every field has a value of its own type, and no other."""
    for field, hint in get_type_hints(type(row)).items():
        adapter(hint).validate_python(getattr(row, field), strict=True)


@pytest.mark.parametrize("case", CASES)
def test_every_row_fits_the_schema(case, workspace, few_stock_tasks):
    make, options = CASES[case]
    chosen = make(**options)
    ((name, suite),) = chosen.suites.by_name().items()
    if make is not benchmark:
        download(chosen, f"datasets/{name}")
    lm = SharedPrefixLM(
        pretrained=families.model("llama").float(),
        tokenizer=families.tokenizer(),
        batch_size=suite.batch_size,
    )
    scores, samples = suite.evaluate(lm, name, 0)
    assert scores and samples
    for row in (*scores, *samples):
        check_types(row)
    columns = [column for column in MEASURE if column != "suite"]
    keys = [(*(getattr(score, column) for column in columns), score.difficulty) for score in scores]
    assert len(keys) == len(set(keys))
    table = sample_table("base/tiny", name, samples)
    answers = table[table.draw.isna()]
    assert not answers.duplicated([*MEASURE, "doc_id"]).any()
    assert not table.duplicated([*MEASURE, "doc_id", "draw"]).any()
