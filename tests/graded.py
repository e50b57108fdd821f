"""Settings that every kind of graded data is tested with, and an independent solver of its questions."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
import pytest

from stages.corpus.readings import BRACKETS
from stages.job.params import methods
from stages.sources.graded.items import GRADED_SPLITS, GradedData


class Solution(NamedTuple):
    """The facts that a question alone gives away."""

    answer: str | None
    """The answer; None where many are right."""
    key: tuple[Any, ...]
    """The same for two questions that only differ in the order of things that have none."""
    settings: dict[str, Any]
    """The settings of its level, without those at their defaults."""


def arithmetic(question: str) -> Solution:
    left, operator, right, _ = question.split()
    sign = 1 if operator == "+" else -1
    value = int(left) + sign * int(right)
    # Without a carry, digit sums add up.
    carries = sum(map(int, str(value))) != sum(map(int, left)) + sign * sum(map(int, right))
    key = (operator, *(sorted((left, right)) if operator == "+" else (left, right)))
    return Solution(str(value), key, {"operator": operator, "digits": len(left), "carries": carries})


def brackets(question: str) -> Solution:
    shown = question.removeprefix("Close ").removesuffix(" with").split()
    text, closed = "".join(shown), 0
    while pair := re.search(r"\(\)|\[\]|\{\}|<>", text):
        text, closed = text[: pair.start()] + text[pair.end() :], closed + 1
    answer = " ".join(BRACKETS[bracket] for bracket in reversed(text))
    kinds = len({bracket for bracket in shown if bracket in BRACKETS})
    return Solution(answer, tuple(shown), {"depth": len(text), "closed": closed, "kinds": kinds})


def classification(question: str) -> Solution:
    facts, start = question.removesuffix(" is").split(", so ")
    rules = dict(rule.split(" is ") for rule in facts.split(", "))
    label, steps = start, 0
    while label in rules:
        label, steps = rules[label], steps + 1
    chains = len(set(rules) - set(rules.values()))
    assert len(rules) == chains * steps
    settings = {"chains": chains} | ({"rules": steps} if steps > 1 else {})
    return Solution(label, (*sorted(rules.items()), start), settings)


def instructions(question: str) -> Solution:
    constraints = question.removeprefix("Write ").removesuffix(":").split("; ")
    return Solution(None, tuple(sorted(constraints)), {"constraints": len(constraints)})


def letters(question: str) -> Solution:
    letter, text = re.fullmatch("How often is (.) in (.*)[?]", question).groups()
    words, count = text.split(), text.count(letter)
    key = (letter, *sorted(words))
    if len(words[0]) == 1:
        return Solution(str(count), key, {"others": len(words) - count})
    settings = {"length": len(words[0])} | ({"words": len(words)} if len(words) > 1 else {})
    return Solution(str(count), key, settings)


def sorting(question: str) -> Solution:
    words = question.removeprefix("Sort ").removesuffix(":").split(", ")
    shared = max(
        sum(word[:n] == other[:n] for n in range(1, 4))
        for word in words
        for other in words
        if word is not other
    )
    settings = {"words": len(words)} | ({"shared": shared} if shared else {})
    return Solution(", ".join(sorted(words)), tuple(sorted(words)), settings)


class Case(NamedTuple):
    """A line of the table."""

    levels: tuple[dict[str, Any], ...]
    solve: Callable[[str], Solution]


CASES = {
    "arithmetic": Case(
        (
            {"operator": "+", "digits": 2, "carries": True},
            {"operator": "-", "digits": 2, "carries": False},
        ),
        arithmetic,
    ),
    "brackets": Case(
        ({"depth": 1, "closed": 2, "kinds": 2}, {"depth": 3, "closed": 1, "kinds": 4}), brackets
    ),
    "classification": Case(({"chains": 4}, {"chains": 5, "rules": 2}), classification),
    "instructions": Case(({"constraints": 1}, {"constraints": 4}), instructions),
    "letters": Case(({"others": 1}, {"length": 8, "words": 2}), letters),
    "sorting": Case(({"words": 2}, {"words": 4, "shared": 1}), sorting),
}
"""By kind, its tested levels and its solver. A new kind needs a line here."""
KINDS = {kind: config for kind, config in methods("datasets").items() if issubclass(config, GradedData)}
"""Every kind of graded data that params.yaml can name."""


def case(kind: str) -> Case:
    """Return the line of the table; fail by name if there is none."""
    if kind not in CASES:
        pytest.fail(f"kind {kind} has no line in CASES of tests/graded.py")
    return CASES[kind]


def dataset(kind: str, seed: int = 0, test: int = 4, train: int = 3) -> GradedData:
    """Return data of one kind, its levels named `level-<number>`."""
    levels = tuple({"name": f"level-{number}", **level} for number, level in enumerate(case(kind).levels))
    return KINDS[kind].model_validate(
        {"kind": kind, "levels": levels, "test": test, "train": train, "fewshot": 2, "seed": seed}
    )


def write(graded: GradedData, folder: Path) -> dict[str, pd.DataFrame]:
    """Write the data into `folder` and return its splits."""
    graded.write(folder)
    return {split: pd.read_parquet(folder / f"{split}.parquet") for split in GRADED_SPLITS}
