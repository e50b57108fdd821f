"""Every kind of graded data set: right answers, honest levels, fair choices, splits that share nothing."""

import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from ruamel.yaml import YAML
from scipy.stats import chisquare

from stages.core.errors import Refusal
from stages.corpus import readings as answers
from stages.corpus.readings import BRACKETS, right, satisfies
from stages.evaluation.shared import SharedPrefixLM
from stages.job.load import load, validate
from stages.sources.graded.arithmetic import Arithmetic
from stages.sources.graded.brackets import Brackets
from stages.sources.graded.brackets import Level as Open
from stages.sources.graded.classification import Classification
from stages.sources.graded.instructions import SAID, Instructions
from stages.sources.graded.items import SPLITS, WORDS, Graded
from stages.sources.graded.letters import Letters
from stages.sources.graded.letters import Level as Counted
from stages.sources.graded.sorting import Sorting, shared
from tests import project
from tests.pipeline import download, evaluate, params

KINDS: dict[type[Graded], list[dict[str, Any]]] = {
    Arithmetic: [
        {"operator": "+", "digits": 2, "carries": True},
        {"operator": "-", "digits": 2, "carries": False},
    ],
    Brackets: [{"depth": 1, "closed": 2, "kinds": 2}, {"depth": 3, "closed": 1, "kinds": 4}],
    Classification: [{"chains": 4}, {"chains": 5, "rules": 2}],
    Instructions: [{"constraints": 1}, {"constraints": 4}],
    Letters: [{"others": 1}, {"length": 8, "words": 2}],
    Sorting: [{"words": 2}, {"words": 4, "shared": 1}],
}


def dataset(kind: type[Graded], seed: int = 0, test: int = 4, train: int = 3) -> Graded:
    named = [{"name": f"level-{number}", **level} for number, level in enumerate(KINDS[kind])]
    word = kind.__name__.lower()
    return kind.model_validate(
        {"kind": word, "levels": tuple(named), "test": test, "train": train, "fewshot": 2, "seed": seed}
    )


def written(made: Graded, folder: Path) -> dict[str, pd.DataFrame]:
    made.write(folder)
    return {split: pd.read_parquet(folder / f"{split}.parquet") for split in SPLITS}


def by_hand(kind: type[Graded], question: str) -> tuple[Any, Any, dict[str, Any]]:
    """An item's answer, what tells it from others, and its level's settings, from its question alone."""
    if kind is Arithmetic:
        left, operator, right, _ = question.split()
        value = int(left) + int(right) if operator == "+" else int(left) - int(right)
        carried = sum(map(int, str(value))) != sum(map(int, left)) + (1 if operator == "+" else -1) * sum(
            map(int, right)
        )
        key = (operator, *(sorted((left, right)) if operator == "+" else (left, right)))
        return str(value), key, {"operator": operator, "digits": len(left), "carries": carried}
    if kind is Brackets:
        shown = question.removeprefix("Close ").removesuffix(" with").split()
        text, closed = "".join(shown), 0
        while pair := re.search(r"\(\)|\[\]|\{\}|<>", text):
            text, closed = text[: pair.start()] + text[pair.end() :], closed + 1
        answer = " ".join(BRACKETS[one] for one in reversed(text))
        kinds = len({one for one in shown if one in BRACKETS})
        return answer, tuple(shown), {"depth": len(text), "closed": closed, "kinds": kinds}
    if kind is Classification:
        facts, asked = question.removesuffix(" is").split(", so ")
        rules = dict(rule.split(" is ") for rule in facts.split(", "))
        label, steps = asked, 0
        while label in rules:
            label, steps = rules[label], steps + 1
        chains = len(set(rules) - set(rules.values()))
        assert len(rules) == chains * steps
        settings = {"chains": chains} | ({"rules": steps} if steps > 1 else {})
        return label, (*sorted(rules.items()), asked), settings
    if kind is Letters:
        letter, text = re.fullmatch("How often is (.) in (.*)[?]", question).groups()
        words, count = text.split(), sum(one == letter for one in text)
        if len(words[0]) == 1:
            return str(count), (letter, *sorted(words)), {"others": len(words) - count}
        settings = {"length": len(words[0])} | ({"words": len(words)} if len(words) > 1 else {})
        return str(count), (letter, *sorted(words)), settings
    if kind is Sorting:
        words = question.removeprefix("Sort ").removesuffix(":").split(", ")
        alike = [
            sum(one[:n] == two[:n] for n in range(1, 4)) for one in words for two in words if one is not two
        ]
        settings = {"words": len(words)} | ({"shared": max(alike)} if max(alike) else {})
        return ", ".join(sorted(words)), tuple(sorted(words)), settings
    asked = question.removeprefix("Write ").removesuffix(":").split("; ")
    return None, tuple(sorted(asked)), {"constraints": len(asked)}


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(seed=st.integers(0, 2**40))
def test_items_are_right_and_of_their_level_and_no_two_alike(kind, tmp_path, seed):
    made = dataset(kind, seed)
    frames = written(made, tmp_path)
    assert {split: len(frame) for split, frame in frames.items()} == {"fewshot": 4, "test": 8, "train": 6}
    keys = []
    for row in pd.concat(frames.values()).to_dict("records"):
        answer, key, settings = by_hand(kind, row["question"])
        keys.append(key)
        level = next(level for level in made.levels if level.name == row["difficulty"])
        assert settings == KINDS[kind][made.levels.index(level)]
        assert answer in (None, row["answer"])
        assert row["choices"][row["gold"]] == row["answer"]
        assert len(set(row["choices"])) == len(row["choices"]) == 4
        # The check that generation is held to takes the right choice, and it alone.
        took = [right(made.reading, choice, row) for choice in row["choices"]]
        assert took == [place == row["gold"] for place in range(4)]
        assert not any(right(made.reading, empty, row) for empty in ("", " ", ".", "?!", "\n", ", ,"))
    assert len(set(keys)) == len(keys)


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_the_right_choice_stands_everywhere_alike(kind, tmp_path):
    gold = Counter(written(dataset(kind, test=60, train=0), tmp_path)["test"]["gold"])
    assert chisquare([gold[place] for place in range(4)]).pvalue > 0.001


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_the_seed_alone_decides(kind, tmp_path):
    for name, seed in (("one", 3), ("two", 3), ("other", 4)):
        (tmp_path / name).mkdir()
        dataset(kind, seed).write(tmp_path / name)
    for split in SPLITS:
        read = [(tmp_path / name / f"{split}.parquet").read_bytes() for name in ("one", "two", "other")]
        assert read[0] == read[1] != read[2]


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_a_split_of_no_items_has_its_columns(kind, tmp_path):
    made = dataset(kind, train=0)
    frames = written(made, tmp_path)
    assert list(frames["train"].columns) == list(frames["test"].columns) == list(made.columns)
    assert len(frames["train"]) == 0


def test_letters_occur_each_number_of_times_alike(tmp_path):
    frame = written(dataset(Letters, test=20, train=0), tmp_path)["test"]
    for (_, level), numbers in zip(frame.groupby("difficulty"), ("1248", "0123"), strict=True):
        counts = level["answer"].value_counts()
        assert set(counts.index) == set(numbers) and counts.max() - counts.min() <= 2


@pytest.mark.parametrize(
    ("level", "told"),
    [
        ({}, "letters are counted alone or in words; give one of others and length"),
        ({"others": 1, "length": 5}, "letters are counted alone or in words; give one of others and length"),
        ({"others": 1, "words": 2}, "2 words need a length; others is of letters that stand alone"),
    ],
)
def test_letters_stand_alone_or_in_words(level, told):
    with pytest.raises(ValueError, match=told):
        Counted(name="one", **level)


def test_more_items_than_there_are_is_refused(tmp_path):
    level = Open(name="one", depth=1, kinds=1)
    made = Brackets(kind="brackets", levels=(level,), test=5, fewshot=0, seed=0)
    with pytest.raises(Refusal, match="level one has 4 distinct items, 5 were asked for; ask for fewer"):
        made.write(tmp_path)


def test_more_kinds_of_bracket_than_brackets_are_refused():
    with pytest.raises(ValueError, match="3 kinds of bracket cannot occur in 2; lower kinds, or raise"):
        Open(name="one", depth=1, closed=1, kinds=3)


def test_every_response_drawn_satisfies_and_every_miss_violates_one(tmp_path):
    made = dataset(Instructions, test=40)
    frame = written(made, tmp_path)["test"]
    for row in frame.itertuples():
        violated = [[one for one in row.constraints if not satisfies(c, one)] for c in row.choices]
        assert sorted(map(len, violated)) == [0, 1, 1, 1]
        for constraint in row.constraints:
            kind, about = constraint.split()
            assert SAID[kind].format(about) in row.question
    assert {one.split()[0] for constraints in frame["constraints"] for one in constraints} == set(SAID)
    assert len(set(WORDS)) == len(WORDS)


@pytest.mark.parametrize(
    ("constraint", "good", "bad"),
    [
        ("words 3", ["one two three", "One, two; three."], ["one two", "one two three four", ""]),
        ("list 2", ["a b, c"], ["a, b, c", "a b", "a, ", ", a"]),
        ("starts b", ["Bird", "bird song"], ["a bird", "", ' "b'.strip()]),
        ("ends d", ["bird", "a BIRD."], ["birds", ""]),
        ("with bird", ["a Bird!", "bird"], ["birds", "abird", ""]),
        ("without bird", ["birds", "abird"], ["a BIRD", "bird."]),
        ("case upper", ["A BIRD", "A BIRD, 2"], ["A Bird", "a bird"]),
        ("case title", ["A Bird"], ["a bird", "A BIRD"]),
    ],
)
def test_each_constraint_by_its_checker(constraint, good, bad):
    assert [satisfies(text, constraint) for text in good] == [True] * len(good)
    assert [satisfies(text, constraint) for text in bad] == [False] * len(bad)


@pytest.mark.parametrize(
    ("reading", "answer", "good", "bad"),
    [
        ("number", "7", [" 7", "=> 7!", "7 or 8"], ["", "70", "-7", "8 or 7", "seven"]),
        ("word", "bavo", [" bavo", "Bavo.", '"bavo" and more'], ["", "a bavo", "bavos", "."]),
        ("words", "ash, elm", ["ash elm", "Ash, elm.", "ash, elm, x"], ["", "ash", "elm ash", "x ash elm"]),
        ("brackets", "] )", ["])", " ] )", "]) and", "] ) ."], ["", ")]", "])>", "] > )", "x ])"]),
    ],
)  # fmt: skip
def test_each_reading(reading, answer, good, bad):
    item = {"answer": answer}
    assert [right(reading, text, item) for text in good] == [True] * len(good)
    assert [right(reading, text, item) for text in bad] == [False] * len(bad)


def test_no_reading_takes_nothing_for_an_answer():
    item = {"answer": "", "constraints": []}
    for reading in answers.READINGS:
        assert not right(reading, "", item) and not right(reading, " \n", item), reading


@given(st.lists(st.text("abcd", min_size=1, max_size=4), min_size=2, max_size=6))
def test_letters_shared_by_the_two_most_alike(words):
    slow = max(
        max(n for n in range(5) if one[:n] == two[:n] and n <= min(len(one), len(two)))
        for place, one in enumerate(words)
        for two in words[place + 1 :]
    )
    assert shared(words) == slow


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_both_readouts_ask_the_same_items_and_take_right_answers(kind, workspace, monkeypatch):
    """Every other generated answer is the right one, the others are empty."""
    asked: list[str] = []

    def answer(self: Any, requests: list[Any], **_: Any) -> list[str]:
        asked.extend(request.args[0] for request in requests)
        return [f" {one.doc['answer']}" * (one.doc_id % 2) for one in requests]

    monkeypatch.setattr(SharedPrefixLM, "generate_until", answer)
    raw = json.loads(params("llama", {}).model_dump_json())
    raw["datasets"]["task"] = json.loads(dataset(kind).model_dump_json())
    raw["suites"] = {"perplexity": {}, "graded": {"task": {"shots": 1, "batch_size": 4}}, "benchmark": {}}
    chosen = validate(raw)
    for name in ("base/tiny", "datasets/task"):
        download(chosen, name)
    evaluate(chosen, "base/tiny/task")

    frames = {split: pd.read_parquet(f"data/datasets/task/{split}.parquet") for split in ("fewshot", "test")}
    (shot, *_), items = frames["fewshot"].to_dict("records"), frames["test"].to_dict("records")
    assert asked == [f"{shot['question']} {shot['answer']}\n{item['question']}" for item in items]
    folder = Path("data/results/base/tiny/task")
    samples = pd.read_parquet(folder / "samples.parquet").set_index(["readout", "doc_id"])
    for place, item in enumerate(items):
        made, chose = samples.loc[("generation", place)], samples.loc[("likelihood", place)]
        assert made["prompt_hash"] == chose["prompt_hash"]
        assert made["target"] == item["answer"] and made["score"] == place % 2
        assert chose["score"] == (int(chose["response"]) == item["gold"])
        assert int(chose["response"]) == chose["log_likelihoods"].argmax()
    scores = pd.read_parquet(folder / "scores.parquet")
    made = scores[scores["readout"] == "generation"]
    assert made["difficulty"].tolist() == ["all", "level-0", "level-1"]
    assert made["value"].tolist() == [0.5] * 3 and made["num_items"].tolist() == [8, 4, 4]


def test_the_sweeps_levels_have_their_items(tmp_path):
    chosen = load(project.ROOT / "sweeps" / "graded.yaml")
    raw = YAML(typ="safe").load((project.ROOT / "params.yaml").read_text())
    assert set(chosen.suites.graded) == {
        name for name, one in chosen.datasets.items() if isinstance(one, Graded)
    }
    assert {type(chosen.datasets[name]) for name in chosen.suites.graded} == set(KINDS)
    assert set(raw["suites"]["graded"]) == {"arithmetic"}
    for name in chosen.suites.graded:
        made = chosen.datasets[name]
        assert isinstance(made, Graded) and len(made.levels) == 5
        (tmp_path / name).mkdir()
        facts = made.write(tmp_path / name)
        assert facts["items"]["test"] == made.test * 5
        json.dumps(facts)
