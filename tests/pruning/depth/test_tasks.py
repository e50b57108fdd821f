"""Graded items as a measure: scored as lm-eval scores them, and greedy by them."""

import hashlib
from pathlib import Path

import pandas as pd
import pytest

from stages.core.errors import Refusal
from stages.pruning.depth.ablate import Ablation
from stages.pruning.depth.tasks import Items, retained
from tests import families
from tests.pipeline import load

pytestmark = [pytest.mark.numerics, pytest.mark.device]


def test_items_are_scored_as_lm_eval_scores_them(graded):
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    choices = Items(dataset="arithmetic", shots=1).choices(families.tokenizer())
    assert len(choices.ranges) == 6 and set(choices.levels) == {"add"}
    ablation = Ablation(graded, choices.rows, 4, "block", "test")
    scores = ablation.likelihoods([frozenset()])[frozenset()]
    shot = pd.read_parquet("data/datasets/arithmetic/fewshot.parquet").iloc[0]
    lm = HFLM(pretrained=graded, tokenizer=families.tokenizer(), device="cpu", batch_size=1)
    requests = [
        Instance(
            "loglikelihood", {}, (f"{shot.question} {shot.answer}\n{item.question}", f" {choice}"), 0
        )
        for item in pd.read_parquet("data/datasets/arithmetic/train.parquet").itertuples()
        for choice in item.choices
    ]  # fmt: skip
    expected = [lm.loglikelihood([request], disable_tqdm=True)[0][0] for request in requests]
    assert scores.tolist() == pytest.approx(expected, abs=1e-4)


def test_greedy_by_graded_items(graded, prune):
    choices = Items(dataset="arithmetic", shots=1).choices(families.tokenizer())
    ablation = Ablation(graded, choices.rows, 4, "block", "test")
    likelihoods = ablation.likelihoods(frozenset({number}) for number in range(4))
    dense = choices.accuracies(ablation.likelihoods([frozenset()])[frozenset()])
    right = {
        number: sum(
            int(likelihoods[frozenset({number})][rows.start : rows.stop].argmax()) == gold
            for rows, gold in zip(choices.ranges, choices.gold, strict=True)
        )
        for number in range(4)
    }
    assert dense.keys() == {"add"} and dense["add"] > 0
    for number in range(4):
        kept = retained(choices.accuracies(likelihoods[frozenset({number})]), dense)
        assert kept == pytest.approx(right[number] / 6 / dense["add"])
    facts = prune(metric="greedy", blocks=1, calibration={"dataset": "arithmetic", "shots": 1})
    notes = facts["notes"]["prune/made"]
    most = max(right[number] for number in (1, 2, 3))
    assert right[notes["removed"][0]] == most and notes["dense_accuracy"] == dense
    with pytest.raises(Refusal, match="answers none of the graded items right"):
        retained({"add": 1.0}, {"add": 0.0})


@pytest.mark.parametrize("target", ["block", "attention"])
def test_greedy_by_generated_answers(target, graded, prune, monkeypatch):
    """A model without a block answers as the written one does. Which answers are right is drawn."""
    asked: list[str] = []

    def right(reading, response, item):
        asked.append(response)
        return hashlib.sha256(f"{item['question']}{response}".encode()).digest()[0] % 2 == 0

    monkeypatch.setattr("stages.pruning.depth.tasks.is_right", right)
    items = {"dataset": "arithmetic", "shots": 1, "readout": "generation"}
    settings = {"metric": "greedy", "blocks": 1, "target": target, "calibration": items}
    facts = prune(**settings)
    (step,) = facts["notes"]["prune/made"]["steps"]
    assert len(asked) == 6 * (1 + len(step["scores"])) and len(set(asked)) > 1
    expected = {}
    for number in (1, 2, 3):
        keep = tuple({0, 1, 2, 3} - {number})
        only = {"metric": "reverse", "blocks": 1, "target": target, "keep": keep}
        prune(artifact=f"prune/without-{number}", **only)
        accuracies = Items(**items).accuracies(load(f"prune/without-{number}"), families.tokenizer())
        expected[str(number)] = retained(accuracies, facts["notes"]["prune/made"]["dense_accuracy"])
    assert step["scores"] == expected and (len(set(expected.values())) > 1 or target == "attention")
    assert expected[str(step["removed"])] == max(expected.values())
    assert Path("data/models/prune/made/generation_config.json").read_bytes() == (
        Path("data/models/base/deep/generation_config.json").read_bytes()
    )


def test_an_answer_ends_with_its_line_and_is_read_as_the_suite_reads_it(graded, monkeypatch):
    items = Items(dataset="arithmetic", shots=1, readout="generation", batch_size=4)
    answers = pd.read_parquet("data/datasets/arithmetic/train.parquet")["answer"]
    texts = iter([f" {answer}\n99" for answer in answers[:3]] + [f" 1{answer}" for answer in answers[3:]])
    tokenizer = families.tokenizer()

    def write(model, prompts, uniform, temperature, ends, until, _):
        assert temperature == 0 and until == "\n" and uniform.shape == (len(prompts), 12)
        return [[*tokenizer.encode(next(texts)), ends[0], 0] for _ in prompts]

    monkeypatch.setattr("stages.corpus.decoding.generate_answers", write)
    assert items.accuracies(graded, tokenizer) == {"add": 0.5}
