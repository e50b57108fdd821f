"""The contract of graded data: right answers, honest levels, fair choices, splits that share nothing.

Every kind that params.yaml can name is tested, with its line in `tests.graded.CASES`.
"""

import json
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
from stages.corpus.readings import is_right
from stages.evaluation.shared import SharedPrefixLM
from stages.job.load import checked_params, load
from stages.sources.graded.brackets import Brackets, BracketsLevel
from stages.sources.graded.items import GRADED_SPLITS, NOUNS, STEPS, GradedData
from tests import project
from tests.graded import CASES, KINDS, case, dataset, write
from tests.pipeline import download, evaluate, params

every_kind = pytest.mark.parametrize("kind", KINDS)


def test_every_kind_has_a_line_in_the_table():
    assert KINDS and set(KINDS) == set(CASES)


@every_kind
@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(seed=st.integers(0, 2**40))
def test_items_are_right_distinct_and_of_their_level(kind, tmp_path, seed):
    graded = dataset(kind, seed)
    splits = write(graded, tmp_path)
    assert {split: len(rows) for split, rows in splits.items()} == {"fewshot": 4, "test": 8, "train": 6}
    keys = []
    for item in pd.concat(splits.values()).to_dict("records"):
        solution = case(kind).solve(item["question"])
        keys.append(solution.key)
        level = next(level for level in graded.levels if level.name == item["difficulty"])
        assert solution.settings == case(kind).levels[graded.levels.index(level)]
        assert solution.answer in (None, item["answer"])
        assert item["choices"][item["gold"]] == item["answer"]
        assert len(set(item["choices"])) == len(item["choices"]) == 4
        assert STEPS not in item or item[STEPS].endswith(item["answer"])
        # The reading of generated answers takes the right choice, and no other.
        rights = [is_right(graded.reading, choice, item) for choice in item["choices"]]
        assert rights == [place == item["gold"] for place in range(4)]
        assert not any(is_right(graded.reading, empty, item) for empty in ("", " ", ".", "?!", "\n", ", ,"))
    # No item is in two splits, or in two levels.
    assert len(set(keys)) == len(keys)


@every_kind
def test_the_right_choice_is_equally_likely_in_each_place(kind, tmp_path):
    gold = Counter(write(dataset(kind, test=60, train=0), tmp_path)["test"]["gold"])
    assert chisquare([gold[place] for place in range(4)]).pvalue > 0.001


@every_kind
def test_the_seed_alone_decides(kind, tmp_path):
    for name, seed in (("first", 3), ("second", 3), ("other", 4)):
        (tmp_path / name).mkdir()
        dataset(kind, seed).write(tmp_path / name)
    for split in GRADED_SPLITS:
        first, second, other = (
            (tmp_path / name / f"{split}.parquet").read_bytes() for name in ("first", "second", "other")
        )
        assert first == second != other


@every_kind
def test_an_empty_split_has_its_columns(kind, tmp_path):
    graded = dataset(kind, train=0)
    splits = write(graded, tmp_path)
    assert list(splits["train"].columns) == list(splits["test"].columns) == list(graded.columns)
    assert len(splits["train"]) == 0


def test_the_nouns_are_distinct():
    assert len(set(NOUNS)) == len(NOUNS)


def test_more_items_than_a_level_has_are_refused(tmp_path):
    level = BracketsLevel(name="easy", depth=1, kinds=1)
    graded = Brackets(kind="brackets", levels=(level,), test=5, fewshot=0, seed=0)
    with pytest.raises(Refusal, match="level easy has 4 distinct items, fewer than 5; lower test, train or"):
        graded.write(tmp_path)


@every_kind
def test_both_readouts_ask_the_same_items_and_accept_right_answers(kind, workspace, monkeypatch):
    """Every other generated answer is the right one, the others are empty."""
    prompts: list[str] = []

    def answer(self: Any, requests: list[Any], **_: Any) -> list[str]:
        prompts.extend(request.args[0] for request in requests)
        return [f" {request.doc['answer']}" * (request.doc_id % 2) for request in requests]

    monkeypatch.setattr(SharedPrefixLM, "generate_until", answer)
    raw = json.loads(params("llama", {}).model_dump_json())
    raw["datasets"]["task"] = json.loads(dataset(kind).model_dump_json())
    raw["suites"] = {"perplexity": {}, "graded": {"task": {"shots": 1, "batch_size": 4}}, "benchmark": {}}
    chosen = checked_params(raw)
    for name in ("base/tiny", "datasets/task"):
        download(chosen, name)
    evaluate(chosen, "base/tiny/task")

    splits = {split: pd.read_parquet(f"data/datasets/task/{split}.parquet") for split in ("fewshot", "test")}
    (shot, *_), items = splits["fewshot"].to_dict("records"), splits["test"].to_dict("records")
    assert prompts == [f"{shot['question']} {shot['answer']}\n{item['question']}" for item in items]
    folder = Path("data/results/base/tiny/task")
    samples = pd.read_parquet(folder / "samples.parquet").set_index(["readout", "doc_id"])
    for place, item in enumerate(items):
        generated, chose = samples.loc[("generation", place)], samples.loc[("likelihood", place)]
        assert generated["prompt_hash"] == chose["prompt_hash"]
        assert generated["target"] == item["answer"] and generated["score"] == place % 2
        assert chose["score"] == (int(chose["response"]) == item["gold"])
        assert int(chose["response"]) == chose["log_likelihoods"].argmax()
    scores = pd.read_parquet(folder / "scores.parquet")
    generation = scores[scores["readout"] == "generation"]
    assert generation["difficulty"].tolist() == ["all", "level-0", "level-1"]
    assert generation["value"].tolist() == [0.5] * 3 and generation["num_items"].tolist() == [8, 4, 4]


def test_the_sweep_has_every_kind_and_its_levels_have_their_items(tmp_path):
    chosen = load(project.ROOT / "sweeps" / "graded.yaml")
    graded = {name: data for name, data in chosen.datasets.items() if isinstance(data, GradedData)}
    assert set(chosen.suites.graded) == set(graded)
    assert {type(data) for data in graded.values()} == set(KINDS.values())
    for name, data in graded.items():
        assert len(data.levels) == 5
        (tmp_path / name).mkdir()
        facts = data.write(tmp_path / name)
        assert facts["items"]["test"] == data.test * 5
        json.dumps(facts)


def test_the_default_job_asks_arithmetic_only(tmp_path):
    raw = YAML(typ="safe").load((project.ROOT / "params.yaml").read_text())
    assert set(raw["suites"]["graded"]) == {"arithmetic"}
    data = load(project.ROOT / "params.yaml").datasets["arithmetic"]
    assert data.write(tmp_path)["items"]["test"] == data.test * len(data.levels)
