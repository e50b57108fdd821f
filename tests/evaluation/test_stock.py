"""Stock tasks and groups of lm-eval on a local mirror with the columns of the hub's data sets."""

import math
import re
from pathlib import Path
from typing import Any

import pytest

from stages.core.errors import Refusal
from stages.evaluation.stock import BenchmarkSuite
from tests.scoring import changed, scored
from tests.stock import ROWS, mirrored

GENERATED = ("gsm8k", "hendrycks_math500", "aime24", "amc23", "xsum_rouge", "humaneval", "mbpp")


@pytest.mark.parametrize(
    ("task", "options", "metrics"),
    [
        (
            "gsm8k",
            {"shots": 2, "max_gen_toks": 8},
            ["exact_match", "exact_match"],
        ),
        ("arc_easy", {}, ["acc", "acc_norm"]),
        ("winogrande", {"limit": 2}, ["acc"]),
        ("truthfulqa_mc2", {}, ["acc"]),
        ("arc_challenge", {}, ["acc", "acc_norm"]),
        ("hellaswag", {}, ["acc", "acc_norm"]),
        ("piqa", {}, ["acc", "acc_norm"]),
        ("boolq", {}, ["acc"]),
        ("lambada_openai", {}, ["perplexity", "acc"]),
        ("wikitext", {}, ["word_perplexity", "byte_perplexity", "bits_per_byte"]),
        ("wikitext_lines", {}, ["word_perplexity", "byte_perplexity", "bits_per_byte"]),
        ("hendrycks_math500", {"max_gen_toks": 8}, ["exact_match"]),
        ("aime24", {"max_gen_toks": 8}, ["exact_match"]),
        ("amc23", {"max_gen_toks": 8}, ["exact_match"]),
        ("gpqa_diamond_zeroshot", {"limit": 2}, ["acc", "acc_norm"]),
        ("xsum_rouge", {"max_gen_toks": 8}, ["rouge1", "rouge2", "rougeL"]),
        ("humaneval", {"max_gen_toks": 8, "allow_code_execution": True}, ["pass@1"]),
        ("mbpp", {"max_gen_toks": 8, "allow_code_execution": True}, ["pass_at_1"]),
    ],
)
def test_stock_tasks_on_a_mirror(task, options, metrics, workspace, few_stock_tasks):
    chosen = mirrored(task, options)
    scores, samples = scored(chosen, "base/tiny", task.replace("_", "-"))
    assert scores.metric.tolist() == metrics
    assert (scores.num_items == options.get("limit", 3)).all()
    assert (scores.readout == ("generation" if task in GENERATED else "likelihood")).all()
    assert (scores.shots == options.get("shots", 3 if task == "mbpp" else 0)).all()
    assert (scores.dataset_source == "path:mirror").all()
    assert scores.task_version.notna().all()
    filters = {"gsm8k": ["strict-match", "flexible-extract"]}.get(task, [])
    assert scores["filter"].dropna().tolist() == filters and scores.counted.isna().all()
    for row in scores.itertuples():
        rows = samples[(samples.metric == row.metric) & samples["filter"].isin([row.filter])]
        assert len(rows) == options.get("limit", 3)
        if row.higher_is_better:
            assert rows.score.mean() == pytest.approx(row.value)
            assert 0 <= row.floor <= 1
        else:
            assert math.isnan(row.floor)  # a perplexity has no floor
    if task == "truthfulqa_mc2":  # the probability of what is true among all choices
        for row in samples.itertuples():
            weights = [math.exp(value) for value in row.log_likelihoods]
            assert row.score == pytest.approx(sum(weights[:2]) / sum(weights), rel=1e-4)


def test_answers_longer_than_what_the_model_reads_are_refused(workspace, few_stock_tasks):
    chosen = mirrored("aime24", {})
    message = (
        r"aime24 asks for answers of up to 32768 .* reads 256, .*benchmark\.aime24\.max_gen_toks .* 128\."
    )
    with pytest.raises(Refusal, match=message):
        scored(chosen, "base/tiny", "aime24")


def test_a_length_of_answers_is_refused_for_a_task_without_answers(workspace, few_stock_tasks):
    with pytest.raises(Refusal, match=r"arc-easy sets max_gen_toks, but arc_easy is answered by likelihood"):
        scored(mirrored("arc_easy", {"max_gen_toks": 8}), "base/tiny", "arc-easy")


def test_a_failing_chat_template_is_not_blamed_on_the_data(workspace, few_stock_tasks, monkeypatch):
    from lm_eval.models.huggingface import HFLM

    def fails(*_, **__):
        raise ValueError("two turns of a user")

    monkeypatch.setattr(HFLM, "apply_chat_template", fails)
    chosen = mirrored("gsm8k", {"shots": 0, "max_gen_toks": 8, "chat_template": True})
    with pytest.raises(
        Refusal, match=r"chat template .* gsm8k: two turns of a user; .* chat_template: false"
    ):
        scored(chosen, "base/tiny", "gsm8k")


def test_a_training_split_may_be_missing_without_examples(workspace, few_stock_tasks):
    chosen = mirrored("gsm8k", {"shots": 0, "max_gen_toks": 8}, without="train")
    scores, _ = scored(chosen, "base/tiny", "gsm8k")
    assert (scores.shots == 0).all()


def test_examples_are_never_taken_from_scored_items(workspace, few_stock_tasks):
    chosen = mirrored("gsm8k", {"max_gen_toks": 8}, without="train")
    with pytest.raises(
        Refusal, match=r"has the splits test, but gsm8k takes its 5 examples from train; .* shots: 0"
    ):
        scored(chosen, "base/tiny", "gsm8k")


def test_a_missing_test_split_is_refused(workspace, few_stock_tasks):
    chosen = mirrored("gsm8k", {}, without="test")
    with pytest.raises(Refusal, match="has the splits train, but gsm8k is scored on test"):
        scored(chosen, "base/tiny", "gsm8k")


def test_an_unknown_task_is_refused(workspace, few_stock_tasks):
    chosen = mirrored("gsm8k", {})
    suites = {"perplexity": {}, "graded": {}, "benchmark": {"gsm8k": {"task": "gsm9k", "batch_size": 1}}}
    with pytest.raises(Refusal, match="lm-eval has no task 'gsm9k'"):
        scored(changed(chosen, suites=suites), "base/tiny", "gsm8k")


def test_a_group_is_scored_by_its_tasks_and_as_a_whole(workspace, few_stock_tasks):
    sizes = {"murder_mysteries": 3, "object_placements": 2, "team_allocation": 4}
    splits = {
        split: [
            {
                "narrative": f"Case {i} of {split}.", "question": "Who?", "choices": "['Ann', 'Bob']",
                "answer_index": i % 2, "answer_choice": ["Ann", "Bob"][i % 2],
            }
            for i in range(size)
        ]
        for split, size in sizes.items()
    }  # fmt: skip
    chosen = mirrored("leaderboard_musr", {}, configs={"default": splits})
    scores, samples = scored(chosen, "base/tiny", "leaderboard-musr")
    assert scores.metric.tolist() == ["acc_norm"] * 4
    by_part = scores.set_index("difficulty").value
    assert list(by_part.index) == ["all", *(f"leaderboard_musr_{split}" for split in sizes)]
    right = samples.groupby("difficulty").score.mean()
    assert by_part.drop("all").to_dict() == pytest.approx(right.to_dict())
    assert by_part["all"] == pytest.approx(samples.score.mean())  # lm-eval weights this group by size
    assert sorted(samples.doc_id) == list(range(sum(sizes.values())))


def test_a_task_reads_the_config_of_its_own_name(workspace, few_stock_tasks):
    def of(subject: str, answer: int) -> dict[str, list[dict[str, Any]]]:
        row = {
            "question": f"{subject}?",
            "subject": subject,
            "choices": ["a", "b", "c", "d"],
            "answer": answer,
        }
        return {"test": [row] * 2, "dev": [row] * 5}

    chosen = mirrored(
        "mmlu_anatomy", {"shots": 1}, configs={"anatomy": of("anatomy", 2), "virology": of("virology", 1)}
    )
    files = Path("data/datasets/mmlu-anatomy")
    assert {str(f.relative_to(files)) for f in files.rglob("*.parquet")} == {
        f"{config}/{split}.parquet" for config in ("anatomy", "virology") for split in ("test", "dev")
    }
    _, samples = scored(chosen, "base/tiny", "mmlu-anatomy")
    assert samples.target.tolist() == ["2", "2"]


def test_mmlu_is_its_57_subjects(few_stock_tasks):
    suite = BenchmarkSuite(task="mmlu", batch_size=1)
    tasks = dict(suite.stock())
    assert len(tasks) == 57
    assert tasks["mmlu_anatomy"]["dataset_name"] == "anatomy"


def test_a_tag_has_no_score_of_its_own(few_stock_tasks):
    suite = BenchmarkSuite(task="ai2_arc", batch_size=1)
    with pytest.raises(Refusal, match=r"ai2_arc is a tag, .* arc_challenge, arc_easy"):
        list(suite.stock())


def test_shuffled_choices_have_the_same_order_in_prompts_and_scores(workspace, few_stock_tasks):
    chosen = mirrored("gpqa_diamond_zeroshot", {})
    prompts = []
    for seed in (0, 0, 1):
        run = chosen.run.model_dump(mode="json") | {"seed": seed}
        _, samples = scored(changed(chosen, run=run), "base/tiny", "gpqa-diamond-zeroshot")
        rows = samples[samples.metric == "acc"].sort_values("doc_id")
        prompts.append(rows.prompt_hash.tolist())
        chosen_letters = [f"({'ABCD'[int(response)]})" for response in rows.response]
        right = [float(a == b) for a, b in zip(chosen_letters, rows.target, strict=True)]
        assert right == rows.score.tolist()
        assert rows.target.nunique() > 1
    assert prompts[0] == prompts[1] != prompts[2]


def test_whole_texts_are_scored_in_words_and_bytes(workspace, few_stock_tasks):
    scores, samples = scored(mirrored("wikitext", {}), "base/tiny", "wikitext")
    pages = [row["page"] for row in ROWS["wikitext"][1]["test"]]
    nats = -samples[samples.metric == "bits_per_byte"].log_likelihoods.str[0].sum()
    values = scores.set_index("metric").value
    size, words = (
        sum(len(page.encode()) for page in pages),
        sum(len(re.split(r"\s+", page)) for page in pages),
    )
    assert values["bits_per_byte"] == pytest.approx(nats / size / math.log(2))
    assert values["byte_perplexity"] == pytest.approx(math.exp(nats / size))
    assert values["word_perplexity"] == pytest.approx(math.exp(nats / words))
    assert scores["bos"].all()  # lm-eval reads BOS before a whole text


@pytest.mark.parametrize("task", ["humaneval", "mbpp"])
def test_programs_are_run_only_on_request(task, workspace, few_stock_tasks):
    chosen = mirrored(task, {"max_gen_toks": 8})
    with pytest.raises(Refusal, match=f"{task} runs the programs .* allow_code_execution: true"):
        scored(chosen, "base/tiny", task)
