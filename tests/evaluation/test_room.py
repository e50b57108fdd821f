"""Rows of a forward where a suite names no batch size."""

import pytest
import torch
from lm_eval.api.instance import Instance

from stages.evaluation import room, shared
from tests import families
from tests.evaluation.test_shared import CHOICES, FEWSHOT, QUESTIONS, generations, likelihoods, spy
from tests.pipeline import do, params
from tests.scoring import changed, scored


@pytest.mark.parametrize("family", ["llama", "gpt2", "mpt", "mamba"])
def test_rows_follow_memory_and_lengths(family):
    model = families.wide(family)
    weights = sum(parameter.nbytes for parameter in model.parameters())

    def rows(memory: float, tokens: int = 64) -> int:
        return room.fitting_rows(model, int(memory), tokens=tokens, new=tokens, predicting=tokens)

    assert rows(0) == rows(weights) == 1
    few, many = rows(2 * weights + 2**25), rows(2 * weights + 2**27)
    assert 1 < few < many and many == pytest.approx(4 * few, rel=0.2)
    assert rows(2**27) > 1.9 * rows(2**27, 128)


def test_a_gpu_gets_more_rows_than_a_cpu():
    assert room.usual_rows(torch.device("cuda", 1)) > room.usual_rows(torch.device("cpu"))
    assert room.memory_of(torch.device("cpu")) is None


def test_no_forward_outgrows_the_memory_and_scores_stay_the_same(monkeypatch):
    model, answers, shapes = families.wide("llama"), [], []
    pairs = [(FEWSHOT + question, choice) for question in QUESTIONS for choice in CHOICES]
    for memory in (None, 0):
        lm = shared.SharedPrefixLM(
            pretrained=model,
            tokenizer=families.tokenizer(),
            batch_size=64,
            softmax_dtype="float32",
            memory=memory,
        )
        with monkeypatch.context() as patch:
            seen = spy(patch, lm)
            totals = [total for total, _ in lm.loglikelihood(likelihoods(pairs), disable_tqdm=True)]
            alone = lm.loglikelihood(likelihoods([("", "4 + 4"), ("", "9")]), disable_tqdm=True)
            texts = lm.generate_until(
                generations([FEWSHOT + q for q in QUESTIONS], ["\n"]), disable_tqdm=True
            )
        answers.append((totals, [total for total, _ in alone], texts))
        shapes.append(max(rows for rows, _ in seen))
        assert lm.batch_size == 64
    assert shapes[0] > 1 and shapes[1] == 1
    assert answers[1][0] == pytest.approx(answers[0][0], abs=1e-3)
    assert answers[1][1] == pytest.approx(answers[0][1], abs=1e-3)
    assert answers[1][2] == answers[0][2]


def test_windows_of_a_long_text_fit_into_memory_as_well(monkeypatch):
    lm = shared.SharedPrefixLM(
        pretrained=families.wide("llama"), tokenizer=families.tokenizer(), batch_size=64, memory=0
    )
    seen = spy(monkeypatch, lm)
    text = Instance("loglikelihood_rolling", {}, (" ".join(map(str, range(400))),), 0)
    lm.loglikelihood_rolling([text], disable_tqdm=True)
    assert len(seen) > 4 and {rows for rows, _ in seen} == {1}


def test_the_rows_of_a_suite_without_a_batch_size_are_recorded(workspace):
    suites = {"perplexity": {"news": {"windows": 3, "sequence_length": 32}}, "graded": {}, "benchmark": {}}
    chosen = changed(params("llama", {}), suites=suites)
    do(chosen)
    scores, _ = scored(chosen, "base/tiny", "news")
    assert set(scores["batch_size"]) == {room.usual_rows(torch.device(families.DEVICE))}
