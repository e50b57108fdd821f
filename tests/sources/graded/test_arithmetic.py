"""Arithmetic: right answers, carries as columns of digits have them, near misses, sums in any order alike."""

import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from stages.core.errors import Refusal
from stages.sources.graded import arithmetic
from stages.sources.graded.arithmetic import Arithmetic, ArithmeticLevel, arithmetic_item, has_carry
from tests.graded import write

LEVELS = [
    {"name": "add-1", "operator": "+", "digits": 1, "carries": False},
    {"name": "add-1-carry", "operator": "+", "digits": 1, "carries": True},
    {"name": "take-2", "operator": "-", "digits": 2, "carries": False},
    {"name": "take-2-borrow", "operator": "-", "digits": 2, "carries": True},
    {"name": "add-three-terms", "operator": "+", "digits": 2, "terms": 3, "carries": True},
]


def slow_carry(left: int, right: int, operator: str) -> bool:
    """Tell whether columns carry or borrow: then digit sums do not add up."""
    digits = lambda n: sum(map(int, str(n)))  # noqa: E731
    if operator == "+":
        return digits(left) + digits(right) != digits(left + right)
    return digits(left) - digits(right) != digits(left - right)


@given(st.integers(0, 9999), st.integers(0, 9999))
def test_carries_of_two_terms(left, right):
    assert has_carry([left, right], "+") == slow_carry(left, right, "+")
    high, low = max(left, right), min(left, right)
    assert has_carry([high, low], "-") == slow_carry(high, low, "-")


@given(st.integers(0, 10**6))
def test_four_distinct_choices_hold_the_answer(answer):
    item = arithmetic_item("x", f"{answer} + 0", answer)
    assert len(set(item["choices"])) == len(item["choices"]) == 4
    assert item["choices"][item["gold"]] == item["answer"] == str(answer)
    assert all(int(choice) >= 0 for choice in item["choices"])


def test_answers_levels_and_splits(tmp_path):
    levels = tuple(ArithmeticLevel(**level) for level in LEVELS)
    splits = write(Arithmetic(kind="arithmetic", levels=levels, test=5, train=3, fewshot=2, seed=0), tmp_path)
    assert {split: len(rows) for split, rows in splits.items()} == {"fewshot": 10, "train": 15, "test": 25}
    items = pd.concat(splits.values())
    assert items["question"].map(lambda question: " ".join(sorted(question.split()))).is_unique
    by_name = {level.name: level for level in levels}
    for item in items.itertuples():
        words = item.question.removesuffix(" =").split()
        terms, operators = [int(word) for word in words[::2]], set(words[1::2])
        level = by_name[item.difficulty]
        assert operators == {level.operator}
        assert len(terms) == level.terms
        assert all(len(str(term)) == level.digits for term in terms)
        answer = sum(terms) if level.operator == "+" else terms[0] - sum(terms[1:])
        assert int(item.answer) == answer >= 0
        if len(terms) == 2:
            assert slow_carry(*terms, level.operator) == level.carries
        assert item.choices[item.gold] == item.answer
        lines, total = item.steps.split(", "), terms[0]
        for line, term in zip(lines, terms[1:], strict=True):
            left, right = line.split(" = ")
            assert left.split() == [str(total), level.operator, str(term)]
            total = total + term if level.operator == "+" else total - term
            assert right == str(total)
        assert total == answer
    for rows in splits.values():
        assert rows["difficulty"].drop_duplicates().tolist() == list(by_name)


def test_more_items_than_a_level_has_are_refused(monkeypatch):
    monkeypatch.setattr(arithmetic, "MAX_DRAWS", 3000)
    level = ArithmeticLevel(name="add", operator="+", digits=1, carries=False)
    dataset = Arithmetic(kind="arithmetic", levels=(level,), test=30, fewshot=0, seed=0)
    assert len(dataset.items(level, 30, 0)) == 30  # pairs of digits with a sum below ten, in either order
    with pytest.raises(Refusal, match="level add has 30 distinct items, fewer than 31"):
        dataset.items(level, 31, 0)


def test_the_order_of_subtracted_terms_makes_no_other_item():
    level = ArithmeticLevel(name="less", operator="-", digits=1, terms=3, carries=False)
    dataset = Arithmetic(kind="arithmetic", levels=(level,), test=95, fewshot=0, seed=0)
    terms = [item["question"].split()[:5:2] for item in dataset.items(level, 95, 0)]
    assert len({(first, *sorted(rest)) for first, *rest in terms}) == 95
