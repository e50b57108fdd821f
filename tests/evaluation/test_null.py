"""Responders without knowledge as models: what each answers."""

import itertools
import math
import random
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from lm_eval.api.instance import Instance
from scipy.stats import binom

from stages.controls.responders import RESPONDERS
from stages.evaluation.null import NullLM
from tests import families
from tests.pipeline import do, params, record
from tests.scoring import scored


def responder_lm(responder: str, seed: int = 0) -> NullLM:
    return NullLM.named(responder, families.tokenizer(), seed)


def choices(*texts: str, item: int = 0) -> list[Instance]:
    return [
        Instance("loglikelihood", {}, ("Which?", f" {text}"), i, ("task", item, 1))
        for i, text in enumerate(texts)
    ]


def request(prompt: str, **options: Any) -> list[Instance]:
    return [Instance("generate_until", {}, (prompt, options), 0, ("task", 0, 1))]


def chosen(lm: NullLM, requests: list[Instance]) -> int:
    values = [value for value, _ in lm.loglikelihood(requests)]
    return max(range(len(values)), key=values.__getitem__)  # the first of the largest, as numpy's argmax


def test_equal_odds_choose_each_choice_equally_often():
    lm = responder_lm("uniform")
    counts = Counter(chosen(lm, choices("a", "bb", "ccc", "dddd", item=i)) for i in range(400))
    low, high = binom.interval(0.999, 400, 1 / 4)
    assert all(low <= counts[i] <= high for i in range(4))
    odds = [math.exp(value) for value, _ in lm.loglikelihood(choices("a", "bb", "ccc", "dddd"))]
    assert odds == pytest.approx([1 / 4] * 4, rel=1e-4)
    assert not any(greedy for _, greedy in lm.loglikelihood(choices("a", "b")))


def test_the_longest_choice_wins_and_ties_are_drawn():
    lm = responder_lm("longest-choice")
    drawn = random.Random(0)
    for item in range(50):
        lengths = drawn.sample(range(1, 30), 4)
        assert chosen(lm, choices(*("x" * n for n in lengths), item=item)) == lengths.index(max(lengths))
    ties = {chosen(lm, choices("aaa", "b", "ccc", item=item)) for item in range(50)}
    assert ties == {0, 2}


@pytest.mark.parametrize("responder", RESPONDERS)
def test_an_answer_depends_on_the_seed_and_not_on_other_requests(responder):
    requests = [request for item in range(5) for request in choices("a", "b", "c", item=item)]
    lm = responder_lm(responder)
    together = lm.loglikelihood(requests)
    assert together[6:9] == responder_lm(responder).loglikelihood(requests[6:9])
    assert lm.generate_until(request("Say it.")) == responder_lm(responder).generate_until(request("Say it."))


def test_what_speakers_say():
    texts = {name: responder_lm(name).generate_until(request("Say it twice."))[0] for name in RESPONDERS}
    assert texts["uniform"] == texts["longest-choice"] == texts["empty"] == ""
    assert texts["dot"] == "." and texts["echo"] == "Say it twice."
    orders = [
        responder_lm("shuffled", seed).generate_until(request("Sort a, b:\na, b\nSort x, z, y:\n"))[0]
        for seed in range(60)
    ]
    assert {"".join(order.split()) for order in orders} == set(map("".join, itertools.permutations("xyz")))
    assert responder_lm("previous").generate_until(request("Sum 1, 1: 2\nSum 1, 2:")) == ["2"]
    assert responder_lm("previous").generate_until(request("Sum 1, 2:")) == [""]
    separated = "Say a\x0cb: c\u2028d\nSay e\x85f:"  # lines end at line feeds only
    assert responder_lm("previous").generate_until(request(separated)) == ["d"]
    assert sorted(responder_lm("shuffled").generate_until(request(separated))[0].split()) == ["e", "f"]
    long = {"max_gen_toks": 10**6}
    assert responder_lm("repeat").generate_until(request("", **long)) == [" ".join(["the"] * 300)]
    words = responder_lm("random-words").generate_until(request("", **long))[0].split()
    assert len(words) == 300 and len(set(words)) > 40
    assert words != responder_lm("random-words", seed=1).generate_until(request("", **long))[0].split()


def test_answers_are_cut_where_a_task_cuts_them():
    echo = responder_lm("echo")
    assert echo.generate_until(request("one\ntwo\n\nthree", until=["\n\n"])) == ["one\ntwo"]
    assert echo.generate_until(request(" one two", until="two")) == ["one "]
    (short,) = responder_lm("repeat").generate_until(request("", max_gen_toks=7))
    assert len(families.tokenizer()(short, add_special_tokens=False).input_ids) <= 7
    assert "the the".startswith(short[:7])


def test_an_echo_is_of_the_last_turn_without_the_template():
    lm = responder_lm("echo")
    prompt = lm.apply_chat_template([{"role": "user", "content": "Say it."}])
    assert prompt != "Say it." and "Say it." in prompt
    assert lm.generate_until(request(prompt)) == ["Say it."]


@pytest.mark.parametrize("responder", ["uniform", "echo"])
def test_the_perplexity_of_a_responder_is_the_size_of_the_vocabulary(responder, workspace):
    project = params("llama", {"floor/none": {"source": "base/tiny", "responder": responder}})
    do(project)
    scores, _ = scored(project, "floor/none", "news")
    (row,) = scores[scores.metric == "perplexity"].to_dict("records")
    assert row["value"] == pytest.approx(len(families.tokenizer()))
    assert scores.floor.isna().all()
    assert row["num_parameters"] == row["bytes_on_disk"] == row["sparsity"] == 0
    assert list(row["lineage"]) == ["base/tiny", "floor/none"]
    assert not list(Path("data/models/floor/none").glob("*.safetensors"))
    assert record("floor/none")["responder"] == responder
