"""The cost of a suite, counted before it runs, and the batch size proposed for it."""

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


def test_costs_count_requests_and_tokens(workspace, monkeypatch):
    chosen = params("llama", {})
    do(chosen)
    download(chosen, "datasets/arithmetic")
    with monkeypatch.context() as patched:
        patched.setattr(null, "for_readouts", lambda *_: pytest.fail("a cost needs no floors"))
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

    prompts = []

    def generate_until(self, requests, **_):
        prompts.extend(requests)
        return [""] * len(requests)

    monkeypatch.setattr(HFLM, "generate_until", generate_until)
    evaluate(chosen, "base/tiny/arithmetic")
    assert len(prompts) == 4
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
    draws = samples[samples.draw.notna()]
    assert (
        draws.generated_tokens.sum() - 4 * 2 * 3 == row["written"]
    )  # the budget of 3 reuses the thoughts of 20
    assert sum(read) == row["read"] if waits == 0 else sum(read) < row["read"]

    sizes = []
    generate_until = BudgetLM.generate_until

    def sized(self, *arguments, **options):
        sizes.append(self.batch_size)
        return generate_until(self, *arguments, **options)

    monkeypatch.setattr(BudgetLM, "generate_until", sized)
    trials = costs.trials(chosen, "base/tiny", "arithmetic", items=2, repeats=1)
    assert [trial.batch_size for trial in trials] == [1, 2] and sizes == [1, 1, 2, 2]


def test_batch_sizes_are_tried_up_to_the_number_of_items(workspace):
    chosen = params("llama", {})
    do(chosen)
    download(chosen, "datasets/arithmetic")
    trials = costs.trials(chosen, "base/tiny", "arithmetic", items=5, repeats=1)
    assert [trial.batch_size for trial in trials] == [1, 2, 4]
    assert all(trial.seconds > 0 and trial.peak_bytes for trial in trials)
    assert costs.trial_table(trials).row_count == 3


def test_the_smallest_fast_batch_is_proposed():
    trials = [Trial(1, 9.0, 1), Trial(2, 5.2, 2), Trial(4, 5.1, 3), Trial(8, 5.0, 4), Trial(16, 5.3, 5)]
    assert costs.proposed(trials).batch_size == 2
    assert costs.proposed([*trials, Trial(32, 4.0, 6)]).batch_size == 32


@pytest.mark.parametrize(
    ("candidate", "suite", "message"),
    [("base/other", "news", "no 'base/other'"), ("base/tiny", "other", "no suite 'other'")],
)
def test_an_unknown_candidate_or_suite_is_refused(candidate, suite, message, workspace):
    with pytest.raises(Refusal, match=message):
        costs.trials(params("llama", {}), candidate, suite, items=4)


def test_a_missing_artifact_is_named_with_its_command(workspace):
    with pytest.raises(Refusal, match=r"dvc repro model@tiny"):
        costs.costs(params("llama", {}), "base/tiny")
