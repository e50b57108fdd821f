"""Budget forcing against the same loop done slowly, one row at a time."""

import itertools
from functools import cache

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lm_eval.api.instance import Instance

from stages.core.errors import Refusal
from stages.evaluation.thinking.budget import BudgetLM, Reply
from stages.evaluation.thinking.settings import Thinking
from tests import families
from tests.thinking import RULES

pytestmark = pytest.mark.numerics
PROMPTS = ["3 + 4 =", "What is it? A longer one.", "x"]


def thinker(family: str = "llama", batch_size: int = 3, **rules: object) -> BudgetLM:
    torch.manual_seed(0)
    return BudgetLM(
        Thinking(
            **{key: tuple(value) if key == "budgets" else value for key, value in (RULES | rules).items()}
        ),
        7,
        pretrained=families.model(family).float(),
        tokenizer=families.tokenizer(),
        batch_size=batch_size,
        device="cpu",
    )


def ask(lm: BudgetLM, prompts: list[str] = PROMPTS, until: str = "t", longest: int = 9) -> list[str]:
    requests = [
        Instance("generate_until", {}, (prompt, {"until": [until], "max_gen_toks": longest}), i)
        for i, prompt in enumerate(prompts)
    ]
    return lm.generate_until(requests, disable_tqdm=True)


def drawn(lm: BudgetLM, text: str, numbers: list[float], stop: str) -> list[int]:
    """The tokens after `text`, each by a forward of the whole, up to and with `stop` or the end of text."""
    ids, tokens = lm.tok_encode(text), []
    for number in numbers:
        with torch.no_grad():
            logits = (
                lm.model(input_ids=torch.tensor([ids + tokens], device=lm.model.device))
                .logits[0, -1]
                .double()
                .cpu()
            )
        weights = torch.softmax(logits / lm.thinking.temperature, 0).tolist()
        token = next(i for i, total in enumerate(itertools.accumulate(weights)) if total > number)
        tokens.append(token)
        if token == lm.eot_token_id or stop in lm.tok_decode(tokens, skip_special_tokens=False):
            break
    return tokens


def forced(lm: BudgetLM, prompt: str, budget: int, longest: int, until: str) -> Reply:
    """The loop of s1 for one budget: think, replace the end by a wait, cut, answer."""
    rules, text, used, ended = lm.thinking, "", 0, False
    numbers = lm.numbers_of(prompt, "thinking", rules.budgets[-1]).tolist()
    for round in range(rules.waits + 1):
        if used >= budget:
            break
        text += rules.wait if round else ""
        tokens = drawn(lm, prompt + rules.begin + text, numbers[used:budget], rules.end)
        stretch = lm.tok_decode([t for t in tokens if t != lm.eot_token_id], skip_special_tokens=False)
        text, used = text + stretch.split(rules.end)[0], used + len(tokens)
        by_itself = rules.end in stretch or lm.eot_token_id in tokens
        ended = by_itself and round == rules.waits
    numbers = lm.numbers_of(prompt, "answer", longest).tolist()
    request = "" if ended and rules.answer_when == "cut" else rules.answer  # RULES' answer has no whole line
    tokens = drawn(lm, prompt + rules.begin + text + rules.end + request, numbers, until)
    answer = lm.tok_decode([t for t in tokens if t != lm.eot_token_id]).split(until)[0]
    return Reply(text, used, ended, answer, len(tokens))


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "gemma3"])
@pytest.mark.parametrize("waits", [0, 2])
def test_forcing_a_budget_is_the_slow_loop(family, waits):
    lm = thinker(family, waits=waits)
    for draw, budget in itertools.product(range(3), lm.thinking.budgets):
        lm.draw, lm.budget = draw, budget
        answers = ask(lm)
        for prompt, answer in zip(PROMPTS, answers, strict=True):
            expected = forced(lm, prompt, lm.budget, 9, "t")
            assert lm.replies[prompt] == expected
            assert answer == expected.answer


@pytest.mark.parametrize(
    ("family", "reuses"),
    [("llama", True), ("gpt2", True), ("opt", True), ("gemma3", False), ("mamba", False)],
)
def test_shots_are_read_once_and_change_nothing(family, reuses, monkeypatch):
    """gemma3's window of 16 tokens has no room for padding after the shots, mamba keeps a state."""
    lm, shots = thinker(family, waits=1, budgets=[3, 12]), "1 + 2 = 3\n2 + 2 = 4\n"
    prompts, after, budgets = [shots + prompt for prompt in PROMPTS], lm._after_prefix, lm.thinking.budgets
    reused: list[tuple[torch.Tensor, dict[str, object]]] = []
    monkeypatch.setattr(lm, "_after_prefix", lambda *rows: reused.append(after(*rows)) or reused[-1])
    for lm.draw, lm.budget in itertools.product(range(2), budgets):
        ask(lm, prompts)
        for prompt in prompts:
            assert lm.replies[prompt] == forced(lm, prompt, lm.budget, 9, "t")
    shared = ["past_key_values" in options for rows, options in reused if len(rows) > 1 or not reuses]
    assert len(shared) >= 6 and set(shared) == {reuses}


def test_some_of_this_thinking_ends_and_some_is_cut():
    lm, seen = thinker(), set()
    for draw in range(6):
        lm.draw = draw
        ask(lm)
        seen |= {reply.ended for reply in lm.replies.values()}
    assert seen == {True, False}


def test_draws_depend_on_neither_the_batch_nor_the_order():
    answers = []
    for size, prompts in ((1, PROMPTS), (2, PROMPTS[::-1]), (3, PROMPTS)):
        lm = thinker(batch_size=size, waits=1)
        ask(lm, prompts)
        answers.append(lm.replies)
    assert answers[0] == answers[1] == answers[2]


def test_draws_differ_and_are_the_same_again():
    lm = thinker()
    replies = []
    for draw in (0, 1, 0):
        lm.draw = draw
        ask(lm)
        replies.append(lm.replies)
    assert replies[0] == replies[2]
    assert all(replies[0][prompt].thinking != replies[1][prompt].thinking for prompt in PROMPTS)


@cache
def waiting(waits: int) -> BudgetLM:
    return thinker(waits=waits, budgets=(20,))


@settings(deadline=None, max_examples=20)
@given(budget=st.integers(0, 20), waits=st.integers(0, 3))
def test_a_budget_is_never_exceeded_and_a_smaller_one_is_its_beginning(budget, waits):
    lm = waiting(waits)
    lm.budget = budget
    ask(lm)
    cut = lm.replies
    lm.budget = 20
    ask(lm)
    for prompt in PROMPTS:
        assert cut[prompt].thinking_tokens == min(budget, lm.replies[prompt].thinking_tokens)
        assert lm.replies[prompt].thinking.startswith(cut[prompt].thinking.rstrip("\ufffd"))
        assert lm.thinking.end not in cut[prompt].thinking


def test_greedy_thinking_is_plain_greedy_generation():
    lm = thinker(temperature=0.0, budgets=(12,), end="\x00")
    ask(lm)
    for prompt in PROMPTS:
        ids = lm.tok_encode(prompt + "\n")
        out = lm.model.generate(torch.tensor([ids]), max_new_tokens=12, do_sample=False, pad_token_id=258)
        assert lm.replies[prompt].thinking == lm.tok_decode(out[0, len(ids) :], skip_special_tokens=False)


def test_a_budget_beyond_the_model_is_refused_before_any_thinking(monkeypatch):
    lm = thinker(budgets=(250,))
    monkeypatch.setattr(lm.model, "generate", lambda **_: pytest.fail("it generated"))
    with pytest.raises(
        Refusal, match=r"250 to be generated .* the 256 that the model reads; lower .*budgets"
    ):
        ask(lm)


@pytest.mark.parametrize("waits", [0, 2])
@pytest.mark.parametrize("budgets", [[0], [0, 4, 9]])
def test_one_bar_counts_all_draws_and_budgets(budgets, waits):
    lm = thinker(budgets=budgets, waits=waits, draws=2)
    shares = []
    with lm.watched(len(PROMPTS)):
        for lm.draw in range(2):
            for lm.budget in budgets:
                ask(lm)
                shares.append(lm.bar.n / lm.bar.total)
    assert shares == sorted(set(shares)) and shares[0] < 1 and shares[-1] == 1
