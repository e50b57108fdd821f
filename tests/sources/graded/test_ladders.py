"""Ladders of presentation: levels that ask the same items with more options, more context or more shots."""

import re

import pandas as pd
import pytest
from pydantic import ValidationError

from stages.corpus.readings import is_right
from stages.job.load import load
from stages.sources.graded.classification import Classification
from tests import project
from tests.graded import CASES, KINDS, case, write

SENTENCE = re.compile(r"The [a-z]+ [a-z]+ [a-z]+ [a-z]+[.] ")


def ladder(kind: str, *steps: dict, fewshot: int = 2, seed: int = 0):
    """Return data whose levels are the first tested level of a kind with these settings on top."""
    first = case(kind).levels[0]
    levels = tuple({"name": f"step-{n}", **first, **step} for n, step in enumerate(steps))
    settings = {"kind": kind, "levels": levels, "test": 6, "train": 3, "fewshot": fewshot, "seed": seed}
    return KINDS[kind].model_validate(settings)


def by_level(rows: pd.DataFrame, column: str) -> list[list]:
    return [list(level[column]) for _, level in rows.groupby("difficulty", sort=True)]


@pytest.mark.parametrize("kind", CASES)
def test_context_and_shots_change_the_question_and_nothing_else(kind, tmp_path):
    steps = ({}, {"context": 3}, {"context": 20}, {"shots": 2}, {"context": 1, "shots": 1})
    graded = ladder(kind, *steps)
    splits = write(graded, tmp_path)
    for split in ("test", "train"):
        for column in ("answer", "gold"):
            first, *others = by_level(splits[split], column)
            assert all(other == first for other in others)
        plain, *shown = by_level(splits[split], "question")
        for step, questions in zip(steps[1:], shown, strict=True):
            for question, alone in zip(questions, plain, strict=True):
                *lines, last = question.split("\n")
                assert len(lines) == step.get("shots", 0)
                assert len(SENTENCE.findall(last)) == step.get("context", 0)
                assert SENTENCE.sub("", last) == alone
    # The examples are those of the level, with its context; no example is a test or training item.
    for step, examples, questions in zip(
        steps, by_level(splits["fewshot"], "question"), by_level(splits["test"], "question"), strict=True
    ):
        assert all(len(SENTENCE.findall(example)) == step.get("context", 0) for example in examples)
        for line, example in zip(questions[0].split("\n")[:-1], examples, strict=False):
            assert line.startswith(example)
    keys = [
        case(kind).solve(SENTENCE.sub("", question.split("\n")[-1])).key
        for split in splits.values()
        for question in split[split["difficulty"] == "step-4"]["question"]
    ]
    assert len(set(keys)) == len(keys) == 11


def test_options_change_the_choices_and_nothing_else(tmp_path):
    graded = ladder("classification", *({"chains": 8, "options": count} for count in (2, 4, 8)))
    splits = write(graded, tmp_path)
    for split in splits.values():
        first, *others = by_level(split, "question")
        assert all(other == first for other in others)
    for count, (_, level) in zip((2, 4, 8), splits["test"].groupby("difficulty"), strict=True):
        for item in level.to_dict("records"):
            assert len(set(item["choices"])) == len(item["choices"]) == count
            assert [is_right("word", choice, item) for choice in item["choices"]].index(True) == item["gold"]
    assert len({tuple(gold) for gold in by_level(splits["test"], "gold")}) > 1


def test_a_level_without_presentation_draws_what_it_drew(tmp_path):
    """A ladder beside it does not change a level's items."""
    (tmp_path / "alone").mkdir()
    (tmp_path / "beside").mkdir()
    alone = write(ladder("arithmetic", {}), tmp_path / "alone")
    beside = write(ladder("arithmetic", {}, {"context": 2}), tmp_path / "beside")
    for split, rows in alone.items():
        same = beside[split][beside[split]["difficulty"] == "step-0"].reset_index(drop=True)
        pd.testing.assert_frame_equal(rows, same)


def test_more_than_there_is_is_refused():
    with pytest.raises(
        ValidationError, match="level step-0 shows 3 shots, but a level has fewshot 2 examples"
    ):
        ladder("brackets", {"shots": 3})
    with pytest.raises(ValidationError, match="8 options cannot be labels of 4 chains; lower options"):
        ladder("classification", {"chains": 4, "options": 8})


def test_the_sweep_climbs_one_setting_a_ladder(tmp_path):
    chosen = load(project.ROOT / "sweeps" / "ladders.yaml")
    climbed = {}
    for name, data in chosen.datasets.items():
        assert name in chosen.suites.graded
        assert len({level.asked() for level in data.levels}) == 1, name
        plain = [level.model_dump(exclude={"name"}) for level in data.levels]
        climbed[name] = [key for key in plain[0] if len({str(level[key]) for level in plain}) > 1]
        (tmp_path / name).mkdir()
        assert data.write(tmp_path / name)["items"]["test"] == data.test * len(data.levels)
    assert climbed == {"options": ["options"], "context": ["context"], "shots": ["shots"]}
    assert isinstance(chosen.datasets["options"], Classification)
