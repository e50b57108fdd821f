"""Shared computation against lm-eval's own HFLM, in float32, over every family."""

import copy
import random

import pytest
import torch
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.models.huggingface import HFLM
from transformers import AutoModelForCausalLM

from stages.core.errors import Refusal
from stages.evaluation import shared
from tests import begins, families, generators
from tests.scoring import log_likelihood

pytestmark = [pytest.mark.numerics, pytest.mark.device]
FEWSHOT = "2 + 3 = 5\n7 - 1 = 6\n"
QUESTIONS = ["4 + 4 =", "10 + 21 =", "3 - 1 =", "100 - 99 ="]
CHOICES = [" 8", " 9", " 31", " 2", " 128"]


def both(family: str, batch_size: int) -> tuple[HFLM, shared.SharedPrefixLM]:
    options = {"tokenizer": families.tokenizer(), "batch_size": batch_size, "softmax_dtype": "float32"}
    model = families.model(family).float()
    return tuple(kind(pretrained=model, **options) for kind in (HFLM, shared.SharedPrefixLM))


def likelihoods(pairs: list[tuple[str, str]]) -> list[Instance]:
    return [Instance("loglikelihood", {}, pair, i) for i, pair in enumerate(pairs)]


def generations(prompts: list[str], until: list[str], tokens: int = 9) -> list[Instance]:
    options = {"until": until, "do_sample": False, "max_gen_toks": tokens}
    return [Instance("generate_until", {}, (prompt, options), i) for i, prompt in enumerate(prompts)]


def spy(monkeypatch: pytest.MonkeyPatch, lm: HFLM) -> list[tuple[int, int]]:
    """The shapes of all inputs of the model from now on."""
    seen: list[tuple[int, int]] = []
    before = lm.model.forward

    def forward(*args, **options):
        seen.append(tuple((args[0] if args else options["input_ids"]).shape))
        return before(*args, **options)

    monkeypatch.setattr(lm.model, "forward", forward)
    return seen


@pytest.mark.parametrize("batch_size", [1, 3, 64])
@pytest.mark.parametrize("family", families.CONFIGS)
def test_likelihoods_are_lm_evals(family, batch_size):
    plain, sharing = both(family, batch_size)
    for before in (FEWSHOT, ""):
        requests = likelihoods([(before + question, choice) for question in QUESTIONS for choice in CHOICES])
        ours, theirs = (lm.loglikelihood(requests, disable_tqdm=True) for lm in (sharing, plain))
        assert [total for total, _ in ours] == pytest.approx([total for total, _ in theirs], abs=1e-3)
        assert [greedy for _, greedy in ours] == [greedy for _, greedy in theirs]


@pytest.mark.parametrize("batch_size", [1, 3, 64])
@pytest.mark.parametrize("family", families.CONFIGS)
def test_generations_are_lm_evals(family, batch_size):
    plain, sharing = both(family, batch_size)
    for before in ("5\n", FEWSHOT):  # gemma3's window is 16 tokens
        requests = generations([before + question for question in QUESTIONS], until=["\n"])
        assert sharing.generate_until(requests, disable_tqdm=True) == plain.generate_until(
            requests, disable_tqdm=True
        )


def test_a_whole_text_is_read_after_one_bos():
    """lm-eval puts BOS first; a tokenizer that does so too would have BOS predicted."""
    model, request = families.model("llama").float(), Instance("loglikelihood_rolling", {}, ("4 + 4",), 0)
    values = [
        shared.SharedPrefixLM(
            pretrained=model, tokenizer=begins.tokenizer(kind), batch_size=2
        ).loglikelihood_rolling([request], disable_tqdm=True)[0]
        for kind in ("none", "bos")
    ]
    expected = log_likelihood(model, [begins.BOS], families.tokenizer()("4 + 4").input_ids)
    assert values == pytest.approx([expected, expected], abs=1e-3)


@pytest.mark.parametrize(("closing", "plain"), [("both ends", "bos"), ("end only", "none")])
def test_no_prompt_ends_with_the_end_of_text_that_a_tokenizer_appends(closing, plain):
    model = generators.model("llama")
    pairs = [("4 + 4 =", " 8"), ("4 + 4 =", " 128"), ("100 - 99 =", " 1")]
    results = []
    for kind in (closing, plain):
        lm = shared.SharedPrefixLM(
            pretrained=model, tokenizer=begins.tokenizer(kind), batch_size=2, softmax_dtype="float32"
        )
        answers = lm.generate_until(generations(QUESTIONS, until=[]), disable_tqdm=True)
        results.append((lm.loglikelihood(likelihoods(pairs), disable_tqdm=True), answers))
        text = Instance("loglikelihood_rolling", {}, ("4 + 4",), 0)
        results[-1] += (lm.loglikelihood_rolling([text], disable_tqdm=True),)
    assert results[0] == results[1]
    context = begins.tokenizer(plain)("100 - 99 =").input_ids
    expected = log_likelihood(model, context, families.tokenizer()(" 1").input_ids)
    assert results[0][0][2][0] == pytest.approx(expected, abs=1e-3)


@pytest.mark.parametrize("kind", begins.KINDS)
@pytest.mark.parametrize("adds", [None, True, False])
def test_texts_encoded_together_are_those_encoded_alone(kind, adds, monkeypatch):
    """Contexts with trailing blanks, of blanks alone, empty, with BOS; a few requests at a time."""
    monkeypatch.setattr(shared, "_ENCODED", 3)
    options = {"tokenizer": begins.tokenizer(kind), "add_bos_token": adds, "batch_size": 2}
    lm = shared.SharedPrefixLM(pretrained=families.wide("llama"), **options)
    contexts = ("1 + 1 =", "1 + 1 = ", "<bos>1 + 1 =", " ", "", "2 + 2 =")
    requests = likelihoods([(context, choice) for context in contexts for choice in (" 2", " 4", "5")])
    sent: list[list[object]] = []

    def keep(asked, **_):
        sent.append(asked)
        return [(0.0, True)] * len(asked)

    monkeypatch.setattr(lm, "_loglikelihood_tokens", keep)
    lm.loglikelihood(requests, disable_tqdm=True)
    TemplateLM.loglikelihood(lm, requests, disable_tqdm=True)
    assert len(sent) == 2 and sent[0] == sent[1]
    monkeypatch.setattr(lm.tokenizer, "encode", None)  # no text is encoded alone
    lm.loglikelihood(requests[:6], disable_tqdm=True)


@pytest.mark.parametrize("family", ["gpt2", "opt"])
def test_prompts_longer_than_the_models_positions_share_nothing(family):
    config = copy.deepcopy(families.CONFIGS[family])
    config.max_position_embeddings = 32
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    options = {"tokenizer": families.tokenizer(), "batch_size": 4, "softmax_dtype": "float32"}
    plain, sharing = (kind(pretrained=model, **options) for kind in (HFLM, shared.SharedPrefixLM))
    for before in ("x" * 60, "x" * 30, "x" * 10):
        requests = generations([before + question for question in QUESTIONS], until=["\n"])
        assert sharing.generate_until(requests, disable_tqdm=True) == plain.generate_until(
            requests, disable_tqdm=True
        )
        requests = likelihoods([(before + question, choice) for question in QUESTIONS for choice in CHOICES])
        ours, theirs = (lm.loglikelihood(requests, disable_tqdm=True) for lm in (sharing, plain))
        assert [total for total, _ in ours] == pytest.approx([total for total, _ in theirs], abs=1e-3)


def test_prompts_with_tokens_that_the_embedding_lacks_are_refused():
    model = copy.deepcopy(families.model("llama"))
    model.resize_token_embeddings(200)  # a space lies above
    lm = shared.SharedPrefixLM(pretrained=model, tokenizer=families.tokenizer(), batch_size=2)
    assert lm.loglikelihood(likelihoods([("4+4=", "8")]), disable_tqdm=True)
    for refused in (
        lambda: lm.loglikelihood(likelihoods([("4+4=", "8"), ("4+4=", " 8")]), disable_tqdm=True),
        lambda: lm.loglikelihood_rolling(
            [Instance("loglikelihood_rolling", {}, ("4 + 4",), 0)], disable_tqdm=True
        ),
        lambda: lm.generate_until(generations(["4 + 4 ="], until=[]), disable_tqdm=True),
    ):
        with pytest.raises(Refusal, match="the model's embedding has 200 rows"):
            refused()


def test_greedy_tokens_are_flagged_and_long_choices_scored_whole():
    plain, sharing = both("llama", 4)
    greedy_text = plain.generate_until(
        generations([FEWSHOT + QUESTIONS[0]], until=[], tokens=3), disable_tqdm=True
    )
    requests = likelihoods([(FEWSHOT + QUESTIONS[0], text) for text in (*greedy_text, " 8", " 1234567")])
    ours = sharing.loglikelihood(requests, disable_tqdm=True)
    assert [greedy for _, greedy in ours][1:] == [False, False]
    theirs = plain.loglikelihood(requests, disable_tqdm=True)
    assert ours == [(pytest.approx(total, abs=1e-3), greedy) for total, greedy in theirs]


def test_requests_of_any_shape_are_lm_evals():
    """Drawn contexts and continuations: empty ones, equal ones, ones that begin another, ones too long."""
    plain, sharing = both("llama", 4)
    draw = random.Random(0)
    for _ in range(12):
        before = draw.choice(["", "abcd", FEWSHOT])
        contexts = [before + "x" * draw.choice([0, 1, 2, 40, 300]) for _ in range(4)]
        requests = likelihoods(
            [
                (c, draw.choice(["y", "yz", "zzz", "y" * 20]))
                for c in contexts
                for _ in range(draw.randint(1, 3))
            ]
        )
        ours, theirs = (lm.loglikelihood(requests, disable_tqdm=True) for lm in (sharing, plain))
        assert [total for total, _ in ours] == pytest.approx([total for total, _ in theirs], abs=2e-3)


def test_examples_are_read_once_and_questions_once_for_all_choices(monkeypatch):
    _, sharing = both("llama", 20)
    requests = likelihoods([(FEWSHOT + question, choice) for question in QUESTIONS for choice in CHOICES])
    seen = spy(monkeypatch, sharing)
    sharing.loglikelihood(requests, disable_tqdm=True)
    assert seen[0] == (1, len(FEWSHOT))
    assert seen[1] == (4, min(map(len, QUESTIONS)) - 1)
    rows = sum(len({choice[:-1] for choice in CHOICES}) for _ in QUESTIONS)
    longest = max(map(len, QUESTIONS)) - (min(map(len, QUESTIONS)) - 1) + max(map(len, CHOICES)) - 1
    assert seen[2:] == [(rows, longest)]

    seen.clear()
    sharing.generate_until(generations([FEWSHOT + q for q in QUESTIONS], until=["\n"]), disable_tqdm=True)
    assert seen[0] == (1, len(FEWSHOT)) and seen[1] == (4, max(map(len, QUESTIONS)))
    assert all(shape == (4, 1) for shape in seen[2:])


def test_a_forward_has_no_more_rows_than_the_batch_size(monkeypatch):
    _, sharing = both("llama", 3)
    requests = likelihoods([(FEWSHOT + question, choice) for question in QUESTIONS for choice in CHOICES])
    seen = spy(monkeypatch, sharing)
    sharing.loglikelihood(requests, disable_tqdm=True)
    assert max(rows for rows, _ in seen) == 3


def test_perplexity_windows_share_nothing(monkeypatch):
    plain, sharing = both("llama", 2)
    draw = torch.Generator().manual_seed(0)
    rows = torch.randint(0, 255, (5, 32), generator=draw)
    rows[:, 0] = 7  # one token in common
    requests = [(("", ""), row[:1], row[1:]) for row in rows.tolist()]
    seen = spy(monkeypatch, sharing)
    ours = sharing._loglikelihood_tokens(requests, disable_tqdm=True)
    assert seen == [(2, 31), (2, 31), (1, 31)]
    assert ours == plain._loglikelihood_tokens(requests, disable_tqdm=True)
