"""Graded arithmetic: right answers, honest difficulties, near misses, and splits that share nothing."""

import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from stages.core.errors import Refusal
from stages.job.load import load
from stages.sources.graded import arithmetic
from stages.sources.graded.arithmetic import Arithmetic, Level, carries, item
from tests import project

LEVELS = [
    {"name": "add-1", "operator": "+", "digits": 1, "carries": False},
    {"name": "add-1-carry", "operator": "+", "digits": 1, "carries": True},
    {"name": "take-2", "operator": "-", "digits": 2, "carries": False},
    {"name": "take-2-borrow", "operator": "-", "digits": 2, "carries": True},
    {"name": "add-three-terms", "operator": "+", "digits": 2, "terms": 3, "carries": True},
]


def write(folder, seed: int = 0) -> dict[str, pd.DataFrame]:
    dataset = Arithmetic(
        kind="arithmetic",
        levels=tuple(Level(**level) for level in LEVELS),
        test=5,
        train=3,
        fewshot=2,
        seed=seed,
    )
    dataset.write(folder)
    return {name: pd.read_parquet(folder / f"{name}.parquet") for name in ("fewshot", "train", "test")}


def slow_carry(left: int, right: int, operator: str) -> bool:
    """Column sums that reach ten, or a borrow: the digit sums do not add up."""
    digits = lambda n: sum(map(int, str(n)))  # noqa: E731
    if operator == "+":
        return digits(left) + digits(right) != digits(left + right)
    return digits(left) - digits(right) != digits(left - right)


@given(st.integers(0, 9999), st.integers(0, 9999))
def test_carries_of_two_terms(left, right):
    assert carries([left, right], "+") == slow_carry(left, right, "+")
    high, low = max(left, right), min(left, right)
    assert carries([high, low], "-") == slow_carry(high, low, "-")


@given(st.integers(0, 10**6))
def test_choices_are_four_and_distinct_and_hold_the_answer(answer):
    made = item("x", f"{answer} + 0", answer)
    assert len(set(made["choices"])) == len(made["choices"]) == 4
    assert made["choices"][made["gold"]] == made["answer"] == str(answer)
    assert all(int(choice) >= 0 for choice in made["choices"])


def test_answers_levels_and_splits(tmp_path):
    frames = write(tmp_path)
    assert {name: len(frame) for name, frame in frames.items()} == {"fewshot": 10, "train": 15, "test": 25}
    everything = pd.concat(frames.values())
    assert everything["question"].map(lambda question: " ".join(sorted(question.split()))).is_unique
    levels = {level["name"]: level for level in LEVELS}
    for row in everything.itertuples():
        words = row.question.removesuffix(" =").split()
        terms, operators = [int(word) for word in words[::2]], set(words[1::2])
        level = levels[row.difficulty]
        assert operators == {level["operator"]}
        assert len(terms) == level.get("terms", 2)
        assert all(len(str(term)) == level["digits"] for term in terms)
        answer = sum(terms) if level["operator"] == "+" else terms[0] - sum(terms[1:])
        assert int(row.answer) == answer >= 0
        if len(terms) == 2:
            assert slow_carry(*terms, level["operator"]) == level["carries"]
        assert row.choices[row.gold] == row.answer
    for frame in frames.values():
        assert frame["difficulty"].drop_duplicates().tolist() == list(levels)
    assert frames["test"]["gold"].nunique() > 1


def test_the_same_seed_gives_the_same_bytes_and_another_other_items(tmp_path):
    for name in ("one", "two", "other"):
        (tmp_path / name).mkdir()
        write(tmp_path / name, seed=int(name == "other"))
    for split in ("fewshot", "train", "test"):
        read = [(tmp_path / name / f"{split}.parquet").read_bytes() for name in ("one", "two", "other")]
        assert read[0] == read[1] != read[2]


def test_more_items_than_a_level_has_is_refused(monkeypatch):
    monkeypatch.setattr(arithmetic, "TRIES", 3000)
    level = Level(name="add", operator="+", digits=1, carries=False)
    dataset = Arithmetic(kind="arithmetic", levels=(level,), test=30, fewshot=0, seed=0)
    assert len(dataset.items(level, 30, 0)) == 30  # pairs of digits with a sum below ten, in either order
    with pytest.raises(Refusal, match="level add has 30 distinct items, 31 were asked for; ask for fewer"):
        dataset.items(level, 31, 0)


def test_what_is_taken_away_in_another_order_is_one_item():
    level = Level(name="less", operator="-", digits=1, terms=3, carries=False)
    made = Arithmetic(kind="arithmetic", levels=(level,), test=95, fewshot=0, seed=0).items(level, 95, 0)
    terms = [row["question"].split()[:5:2] for row in made]
    assert len({(first, *sorted(rest)) for first, *rest in terms}) == 95


def test_the_projects_own_levels_have_their_items(tmp_path):
    dataset = load(project.ROOT / "params.yaml").datasets["arithmetic"]
    facts = dataset.write(tmp_path)
    assert facts["items"]["test"] == dataset.test * len(dataset.levels)
