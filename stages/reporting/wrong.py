"""How generated answers are wrong: a model that missed a digit and one that babbles score the same.

Each wrong answer is of the first class that fits:

- no answer: it has no number, where one is expected, or no word.
- off by a digit: its number has as many digits as the expected one, and all but one agree.
- repeats: it says up to four words three times in a row.
- cut: it was still going on at its longest length.
- other.

Answers are counted for each metric that is 0 or 1. In an answer after thinking, the thinking does not count.
"""

import re
from typing import Any

import pandas as pd

from stages.corpus.written_numbers import first_number
from stages.reporting.collect import records

CLASSES = ("no answer", "off by a digit", "repeats", "cut", "other")
_VERSION = 2
"""Raised when an answer's class may change; only the report depends on it."""
_REPEATED = re.compile(r"(?<!\S)(\S+(?:\s+\S+){0,3})(?:\s+\1){2,}(?!\S)")
_GROUPS = ["candidate", "suite", "task", "metric", "filter", "budget"]
_ANSWER = [*_GROUPS, "draw", "doc_id", "prompt_hash"]


def wrong_answers(samples: pd.DataFrame) -> pd.DataFrame:
    """Count the wrong answers of every candidate, suite, task, metric, filter and budget by class.

    Returns:
        Columns `candidate`, `suite`, `task`, `metric`, `filter`, `budget`, `answers`, `wrong`, those of
        `CLASSES`, `version`.
    """
    answered = samples[samples["readout"].eq("generation") & samples["response"].notna()]
    answers = answered.drop_duplicates(_ANSWER)
    rows: list[dict[str, Any]] = []
    for key, group in answers.groupby(_GROUPS, dropna=False, sort=False):
        if set(group["score"]) <= {0.0, 1.0}:
            wrong = [class_of(row) for row in records(group[group["score"] == 0])]
            counts = {name: wrong.count(name) for name in CLASSES}
            totals = {"answers": len(group), "wrong": len(wrong)}
            rows.append(dict(zip(_GROUPS, key, strict=True)) | totals | counts | {"version": _VERSION})
    columns = [*_GROUPS, "answers", "wrong", *CLASSES, "version"]
    return pd.DataFrame(rows, columns=columns).astype({"budget": "Int64"})


def class_of(answer: dict[str, Any]) -> str:
    """Return the class of a wrong answer, a row of samples."""
    response, target = answer["response"], answer["target"] or ""
    number, expected = first_number(response), first_number(target)
    if (expected is not None and number is None) or not re.search(r"\S", response):
        return "no answer"
    if number is not None and expected is not None and _differ_once(str(number), str(expected)):
        return "off by a digit"
    if _REPEATED.search(response):
        return "repeats"
    return "cut" if answer["cut"] else "other"


def _differ_once(text: str, other: str) -> bool:
    if len(text) != len(other) or not (text + other).replace("-", "").isdigit():
        return False
    differing = [pair for pair in zip(text, other, strict=True) if pair[0] != pair[1]]
    return len(differing) == 1 and "-" not in differing[0]
