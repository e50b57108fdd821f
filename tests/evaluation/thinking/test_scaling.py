"""Budget forcing against the same thing done slowly, one row at a time; and what is counted over draws."""

import itertools
import math
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lm_eval.api.instance import Instance
from pydantic import ValidationError

from stages.core.errors import Refusal
from stages.corpus.readings import READINGS, is_right, read_answer
from stages.evaluation.thinking import budget as forcing
from stages.evaluation.thinking.budget import BudgetLM
from stages.evaluation.thinking.scaling import majority, pass_at_k, repetition, self_bleu
from stages.evaluation.thinking.settings import Thinking
from tests import families
from tests.pipeline import do, download, params
from tests.test_benchmark import few_stock_tasks, mirrored  # noqa: F401
from tests.test_evaluate import changed, scored

PROMPTS = ["3 + 4 =", "What is it? A longer one.", "x"]
# Ends that a model with random weights says by luck: of one byte, so that some rows say it and some do not.
RULES = {"begin": "\n", "end": "e", "wait": "W", "answer": "A:", "temperature": 1.0, "budgets": (0, 3, 40)}


def thinker(family: str = "llama", batch_size: int = 3, **rules: object) -> BudgetLM:
    torch.manual_seed(0)
    return BudgetLM(
        Thinking(**{**RULES, **rules}),
        7,
        pretrained=families.model(family).float(),
        tokenizer=families.tokenizer(),
        batch_size=batch_size,
        device="cpu",
    )


def asked(lm: BudgetLM, prompts: list[str] = PROMPTS, until: str = "t", longest: int = 9) -> list[str]:
    requests = [
        Instance("generate_until", {}, (prompt, {"until": [until], "max_gen_toks": longest}), i)
        for i, prompt in enumerate(prompts)
    ]
    return lm.generate_until(requests, disable_tqdm=True)


def drawn(lm: BudgetLM, text: str, numbers: list[float], stop: str) -> list[int]:
    """Tokens after `text`, one forward of the whole a token, up to and with `stop` or the end of text."""
    ids, made = lm.tok_encode(text), []
    for number in numbers:
        with torch.no_grad():
            logits = lm.model(input_ids=torch.tensor([ids + made])).logits[0, -1].double()
        weights = torch.softmax(logits / lm.thinking.temperature, 0).tolist()
        token = next(i for i, total in enumerate(itertools.accumulate(weights)) if total > number)
        made.append(token)
        if token == lm.eot_token_id or stop in lm.tok_decode(made, skip_special_tokens=False):
            break
    return made


def forced(lm: BudgetLM, prompt: str, budget: int, longest: int, until: str) -> forcing.Reply:
    """s1's loop, a budget at a time: think, take the end away and wait, cut, answer."""
    rules, text, used, ended = lm.thinking, "", 0, False
    numbers = lm._numbers(prompt, "thinking", rules.budgets[-1]).tolist()
    for round in range(rules.waits + 1):
        if used >= budget:
            break
        text += rules.wait if round else ""
        made = drawn(lm, prompt + rules.begin + text, numbers[used:budget], rules.end)
        said = lm.tok_decode([t for t in made if t != lm.eot_token_id], skip_special_tokens=False)
        text, used = text + said.split(rules.end)[0], used + len(made)
        by_itself = rules.end in said or lm.eot_token_id in made
        ended = by_itself and round == rules.waits
    numbers = lm._numbers(prompt, "answer", longest).tolist()
    made = drawn(lm, prompt + rules.begin + text + rules.end + rules.answer, numbers, until)
    answer = lm.tok_decode([t for t in made if t != lm.eot_token_id]).split(until)[0]
    return forcing.Reply(text, used, ended, answer, len(made))


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "gemma3"])
@pytest.mark.parametrize("waits", [0, 2])
def test_forcing_a_budget_is_the_slow_loop(family, waits):
    lm = thinker(family, waits=waits)
    for draw, budget in itertools.product(range(3), lm.thinking.budgets):
        lm.draw, lm.budget = draw, budget
        answers = asked(lm)
        for prompt, answer in zip(PROMPTS, answers, strict=True):
            expected = forced(lm, prompt, lm.budget, 9, "t")
            assert lm.replies[prompt] == expected
            assert answer == expected.answer


def test_some_of_that_thinking_ended_and_some_was_cut():
    lm, seen = thinker(), set()
    for draw in range(6):
        lm.draw = draw
        asked(lm)
        seen |= {reply.ended for reply in lm.replies.values()}
    assert seen == {True, False}


def test_draws_depend_on_neither_the_batch_nor_the_order():
    answers = []
    for size, prompts in ((1, PROMPTS), (2, PROMPTS[::-1]), (3, PROMPTS)):
        lm = thinker(batch_size=size, waits=1)
        asked(lm, prompts)
        answers.append(lm.replies)
    assert answers[0] == answers[1] == answers[2]


def test_draws_differ_and_are_the_same_again():
    lm = thinker()
    replies = []
    for draw in (0, 1, 0):
        lm.draw = draw
        asked(lm)
        replies.append(lm.replies)
    assert replies[0] == replies[2]
    assert all(replies[0][prompt].thinking != replies[1][prompt].thinking for prompt in PROMPTS)


@settings(deadline=None, max_examples=20)
@given(budget=st.integers(0, 20), waits=st.integers(0, 3))
def test_a_budget_is_never_exceeded_and_a_smaller_one_is_its_beginning(budget, waits):
    lm = SHARED.setdefault(waits, thinker(waits=waits, budgets=(20,)))
    lm.budget = budget
    asked(lm)
    cut = lm.replies
    lm.budget = 20
    asked(lm)
    for prompt in PROMPTS:
        assert cut[prompt].thinking_tokens == min(budget, lm.replies[prompt].thinking_tokens)
        assert lm.replies[prompt].thinking.startswith(cut[prompt].thinking.rstrip("\ufffd"))
        assert lm.thinking.end not in cut[prompt].thinking


SHARED: dict[int, BudgetLM] = {}


def test_greedy_thinking_is_plain_greedy_generation():
    lm = thinker(temperature=0.0, budgets=(12,), end="\x00")
    asked(lm)
    for prompt in PROMPTS:
        ids = lm.tok_encode(prompt + "\n")
        made = lm.model.generate(torch.tensor([ids]), max_new_tokens=12, do_sample=False, pad_token_id=258)
        assert lm.replies[prompt].thinking == lm.tok_decode(made[0, len(ids) :], skip_special_tokens=False)


def test_what_outgrows_the_model_is_refused_before_any_thinking(monkeypatch):
    lm = thinker(budgets=(250,))
    monkeypatch.setattr(lm.model, "generate", lambda **_: pytest.fail("it generated"))
    with pytest.raises(
        Refusal, match=r"250 to be generated .* the 256 that the model reads; lower .*budgets"
    ):
        asked(lm)


@pytest.mark.parametrize(
    ("rules", "told"),
    [
        ({"budgets": (8, 4)}, "each budget once, the smallest first"),
        ({"budgets": (4, 4)}, "each budget once"),
        ({"budgets": (-1,)}, "greater than or equal to 0"),
        ({"draws": 2, "temperature": 0.0}, "2 draws at temperature 0 are alike"),
        ({"end": ""}, "at least 1 character"),
    ],
)
def test_rules_that_make_no_sense_are_refused(rules, told):
    with pytest.raises(ValidationError, match=told):
        Thinking(**{**RULES, **rules})


@given(st.lists(st.booleans(), min_size=1, max_size=8), st.data())
def test_pass_at_k_is_the_share_of_subsets_with_a_right_one(draws, data):
    k = data.draw(st.integers(1, len(draws)))
    subsets = list(itertools.combinations(draws, k))
    assert pass_at_k(len(draws), sum(draws), k) == pytest.approx(sum(map(any, subsets)) / len(subsets))


def test_pass_at_k_is_without_bias():
    p, n, k = 0.3, 6, 3
    expected = sum(math.comb(n, c) * p**c * (1 - p) ** (n - c) * pass_at_k(n, c, k) for c in range(n + 1))
    assert expected == pytest.approx(1 - (1 - p) ** k)


@pytest.mark.parametrize(
    ("votes", "right_ones", "expected"),
    [
        (["7", "8", "7"], [1, 0, 1], 1.0),
        (["7", "8", "8"], [1, 0, 0], 0.0),
        (["7", "8"], [1, 0], 0.5),
        (["", "", "7"], [0, 0, 1], 1.0),
        (["", ""], [0, 0], 0.0),
        (["1", "2", "3"], [0, 0, 1], 1 / 3),
    ],
)
def test_majorities(votes, right_ones, expected):
    assert majority(votes, right_ones) == pytest.approx(expected)


def test_repetition_is_the_share_of_runs_seen_before():
    assert repetition("a b c d") == 0
    assert repetition("a b c") == 0 == repetition("")
    assert repetition("a b c d a b c d") == pytest.approx(1 - 4 / 5)
    assert repetition("a " * 100) == pytest.approx(1 - 1 / 97)


def test_self_bleu_tells_alike_from_different():
    alike = "the cat sat on the mat and slept"
    assert self_bleu([alike] * 3) == pytest.approx(1)
    assert self_bleu([alike, "one two three four five", "six seven eight nine ten"]) < 0.1
    assert self_bleu(["", ""]) == 0


@pytest.mark.parametrize("reading", list(READINGS))
def test_a_right_answer_is_read_as_the_answer_and_nothing_is_never_right(reading):
    item = {"answer": {"number": "-12", "brackets": ")]"}.get(reading, "one"), "constraints": ["words 1"]}
    assert is_right(reading, f" {item['answer']} ", item)
    assert read_answer(reading, f" {item['answer']} ") == item["answer"]
    assert read_answer(reading, "  ") == "" and not is_right(reading, "  ", item)


def test_a_sweep_of_budgets_is_tidy(workspace):
    rules = {**RULES, "budgets": [0, 6], "draws": 2, "waits": 1}
    chosen = params("llama", {})
    graded = {"arithmetic": {"shots": 1, "batch_size": 3, "thinking": rules}}
    chosen = changed(chosen, suites={"perplexity": {}, "graded": graded, "benchmark": {}})
    do(chosen)
    download(chosen, "datasets/arithmetic")
    scores, samples = scored(chosen, "base/tiny", "arithmetic")

    whole = scores[scores.difficulty == "all"].set_index("metric")
    assert list(whole.index[:4]) == [f"{m} (budget 6)" for m in ("pass@1", "pass@2", "maj@2", "tokens")]
    assert {name.split(" (")[0] for name in whole.index[whole.budget == 6]} == {
        "pass@1", "pass@2", "maj@2", "tokens", "ended", "repetition", "self_bleu",
    }  # fmt: skip
    assert (scores.draws == 2).all() and (scores.temperature == 1).all() and set(scores.budget) == {0, 6}
    assert not scores.duplicated(["metric", "difficulty"]).any()
    for budget in (0, 6):
        draws = samples[samples.metric == f"draw (budget {budget})"]
        assert sorted(zip(draws.doc_id, draws.draw, strict=True)) == list(
            itertools.product(range(4), range(2))
        )
        assert (draws.thinking.str.len() > 0).any() == (budget > 0)
        by_item = draws.groupby("doc_id")
        for name, found in (
            ("tokens", by_item.generated_tokens.mean()),
            ("pass@1", by_item.score.mean()),
            ("pass@2", by_item.score.max()),
        ):
            rows = samples[samples.metric == f"{name} (budget {budget})"].set_index("doc_id")
            assert rows.score.to_dict() == pytest.approx(found.to_dict())
            assert whole.value[f"{name} (budget {budget})"] == pytest.approx(found.mean())
        assert draws.draw.notna().all()
    assert samples[~samples.metric.str.startswith("draw")].draw.isna().all()


def test_a_stock_task_may_be_thought_about(workspace, few_stock_tasks):  # noqa: F811
    chosen = mirrored(
        "gsm8k", {"shots": 1, "max_gen_toks": 8, "thinking": {**RULES, "budgets": [4], "draws": 2}}
    )
    scores, samples = scored(chosen, "base/tiny", "gsm8k")
    metrics = [f"{k} ({kept}, budget 4)" for k in ("pass@1", "pass@2", "maj@2") for kept in KEPT]
    assert set(metrics) < set(scores.metric)
    assert len(samples[samples.metric == metrics[0]]) == 3


KEPT = ("exact_match (strict-match)", "exact_match (flexible-extract)")


def test_a_task_of_choices_is_not_thought_about(workspace, few_stock_tasks):  # noqa: F811
    chosen = mirrored("arc_easy", {"thinking": {**RULES, "budgets": [4]}})
    with pytest.raises(Refusal, match=r"arc_easy is answered by likelihood, .* leave thinking out"):
        scored(chosen, "base/tiny", "arc-easy")


def said(monkeypatch, answers: list[str]) -> None:
    """Let a thinking model answer these, one a draw, to every item."""

    def answer(self: BudgetLM, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        self.replies = {
            request.args[0]: forcing.Reply("", 0, True, answers[self.draw], 3) for request in requests
        }
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
        ("hendrycks_math500", ["\\boxed{2}", "$3$", "$3$!", "$2$"], 0),  # it reads dollars only
        ("gsm8k", ["dunno", "no idea", "hm", "#### 2", "So #### 2."], 1),
    ],
)
def test_votes_are_on_what_the_task_compares(
    task,
    answers,
    expected,
    workspace,
    few_stock_tasks,  # noqa: F811
    monkeypatch,
):
    said(monkeypatch, answers)
    thinking = {"budgets": [0], "draws": len(answers), "temperature": 1.0}
    options = {"shots": 0, "limit": 1, "max_gen_toks": 8, "thinking": thinking}
    scores, _ = scored(mirrored(task, options), "base/tiny", task.replace("_", "-"))
    found = scores[scores.metric.str.startswith(f"maj@{len(answers)}")]
    assert len(found) and (found.value == expected).all()


@pytest.mark.parametrize(
    "answer", ["", "a, * b", "* one, two", "* one two", "* one\n* two, three", "one two three"]
)
def test_which_metrics_are_counted_does_not_depend_on_the_answers(
    answer,
    workspace,
    few_stock_tasks,  # noqa: F811
    monkeypatch,
):
    said(monkeypatch, [answer])
    options = {"limit": 1, "max_gen_toks": 8, "thinking": {"budgets": [0], "temperature": 0.0}}
    chosen = mirrored("ifeval", options)
    Path("data/datasets/ifeval/nltk_data/tokenizers/punkt_tab").mkdir(parents=True)
    scores, _ = scored(chosen, "base/tiny", "ifeval")
    counted = scores[scores.metric.str.startswith("pass@1")].metric.tolist()
    assert counted == [f"pass@1 (prompt_level_{kind}_acc, budget 0)" for kind in ("strict", "loose")]
    assert scores[scores.metric.isin(counted)].floor.notna().all()


def test_what_is_scored_by_degrees_is_not_counted(workspace, few_stock_tasks, monkeypatch):  # noqa: F811
    said(monkeypatch, [""])  # none of whose words is right
    chosen = mirrored("xsum_rouge", {"limit": 1, "thinking": {"budgets": [0], "temperature": 0.0}})
    with pytest.raises(Refusal, match="xsum_rouge has no metric that is right or wrong"):
        scored(chosen, "base/tiny", "xsum-rouge")
