"""Graded items as a measure: scored as lm-eval scores them, and greedy by them."""

import pandas as pd
import pytest

from stages.core.errors import Refusal
from stages.pruning.depth.ablate import Ablation
from stages.pruning.depth.tasks import Items
from tests import families

pytestmark = pytest.mark.numerics


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
        retained = choices.retained(likelihoods[frozenset({number})], dense)
        assert retained == pytest.approx(right[number] / 6 / dense["add"])
    facts = prune(metric="greedy", blocks=1, calibration={"dataset": "arithmetic", "shots": 1})
    notes = facts["notes"]["prune/made"]
    most = max(right[number] for number in (1, 2, 3))
    assert right[notes["removed"][0]] == most and notes["dense_accuracy"] == dense
    with pytest.raises(Refusal, match="answers none of the graded items right"):
        choices.retained(likelihoods[frozenset({1})], {"add": 0.0})
