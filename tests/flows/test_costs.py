"""What a suite asks, counted before it is asked, and the batch size proposed for it."""

import json
from pathlib import Path

import pandas as pd
import pytest
from lm_eval.models.huggingface import HFLM

from flows import costs
from flows.costs import Trial
from stages.core.errors import Refusal
from stages.evaluation import null
from stages.evaluation.thinking.budget import BudgetLM
from tests import families
from tests.pipeline import do, download, evaluate, params
from tests.scoring import changed


def test_costs_are_what_is_asked(workspace, monkeypatch):
    chosen = params("llama", {})
    do(chosen)
    download(chosen, "datasets/arithmetic")
    with monkeypatch.context() as patched:
        patched.setattr(null, "for_readouts", lambda *_: pytest.fail("floors are not measured for a cost"))
        rows = {row["suite"]: row for row in costs.costs(chosen, "base/tiny")}
    assert set(rows) == {"news", "arithmetic"}
    windows = chosen.suites.perplexity["news"]
    assert rows["news"] | {"minutes": None} == {
        "suite": "news", "items": windows.windows, "requests": windows.windows,
        "read": windows.windows * windows.sequence_length, "written": 0, "minutes": None,
    }  # fmt: skip

    items = pd.read_parquet("data/datasets/arithmetic/test.parquet")
    example = pd.read_parquet("data/datasets/arithmetic/fewshot.parquet").iloc[0]
    prompts = [f"{example.question} {example.answer}\n{question}" for question in items["question"]]
    count = lambda text: len(families.tokenizer()(text).input_ids)  # noqa: E731
    read = sum(map(count, prompts))
    for prompt, choices in zip(prompts, items["choices"], strict=True):
        read += sum(count(f"{prompt} {choice}") for choice in choices)
    row = rows["arithmetic"]
    assert (row["items"], row["requests"], row["read"]) == (4, 4 * 5, read)
    assert row["written"] == 4 * 12 and row["minutes"] is None

    asked = []
    monkeypatch.setattr(
        HFLM, "generate_until", lambda self, requests, **_: [asked.append(one) or "" for one in requests]
    )
    evaluate(chosen, "base/tiny/arithmetic")
    assert len(asked) == 4
    Path("data/runs/evaluate/base/tiny").mkdir(parents=True)
    record = {"state": "done", "seconds": 90.0}
    Path("data/runs/evaluate/base/tiny/arithmetic.json").write_text(json.dumps(record))
    assert {row["suite"]: row["minutes"] for row in costs.costs(chosen, "base/tiny")} == {
        "news": None, "arithmetic": 1.5,
    }  # fmt: skip


THINKING = {"budgets": [0, 3, 20], "draws": 2, "temperature": 1.0, "begin": "\n", "end": "e", "answer": "A:"}


@pytest.mark.parametrize("waits", [0, 2])
def test_thinking_costs_what_it_reads_and_writes(waits, workspace, monkeypatch):
    rules = {**THINKING, "waits": waits}
    chosen = params("llama", {})
    graded = {"arithmetic": {"shots": 1, "batch_size": 4, "thinking": rules}}
    chosen = changed(chosen, suites={"perplexity": {}, "graded": graded, "benchmark": {}})
    do(chosen)
    download(chosen, "datasets/arithmetic")
    row = costs.costs(chosen, "base/tiny")[0]
    assert (row["items"], row["requests"], row["written"]) == (4, 4 * 2 * 3, 4 * 2 * (20 + 3 * 12))

    read = []

    def as_long_as_may_be(self, texts, numbers, *_):
        read.extend(len(self.tok_encode(text)) for text in texts)
        return [tuple(self.tok_encode("x" * len(row))) for row in numbers]

    with monkeypatch.context() as patched:
        patched.setattr(BudgetLM, "_generate", as_long_as_may_be)
        evaluate(chosen, "base/tiny/arithmetic")
    samples = pd.read_parquet("data/results/base/tiny/arithmetic/samples.parquet")
    draws = samples[samples.metric.str.startswith("draw")]
    assert draws.generated_tokens.sum() - 4 * 2 * 3 == row["written"]  # of the budget of 3 thinks no one anew
    assert sum(read) == row["read"] if waits == 0 else sum(read) < row["read"]

    thought = []
    think = BudgetLM._think
    monkeypatch.setattr(
        BudgetLM, "_think", lambda self, *rest: thought.append(self.batch_size) or think(self, *rest)
    )
    found = costs.trials(chosen, "base/tiny", "arithmetic", items=2, repeats=1)
    assert [trial.batch_size for trial in found] == [1, 2] and thought == [1, 1, 2, 2]


def test_batch_sizes_are_tried_up_to_what_the_items_fill(workspace):
    chosen = params("llama", {})
    do(chosen)
    download(chosen, "datasets/arithmetic")
    found = costs.trials(chosen, "base/tiny", "arithmetic", items=5, repeats=1)
    assert [trial.batch_size for trial in found] == [1, 2, 4]
    assert all(trial.seconds > 0 and trial.peak_bytes for trial in found)
    assert costs.trial_table(found).row_count == 3


def test_the_smallest_of_the_fast_is_proposed():
    found = [Trial(1, 9.0, 1), Trial(2, 5.2, 2), Trial(4, 5.1, 3), Trial(8, 5.0, 4), Trial(16, 5.3, 5)]
    assert costs.proposed(found).batch_size == 2
    assert costs.proposed([*found, Trial(32, 4.0, 6)]).batch_size == 32


@pytest.mark.parametrize(
    ("candidate", "suite", "told"),
    [("base/other", "news", "no 'base/other'"), ("base/tiny", "other", "no suite 'other'")],
)
def test_what_is_not_there_is_refused(candidate, suite, told, workspace):
    with pytest.raises(Refusal, match=told):
        costs.trials(params("llama", {}), candidate, suite, items=4)


def test_what_is_not_made_yet_is_named_with_its_command(workspace):
    with pytest.raises(Refusal, match=r"python -m stages.download base/tiny"):
        costs.costs(params("llama", {}), "base/tiny")
