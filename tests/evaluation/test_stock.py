"""Stock tasks and groups of lm-eval on a local mirror in the hub's columns, and running programs."""

import itertools
import json
import math
import re
import sys
import time
from pathlib import Path
from typing import Any

import lm_eval.tasks
import nltk
import pandas as pd
import pytest

from stages.core.errors import Refusal
from stages.core.files import sha256
from stages.evaluation import programs as execution
from stages.evaluation import stock as benchmark
from stages.evaluation.tasks import rouge
from stages.job.params import Params
from tests.pipeline import do, download, params
from tests.test_evaluate import changed, scored

GENERATED = ("gsm8k", "hendrycks_math500", "aime24", "amc23", "xsum_rouge", "humaneval", "mbpp")


@pytest.mark.parametrize(
    ("task", "options", "metrics"),
    [
        (
            "gsm8k",
            {"shots": 2, "max_gen_toks": 8},
            ["exact_match (strict-match)", "exact_match (flexible-extract)"],
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
    for metric in metrics:
        rows = samples[samples.metric == metric]
        assert len(rows) == options.get("limit", 3)
        row = scores[scores.metric == metric].iloc[0]
        if row.higher_is_better:
            assert rows.score.mean() == pytest.approx(row.value)
            assert 0 <= row.floor <= 1
        else:
            assert math.isnan(row.floor)  # a perplexity is not chance's
    if task == "truthfulqa_mc2":  # the probability of what is true among all choices
        for row in samples.itertuples():
            weights = [math.exp(value) for value in row.log_likelihoods]
            assert row.score == pytest.approx(sum(weights[:2]) / sum(weights), rel=1e-4)


def test_answers_longer_than_what_the_model_reads_are_refused(workspace, few_stock_tasks):
    chosen = mirrored("aime24", {})
    told = r"aime24 asks for answers of up to 32768 .* reads 256, .*benchmark\.aime24\.max_gen_toks .* 128\."
    with pytest.raises(Refusal, match=told):
        scored(chosen, "base/tiny", "aime24")


QUESTIONS = [{"question": f"{i} and 1?", "answer": f"#### {i + 1}"} for i in range(3)]
CHOICES = {"id": "1", "question": "Which?", "choices": {"text": ["a", "b"], "label": ["A", "B"]}}


@pytest.mark.parametrize(
    ("task", "shots", "splits", "told"),
    [
        ("gsm8k", 0, {"test": [{"question": "a"}]}, r"gsm8k cannot .* columns are question: .*'answer'"),
        ("gsm8k", 0, {"test": [{"answer": "#### 2"}]}, r"gsm8k cannot .* columns are answer: .*'question'"),
        (
            "gsm8k", 1, {"test": QUESTIONS, "train": [{"question": "a"}] * 3},
            r"gsm8k cannot .* columns are question, answer: .*'answer'",
        ),
        (
            "gsm8k", 5, {"test": QUESTIONS, "train": QUESTIONS},
            r"train\.parquet has 3 examples .* takes 5; .* fewer",
        ),
        (
            "arc_easy", 0, {"test": [CHOICES | {"answerKey": "A"}, CHOICES | {"answerKey": "E"}]},
            r"arc_easy cannot .* 'E' is not in list",
        ),
        ("hellaswag", 0, {"validation": [{"ctx": "A man"}]}, r"hellaswag cannot .* columns are ctx: "),
    ],
)  # fmt: skip
def test_data_that_a_task_cannot_use_is_refused(task, shots, splits, told, workspace, few_stock_tasks):
    chosen = mirrored(task, {"shots": shots, "max_gen_toks": 8}, configs={ROWS[task][0]: splits})
    with pytest.raises(Refusal, match=told):
        scored(chosen, "base/tiny", task.replace("_", "-"))


def test_examples_of_the_scored_split_are_never_the_item_itself(workspace, few_stock_tasks):
    chosen = mirrored("aime24", {"shots": 3, "max_gen_toks": 8})
    with pytest.raises(Refusal, match=r"train\.parquet has 2 examples for an item of aime24, which takes 3"):
        scored(chosen, "base/tiny", "aime24")


@pytest.mark.parametrize(
    ("broken", "told"),
    [
        (
            lambda file: file.write_bytes(b"PAR1nonsense"),
            r"test\.parquet cannot be read as parquet: .* again",
        ),
        (lambda file: pd.read_parquet(file)[:0].to_parquet(file), r"test\.parquet has no item for gsm8k"),
    ],
)
def test_a_file_without_items_is_refused(broken, told, workspace, few_stock_tasks):
    chosen = mirrored("gsm8k", {"shots": 0})
    broken(Path("data/datasets/gsm8k/test.parquet"))
    with pytest.raises(Refusal, match=told):
        scored(chosen, "base/tiny", "gsm8k")


def test_what_nltk_would_fetch_is_refused(workspace, few_stock_tasks, monkeypatch):
    chosen = mirrored("ifeval", {"max_gen_toks": 8})
    for module in [name for name in sys.modules if name.startswith("lm_eval.tasks.ifeval")]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setattr(nltk.data, "path", [])
    with pytest.raises(Refusal, match=r"ifeval needs nltk's punkt_tab, .* set datasets\.ifeval\.nltk_data"):
        scored(chosen, "base/tiny", "ifeval")


def test_a_chat_template_that_fails_is_no_matter_of_the_data(workspace, few_stock_tasks, monkeypatch):
    from lm_eval.models.huggingface import HFLM

    def fails(*_, **__):
        raise ValueError("two turns of a user")

    monkeypatch.setattr(HFLM, "apply_chat_template", fails)
    chosen = mirrored("gsm8k", {"shots": 0, "max_gen_toks": 8, "chat_template": True})
    with pytest.raises(
        Refusal, match=r"chat template .* gsm8k: two turns of a user; .* chat_template: false"
    ):
        scored(chosen, "base/tiny", "gsm8k")


def test_a_missing_training_split_is_no_matter_without_examples(workspace, few_stock_tasks):
    chosen = mirrored("gsm8k", {"shots": 0, "max_gen_toks": 8}, without="train")
    scores, _ = scored(chosen, "base/tiny", "gsm8k")
    assert (scores.shots == 0).all()


def test_examples_are_never_taken_from_what_is_scored(workspace, few_stock_tasks):
    chosen = mirrored("gsm8k", {"max_gen_toks": 8}, without="train")
    with pytest.raises(
        Refusal, match=r"has the splits test; gsm8k takes its 5 examples from train; .* shots: 0"
    ):
        scored(chosen, "base/tiny", "gsm8k")


def test_a_missing_test_split_is_refused(workspace, few_stock_tasks):
    chosen = mirrored("gsm8k", {}, without="test")
    with pytest.raises(Refusal, match="has the splits train; gsm8k is scored on test"):
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
    suite = benchmark.BenchmarkSuite(task="mmlu", batch_size=1)
    found = dict(suite.stock())
    assert len(found) == 57
    assert found["mmlu_anatomy"]["dataset_name"] == "anatomy"


def test_a_tag_has_no_score_of_its_own(few_stock_tasks):
    suite = benchmark.BenchmarkSuite(task="ai2_arc", batch_size=1)
    with pytest.raises(Refusal, match=r"ai2_arc is a tag, .* arc_challenge, arc_easy"):
        list(suite.stock())


def test_shuffled_choices_are_asked_and_scored_in_one_order_that_the_seed_decides(workspace, few_stock_tasks):
    chosen = mirrored("gpqa_diamond_zeroshot", {})
    asked = []
    for seed in (0, 0, 1):
        run = chosen.run.model_dump(mode="json") | {"seed": seed}
        _, samples = scored(changed(chosen, run=run), "base/tiny", "gpqa-diamond-zeroshot")
        rows = samples[samples.metric == "acc"].sort_values("doc_id")
        asked.append(rows.prompt_hash.tolist())
        told = [f"({'ABCD'[int(response)]})" for response in rows.response]
        assert [float(a == b) for a, b in zip(told, rows.target, strict=True)] == rows.score.tolist()
        assert rows.target.nunique() > 1
    assert asked[0] == asked[1] != asked[2]


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


@pytest.mark.parametrize("task", ["humaneval", "mbpp"])
def test_programs_are_run_only_where_that_is_asked_for(task, workspace, few_stock_tasks):
    chosen = mirrored(task, {"max_gen_toks": 8})
    with pytest.raises(Refusal, match=f"{task} runs the programs .* allow_code_execution: true"):
        scored(chosen, "base/tiny", task)


def test_right_programs_pass(workspace, few_stock_tasks, monkeypatch):
    from lm_eval.models.huggingface import HFLM

    said = iter(["    return 1\n", "    return 2\n", "    while True: pass\n"])
    monkeypatch.setattr(HFLM, "generate_until", lambda self, requests, **_: [next(said) for _ in requests])
    monkeypatch.setattr(execution, "SECONDS", 1)
    chosen = mirrored("humaneval", {"max_gen_toks": 8, "allow_code_execution": True})
    scores, samples = scored(chosen, "base/tiny", "humaneval")
    assert samples.sort_values("doc_id").score.tolist() == [1, 0, 0]
    assert scores.value.item() == pytest.approx(1 / 3)
    assert scores.floor.item() == 0


@pytest.mark.parametrize(
    ("program", "passed"),
    [
        ("assert 1 + 1 == 2", True),
        ("assert 1 + 1 == 3", False),
        ("import os; assert not os.environ.get('HOME')", True),
        ("import os; assert not os.listdir('.')", True),
        ("b = bytearray(8 * 2**30)", False),
        ("x = 1\0", False),
        ("x = '\ud800'", False),
        ("x =", False),
        ("exit(3)", False),
        ("exit()\nassert False", False),
        ("import sys\nsys.exit(0)\nassert False", False),
        ("import os\nos._exit(0)", False),
        ("if __name__ == '__main__': raise ValueError", True),
        ("assert input() == 1", False),
        ("def f(n): return n and f(n - 1)\nassert f(9) == 0", True),
        (
            "from __future__ import annotations\n"
            "from dataclasses import dataclass\n@dataclass\nclass A: x: int",
            True,
        ),
        ("x = 1\n" * 10**5, True),
    ],
)
def test_a_program_passes_if_it_ends_well(program, passed):
    assert execution.passes(program) == passed


@pytest.mark.parametrize(("end", "passed"), [("", True), ("time.sleep(99)", False)])
def test_what_a_program_starts_ends_with_it(end, passed, tmp_path, monkeypatch):
    monkeypatch.setattr(execution, "SECONDS", 1)
    file = tmp_path / "child"
    program = f"""
import os, pathlib, time
if (child := os.fork()) == 0:
    time.sleep(99)
pathlib.Path({str(file)!r}).write_text(str(child))
{end}"""
    assert execution.passes(program) == passed
    stat = Path(f"/proc/{file.read_text()}/stat")
    for _ in range(50):
        if not stat.exists() or ") Z " in stat.read_text():
            return
        time.sleep(0.1)
    pytest.fail("it lives on")


@pytest.mark.parametrize("k", [1, 2, 5])
def test_pass_at_k_is_the_share_of_draws_with_a_right_one(k):
    passed = [True, False, False, True, False]
    draws = [any(draw) for draw in itertools.combinations(passed, k)]
    assert execution.pass_at(k, passed) == pytest.approx(sum(draws) / len(draws))


def test_no_script_is_fetched():
    import evaluate as library

    with execution.in_place_of_the_hub(), pytest.raises(Refusal, match="asks the hub for the script bleu"):
        library.load("bleu")


def test_rouge_counts_words_pairs_and_the_longest_sequence():
    # Lin (2004), section 3: S1 against S2 and S3; F-measures of 3 shared words in order, and of 2.
    reference = {"summary": "police killed the gunman"}
    close, far = (
        rouge.process_results(reference, [s]) for s in ("police kill the gunman", "the gunman kill police")
    )
    assert close["rougeL"] == 1  # stems: kill and killed are one
    assert far["rougeL"] == 0.5 and far["rouge1"] == 1
    assert far["rouge2"] == pytest.approx(1 / 3)
