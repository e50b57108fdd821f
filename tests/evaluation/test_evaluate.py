"""Scores against the same quantities written out slowly in torch."""

import json
import math
import re
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch

from stages.core import tables
from stages.core.errors import Refusal
from stages.job.load import validate
from stages.job.params import Params
from tests import families
from tests.pipeline import NONE, do, download, evaluate, load, params

PRUNED = {"source": "base/tiny", "method": "magnitude", "sparsity": 0.5, "scope": "row", "calibration": NONE}


def test_perplexity_is_the_slow_one(workspace):
    chosen = params("llama", {})
    do(chosen)
    scores, samples = scored(chosen, "base/tiny", "news")

    text = "\n\n".join(pd.read_parquet("data/datasets/news/evaluation.parquet")["text"])
    ids = families.tokenizer()(text, add_special_tokens=False).input_ids
    model, suite = load("base/tiny"), chosen.suites.perplexity["news"]
    length = suite.sequence_length
    losses = []
    for number in range(suite.windows):
        window = ids[number * length : (number + 1) * length]
        losses.append(-log_likelihood(model, window[:1], window[1:]) / (length - 1))

    row = scores.to_dict("records")[0]
    assert row["metric"] == "perplexity" and not row["higher_is_better"]
    assert row["value"] == pytest.approx(math.exp(sum(losses) / len(losses)), rel=1e-3)
    assert row["num_items"] == suite.windows == len(samples)
    assert samples["score"].tolist() == pytest.approx(losses, rel=2e-3)
    assert row["task_version"] == f"windows of {length}"
    assert row["candidate"] == "base/tiny" and row["suite"] == "news" and row["calibration"] == "none"


def test_windows_are_not_padded_so_the_batch_size_changes_rounding_alone(workspace):
    chosen = params("llama", {})
    do(chosen)
    values = []
    for batch_size in (1, 2, 3):
        suites = {"perplexity": {"news": {"windows": 3, "sequence_length": 32, "batch_size": batch_size}}}
        suites |= {"graded": {}, "benchmark": {}}
        scores, _ = scored(changed(chosen, suites=suites), "base/tiny", "news")
        assert set(scores["batch_size"]) == {batch_size}
        values.append(scores["value"].iloc[0])
    assert values == pytest.approx([values[0]] * 3, rel=2e-3)


def test_every_seed_that_params_take_can_be_evaluated_with(workspace):
    chosen = params("llama", {})
    do(chosen)
    download(chosen, "datasets/arithmetic")
    run = chosen.run.model_dump(mode="json") | {"seed": 2**63 - 1}
    scores, _ = scored(changed(chosen, run=run), "base/tiny", "arithmetic")
    assert set(scores["seed"]) == {2**63 - 1}


def test_more_windows_than_there_are_is_refused(workspace):
    chosen = params("llama", {})
    do(chosen)
    suites = {"perplexity": {"news": {"windows": 9999, "sequence_length": 32, "batch_size": 1}}}
    with pytest.raises(Refusal, match=r"suites\.perplexity\.news\.windows: 9999 asked for, .* ask for fewer"):
        scored(changed(chosen, suites=suites | {"graded": {}, "benchmark": {}}), "base/tiny", "news")


def test_windows_longer_than_the_model_reads_are_refused(workspace):
    chosen = params("llama", {})
    do(chosen)
    suites = {"perplexity": {"news": {"windows": 2, "sequence_length": 300, "batch_size": 1}}}
    with pytest.raises(Refusal, match=r"news\.sequence_length: 300 .* reads 256 tokens"):
        scored(changed(chosen, suites=suites | {"graded": {}, "benchmark": {}}), "base/tiny", "news")


@pytest.mark.parametrize("shots", [0, 1])
def test_graded_readouts_are_the_slow_ones(shots, workspace):
    chosen = params("llama", {})
    chosen = changed(
        chosen,
        suites={
            "perplexity": {},
            "graded": {"arithmetic": {"shots": shots, "batch_size": 3}},
            "benchmark": {},
        },
    )
    do(chosen)
    download(chosen, "datasets/arithmetic")
    scores, samples = scored(chosen, "base/tiny", "arithmetic")

    frames = {
        name: pd.read_parquet(f"data/datasets/arithmetic/{name}.parquet") for name in ("fewshot", "test")
    }
    before = "".join(f"{r.question} {r.answer}\n" for r in frames["fewshot"].head(shots).itertuples())
    model, tokenizer = load("base/tiny"), families.tokenizer()
    right = {"likelihood": [], "generation": []}
    for item in frames["test"].itertuples():
        context = tokenizer(before + item.question).input_ids
        likelihoods = [log_likelihood(model, context, tokenizer(f" {c}").input_ids) for c in item.choices]
        row = samples[(samples.readout == "likelihood") & (samples.doc_id == item.Index)].iloc[0]
        assert list(row.log_likelihoods) == pytest.approx(likelihoods, rel=1e-2)
        best = max(range(len(likelihoods)), key=likelihoods.__getitem__)
        assert row.response == str(best)
        right["likelihood"].append(best == item.gold)

        made = model.generate(torch.tensor([context]), max_new_tokens=12, do_sample=False, pad_token_id=258)[
            0, len(context) :
        ]
        answer = tokenizer.decode(made, skip_special_tokens=True).split("\n")[0]
        row = samples[(samples.readout == "generation") & (samples.doc_id == item.Index)].iloc[0]
        assert row.response == answer
        numbers = re.findall(r"-?\d+", answer)
        right["generation"].append(bool(numbers) and numbers[0] == item.answer)
        assert row.target == item.answer

    for readout in ("likelihood", "generation"):
        rows = scores[scores.readout == readout]
        assert rows.difficulty.tolist() == ["all", "add"]
        assert rows.value.tolist() == [sum(right[readout]) / len(right[readout])] * 2
        assert rows.shots.tolist() == [shots] * 2
        assert rows.num_items.tolist() == [4, 4]
        assert rows.template.tolist() == ["none"] * 2
        assert rows.floor.between(0.25 if readout == "likelihood" else 0, 1).all()
    asked = samples.groupby("doc_id").prompt_hash.nunique()
    assert (asked == 1).all()  # both readouts saw the same prompt


def test_an_answer_counts_by_its_first_number_alone(workspace, monkeypatch):
    from lm_eval.models.huggingface import HFLM

    said = iter([" 7\n", "", " none", " 70", "=> 7!", " -7", " 7 or 8", " 8 or 7"])
    monkeypatch.setattr(HFLM, "generate_until", lambda self, requests, **_: [next(said) for _ in requests])
    chosen = params("llama", {})
    do(chosen)
    folder = Path("data/datasets/arithmetic")
    download(chosen, "datasets/arithmetic")
    item = {
        "difficulty": "add",
        "question": "3 + 4 =",
        "answer": "7",
        "choices": ["7", "8", "6", "9"],
        "gold": 0,
    }
    pd.DataFrame([item | {"question": f"{'0' * i}3 + 4 ="} for i in range(8)]).to_parquet(
        folder / "test.parquet"
    )
    _, samples = scored(chosen, "base/tiny", "arithmetic")
    generated = samples[samples.readout == "generation"].sort_values("doc_id")
    assert generated.score.tolist() == [1, 0, 0, 0, 1, 0, 1, 0]


def test_a_chat_template_is_named_in_every_row(workspace):
    chosen = params("llama", {})
    graded = {"arithmetic": {"shots": 1, "batch_size": 2, "chat_template": True}}
    chosen = changed(chosen, suites={"perplexity": {}, "graded": graded, "benchmark": {}})
    do(chosen)
    download(chosen, "datasets/arithmetic")
    scores, samples = scored(chosen, "base/tiny", "arithmetic")
    assert scores.template.str.fullmatch("[0-9a-f]{64}").all()
    assert samples.prompt_hash.notna().all()


def test_a_row_says_what_the_candidate_is(workspace):
    chosen = params(
        "llama", {"prune/row-50": PRUNED, "noise/again": {"source": "prune/row-50", "batch_size": 1}}
    )
    do(chosen)
    for candidate in ("prune/row-50", "noise/again"):
        scores, _ = scored(chosen, candidate, "news")
        row = scores.to_dict("records")[0]
        assert row["prune_method"] == "magnitude" and row["sparsity"] == 0.5
        assert row["structure"] == "unstructured" and pd.isna(row["quantize_method"])
        assert row["batch_size"] == (1 if candidate == "noise/again" else 2)
        assert row["dtype"] == "bfloat16" and row["device"] == "cpu" and row["threads"] == 1
    assert row["lineage"] == "base/tiny > prune/row-50 > noise/again"


def test_noise_in_another_dtype_is_computed_in_it(workspace):
    recipes = {"noise/again": {"source": "base/tiny", "dtype": "float32"}}
    chosen = params("llama", recipes)
    do(chosen)
    values = {}
    for candidate, dtype in (("base/tiny", "bfloat16"), ("noise/again", "float32")):
        scores, _ = scored(chosen, candidate, "news")
        assert (scores["dtype"] == dtype).all()
        values[dtype] = scores["value"].iloc[0]
    in_float32 = changed(chosen, run=chosen.run.model_dump(mode="json") | {"dtype": "float32"}, noise={})
    scores, _ = scored(in_float32, "base/tiny", "news")
    assert scores["value"].iloc[0] == values["float32"] != values["bfloat16"]
