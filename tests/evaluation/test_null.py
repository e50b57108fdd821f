"""Null responders: what they answer, and the floors that scores carry because of them."""

import itertools
import json
import math
import random
from collections import Counter
from pathlib import Path
from typing import Any, get_args

import pandas as pd
import pytest
from lm_eval.api.instance import Instance
from lm_eval.api.task import ConfigurableTask
from scipy.stats import binom

from stages.controls.candidates import Floor
from stages.corpus.readings import is_right
from stages.evaluation import lm_tasks, null
from tests import families
from tests.pipeline import do, download, params, record
from tests.test_evaluate import changed, scored

RESPONDERS = (*null.SCORERS, *null.SPEAKERS)


def made(responder: str, seed: int = 0) -> null.NullLM:
    return null.NullLM.named(responder, families.tokenizer(), seed)


def choices(*texts: str, item: int = 0) -> list[Instance]:
    return [
        Instance("loglikelihood", {}, ("Which?", f" {text}"), i, ("task", item, 1))
        for i, text in enumerate(texts)
    ]


def asked(prompt: str, **options: Any) -> list[Instance]:
    return [Instance("generate_until", {}, (prompt, options), 0, ("task", 0, 1))]


def chosen(lm: null.NullLM, requests: list[Instance]) -> int:
    values = [value for value, _ in lm.loglikelihood(requests)]
    return max(range(len(values)), key=values.__getitem__)  # the first of the largest, as numpy's argmax


def test_params_name_every_responder():
    assert set(get_args(Floor.model_fields["responder"].annotation)) == set(RESPONDERS)


def test_equal_odds_choose_each_choice_equally_often():
    lm = made("uniform")
    found = Counter(chosen(lm, choices("a", "bb", "ccc", "dddd", item=i)) for i in range(400))
    low, high = binom.interval(0.999, 400, 1 / 4)
    assert all(low <= found[i] <= high for i in range(4))
    told = [math.exp(value) for value, _ in lm.loglikelihood(choices("a", "bb", "ccc", "dddd"))]
    assert told == pytest.approx([1 / 4] * 4, rel=1e-4)
    assert not any(greedy for _, greedy in lm.loglikelihood(choices("a", "b")))


def test_the_longest_choice_wins_and_ties_are_drawn():
    lm = made("longest-choice")
    drawn = random.Random(0)
    for item in range(50):
        lengths = drawn.sample(range(1, 30), 4)
        assert chosen(lm, choices(*("x" * n for n in lengths), item=item)) == lengths.index(max(lengths))
    ties = {chosen(lm, choices("aaa", "b", "ccc", item=item)) for item in range(50)}
    assert ties == {0, 2}


@pytest.mark.parametrize("responder", RESPONDERS)
def test_the_same_seed_says_the_same_whatever_is_asked_beside_it(responder):
    requests = [request for item in range(5) for request in choices("a", "b", "c", item=item)]
    lm = made(responder)
    together = lm.loglikelihood(requests)
    assert together[6:9] == made(responder).loglikelihood(requests[6:9])
    assert lm.generate_until(asked("Say it.")) == made(responder).generate_until(asked("Say it."))


def test_what_speakers_say():
    said = {name: made(name).generate_until(asked("Say it twice."))[0] for name in RESPONDERS}
    assert said["uniform"] == said["longest-choice"] == said["empty"] == ""
    assert said["dot"] == "." and said["echo"] == "Say it twice."
    sort = [
        made("shuffled", seed).generate_until(asked("Sort a, b:\na, b\nSort x, z, y:\n"))[0]
        for seed in range(60)
    ]
    assert {"".join(one.split()) for one in sort} == set(map("".join, itertools.permutations("xyz")))
    assert made("previous").generate_until(asked("Sum 1, 1: 2\nSum 1, 2:")) == ["2"]
    assert made("previous").generate_until(asked("Sum 1, 2:")) == [""]
    long = {"max_gen_toks": 10**6}
    assert made("repeat").generate_until(asked("", **long)) == [" ".join(["the"] * 300)]
    words = made("random-words").generate_until(asked("", **long))[0].split()
    assert len(words) == 300 and len(set(words)) > 40
    assert words != made("random-words", seed=1).generate_until(asked("", **long))[0].split()


def test_answers_are_cut_where_a_task_cuts_them():
    echo = made("echo")
    assert echo.generate_until(asked("one\ntwo\n\nthree", until=["\n\n"])) == ["one\ntwo"]
    assert echo.generate_until(asked(" one two", until="two")) == ["one "]
    (short,) = made("repeat").generate_until(asked("", max_gen_toks=7))
    assert len(families.tokenizer()(short, add_special_tokens=False).input_ids) <= 7
    assert "the the".startswith(short[:7])


def test_an_echo_is_of_what_is_said_rather_than_of_the_template():
    lm = made("echo")
    prompt = lm.apply_chat_template([{"role": "user", "content": "Say it."}])
    assert prompt != "Say it." and "Say it." in prompt
    assert lm.generate_until(asked(prompt)) == ["Say it."]


@pytest.mark.parametrize("responder", ["uniform", "echo"])
def test_its_perplexity_is_the_size_of_the_vocabulary(responder, workspace):
    given = params("llama", {"floor/none": {"source": "base/tiny", "responder": responder}})
    do(given)
    scores, _ = scored(given, "floor/none", "news")
    (row,) = scores[scores.metric == "perplexity"].to_dict("records")
    assert row["value"] == pytest.approx(len(families.tokenizer()))
    assert scores.floor.isna().all()
    assert row["num_parameters"] == row["bytes_on_disk"] == row["sparsity"] == 0
    assert row["lineage"] == "base/tiny > floor/none"
    assert not list(Path("data/models/floor/none").glob("*.safetensors"))
    assert record("floor/none")["responder"] == responder


def test_floors_of_graded_scores_are_the_best_that_null_responders_get(workspace):
    given = params(
        "llama", {f"floor/{name}": {"source": "base/tiny", "responder": name} for name in RESPONDERS}
    )
    given = changed(given, suites=json.loads(given.suites.model_dump_json()) | {"perplexity": {}})
    do(given)
    download(given, "datasets/arithmetic")
    tables = {name: scored(given, f"floor/{name}", "arithmetic") for name in RESPONDERS}
    model, _ = scored(given, "base/tiny", "arithmetic")
    test = pd.read_parquet("data/datasets/arithmetic/test.parquet")
    reading = json.loads(Path("data/datasets/arithmetic/dataset.json").read_text())["answer"]["reading"]
    for _, samples in tables.values():  # scores are those of what was said
        for row in samples[samples.readout == "generation"].itertuples():
            assert row.score == is_right(reading, row.response, test.iloc[row.doc_id].to_dict())
    for row in model[model.readout == "generation"].itertuples():
        best = max(
            scores[(scores.readout == "generation") & (scores.difficulty == row.difficulty)].value.item()
            for scores, _ in tables.values()
        )
        assert row.floor == best
    for row in model[model.readout == "likelihood"].itertuples():
        assert row.floor >= 1 / 4


def answers(value: float, floor: float | None, stderr: float | None, better: bool = True) -> dict[str, Any]:
    return {
        "task": "t", "readout": "likelihood", "metric": "acc", "difficulty": "all", "value": value,
        "floor": floor, "stderr": stderr, "higher_is_better": better,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("chance", "nulls", "better", "floor"),
    [
        (0.25, [0.30, 0.28], True, 0.25),  # no further above chance than luck takes it
        (0.25, [0.30, 0.60], True, 0.60),
        (None, [0.10, 0.15], True, 0.15),
        (None, [9.0, 8.0], False, None),  # a perplexity has no floor
    ],
)
def test_a_floor_is_above_chance_only_beyond_luck(chance, nulls, better, floor):
    model = made("empty")
    told = iter([0.9, *nulls])
    rows, _ = lm_tasks.with_floors(model, 0, lambda lm: ([answers(next(told), chance, 0.05, better)], []))
    assert rows[0]["value"] == 0.9
    assert rows[0]["floor"] == floor


def test_responders_are_asked_what_the_model_is_and_prompts_are_built_once(workspace, monkeypatch):
    given = params("llama", {})
    do(given)
    download(given, "datasets/arithmetic")
    suite, tokenizer = given.suites.graded["arithmetic"], families.tokenizer()
    built, asked = [], []
    context = ConfigurableTask.fewshot_context
    monkeypatch.setattr(
        ConfigurableTask,
        "fewshot_context",
        lambda self, doc, *args, **options: built.append(doc) or context(self, doc, *args, **options),
    )
    for kind in ("loglikelihood", "generate_until"):
        answer = getattr(null.NullLM, kind)

        def heard(self, requests, kind=kind, answer=answer):
            assert all(not request.filtered_resps for request in requests)
            asked.append((kind, [request.args for request in requests]))
            return answer(self, requests)

        monkeypatch.setattr(null.NullLM, kind, heard)
    alone = null.NullLM.named("echo", tokenizer, 0)
    _, samples = suite.evaluate(alone, "arithmetic", 0)
    assert len(built) == len(samples)
    assert len(asked) == 2 * (1 + len(null.SPEAKERS))
    for kind in ("loglikelihood", "generate_until"):
        first, *others = [requests for which, requests in asked if which == kind]
        assert all(other == first for other in others)
