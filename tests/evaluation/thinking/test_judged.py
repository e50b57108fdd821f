"""Which metrics count and what votes are on depends on the task alone, not on the answers."""

from pathlib import Path

import pytest
from lm_eval.api.instance import Instance

from stages.core.errors import Refusal
from stages.corpus.readings import READINGS, is_right, read_answer
from stages.evaluation.thinking.budget import BudgetLM, Reply
from tests.scoring import scored
from tests.stock import mirrored


@pytest.mark.parametrize("reading", list(READINGS))
def test_a_right_answer_is_read_as_the_answer_and_an_empty_one_is_no_vote(reading):
    item = {"answer": {"number": "-12", "brackets": ")]"}.get(reading, "one"), "constraints": ["words 1"]}
    assert is_right(reading, f" {item['answer']} ", item)
    assert read_answer(reading, f" {item['answer']} ") == item["answer"]
    assert read_answer(reading, "  ") == "" and not is_right(reading, "  ", item)


def answer_with(monkeypatch, answers: list[str]) -> None:
    """Let a thinking model give these answers, the same to every item of a draw."""

    def answer(self: BudgetLM, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        self.replies = {request.args[0]: Reply("", 0, True, answers[self.draw], 3) for request in requests}
        return [answers[self.draw]] * len(requests)

    monkeypatch.setattr(BudgetLM, "generate_until", answer)


@pytest.mark.parametrize(
    ("task", "answers", "expected"),
    [
        (
            "aime24",
            ["so \\boxed{2}", "\\boxed{3}", "it is \\boxed{2}.", "\\boxed{3}", "$1$: \\boxed{ 2 }"],
            1,
        ),
        ("amc23", ["\\boxed{3}", "\\boxed{3}!", "\\boxed{2.0}"], 0),
        ("hendrycks_math500", ["It is $2$.", "$3$", "so $ 2$"], 1),
        ("hendrycks_math500", ["\\boxed{2}", "$3$", "$3$!", "$2$"], 0),  # this task reads dollars only
        ("gsm8k", ["dunno", "no idea", "hm", "#### 2", "So #### 2."], 1),
    ],
)
def test_votes_are_on_what_the_task_compares(
    task, answers, expected, workspace, few_stock_tasks, monkeypatch
):
    answer_with(monkeypatch, answers)
    thinking = {"budgets": [0], "draws": len(answers), "temperature": 1.0}
    options = {"shots": 0, "limit": 1, "max_gen_toks": 8, "thinking": thinking}
    scores, _ = scored(mirrored(task, options), "base/tiny", task.replace("_", "-"))
    majorities = scores[scores.metric == f"maj@{len(answers)}"]
    assert len(majorities) and (majorities.value == expected).all()


@pytest.mark.parametrize(
    "answer", ["", "a, * b", "* one, two", "* one two", "* one\n* two, three", "one two three"]
)
def test_which_metrics_are_counted_does_not_depend_on_the_answers(
    answer, workspace, few_stock_tasks, monkeypatch
):
    answer_with(monkeypatch, [answer])
    options = {"limit": 1, "max_gen_toks": 8, "thinking": {"budgets": [0], "temperature": 0.0}}
    chosen = mirrored("ifeval", options)
    Path("data/datasets/ifeval/nltk_data/tokenizers/punkt_tab").mkdir(parents=True)
    scores, _ = scored(chosen, "base/tiny", "ifeval")
    counting = scores[scores.metric == "pass@1"]
    assert counting.counted.tolist() == ["prompt_level_strict_acc", "prompt_level_loose_acc"]
    assert counting.floor.notna().all()


def test_partial_scores_are_not_counted(workspace, few_stock_tasks, monkeypatch):
    answer_with(monkeypatch, [""])  # none of whose words is right
    chosen = mirrored("xsum_rouge", {"limit": 1, "thinking": {"budgets": [0], "temperature": 0.0}})
    with pytest.raises(Refusal, match="xsum_rouge has no metric that is right or wrong"):
        scored(chosen, "base/tiny", "xsum-rouge")
