"""Batches against one prompt at a time, computed plainly, for every family that generates."""

import copy
from functools import cache
from types import SimpleNamespace

import pytest
import torch
from transformers import PreTrainedModel

from stages.core.errors import Refusal
from stages.corpus.decoding import generate_answers
from stages.corpus.generation import continue_prompts
from stages.corpus.padding import batches_well, batching, reliable_length
from stages.evaluation import shared
from stages.evaluation.thinking.budget import BudgetLM
from stages.evaluation.thinking.settings import Thinking
from tests import families, generators
from tests.evaluation.test_shared import generations

pytestmark = pytest.mark.numerics
TOKENIZER = families.tokenizer()
PROMPTS = [
    "2 + 3 = 5\n" + "abcdefghijklmnopqrstuvwxyz 0123456789 +-="[-length:] for length in (1, 25, 7, 7, 2, 40)
]
TOKENS = 6
every_family = pytest.mark.parametrize("name", generators.NAMES)


@cache
def plain(name: str) -> tuple[PreTrainedModel, list[list[int]], list[torch.Tensor]]:
    """A model, its greedy tokens after each prompt and their logits, with nothing kept or padded."""
    model = generators.model(name)
    answers, logits = [], []
    for prompt in PROMPTS:
        ids, rows = TOKENIZER.encode(prompt), []
        for _ in range(TOKENS):
            with torch.no_grad():
                rows.append(
                    model(input_ids=torch.tensor([ids], device=model.device), use_cache=False)
                    .logits[0, -1]
                    .cpu()
                )
            ids.append(int(rows[-1][:256].argmax()))
        answers.append(ids[-TOKENS:])
        logits.append(torch.stack(rows))
    return model, answers, logits


def bytes_only(name: str) -> PreTrainedModel:
    """The model, which never writes special tokens, so that answers lose nothing when decoded."""
    model, _, _ = plain(name)

    def mask(module, inputs, output):
        output.logits[..., 256:] = -1e9
        return output

    changed = copy.deepcopy(model)
    changed.register_forward_hook(mask)
    return changed


def ask(name: str, batch_size: int) -> shared.SharedPrefixLM:
    return shared.SharedPrefixLM(
        pretrained=bytes_only(name), tokenizer=TOKENIZER, batch_size=batch_size, softmax_dtype="float32"
    )


@every_family
def test_answers_are_those_of_each_prompt_alone(name):
    _, tokens, logits = plain(name)
    assert all(float((logits[0] - other)[0].abs().max()) > 1e-3 for other in logits[1:])  # the prompt decides
    expected = [TOKENIZER.decode(answer) for answer in tokens]
    answers = ask(name, 6).generate_until(generations(PROMPTS, [], TOKENS), disable_tqdm=True)
    assert answers == expected


@every_family
def test_likelihoods_are_those_of_each_prompt_alone(name):
    _, answers, logits = plain(name)
    requests, expected = [], []
    for prompt, answer, rows in zip(PROMPTS, answers, logits, strict=True):
        each = rows[:, :256].log_softmax(-1).gather(1, torch.tensor(answer)[:, None])[:, 0]
        for length in (TOKENS, 4):
            requests.append((("", ""), TOKENIZER.encode(prompt), answer[:length]))
            expected.append(float(each[:length].sum()))
    given = ask(name, 6)._loglikelihood_tokens(requests, disable_tqdm=True)
    assert [total for total, _ in given] == pytest.approx(expected, abs=2e-3)
    assert all(greedy for _, greedy in given)


@every_family
def test_taught_answers_and_thoughts_are_those_of_each_prompt_alone(name):
    expected, model = plain(name)[1], bytes_only(name)
    prompts, uniform = [TOKENIZER.encode(prompt) for prompt in PROMPTS], torch.zeros(6, TOKENS)
    assert generate_answers(model, prompts, uniform, 0.0, [257], None, TOKENIZER) == expected

    rules = Thinking(budgets=(TOKENS,), temperature=0, begin="")
    thinker = BudgetLM(rules, 0, pretrained=model, tokenizer=TOKENIZER, batch_size=6)
    rows = thinker._generate(PROMPTS, list(uniform), ())
    assert [list(row) for row in rows] == expected


@every_family
def test_generated_windows_are_those_of_each_prompt_alone(name):
    model, answers, _ = plain(name)
    prompt = torch.tensor([TOKENIZER.encode(PROMPTS[i]) for i in (2, 3)])
    prompt[1, 4] = 97

    def windows(rows: torch.Tensor) -> torch.Tensor:
        return continue_prompts(model, rows, torch.zeros(len(rows), TOKENS), torch.arange(256), 1e-12)

    if name in ("openai-gpt", "recurrent_gemma"):
        with pytest.raises(Refusal, match="keeps nothing of the tokens it has read"):
            windows(prompt)
        return
    together = windows(prompt)
    assert together.tolist() == [windows(row[None])[0].tolist() for row in prompt]
    assert together[0, -TOKENS:].tolist() == answers[2]
    assert (name == "rwkv") != batches_well(model)  # transformers computes its batches wrongly


def test_padding_is_not_counted_as_text_by_penalties():
    requests = generations(PROMPTS, [], TOKENS)
    for request in requests:
        request.arguments[1]["repetition_penalty"] = 5.0
    first = TOKENIZER.convert_ids_to_tokens(plain("llama")[1][0][0])
    answers = []
    for size in (1, 6):
        lm = ask("llama", size)
        lm.tokenizer = families.tokenizer()
        lm.tokenizer.pad_token = first  # as where the end of text also pads
        answers.append(lm.generate_until(requests, disable_tqdm=True))
    alone, together = answers
    assert alone == together
    assert together != [TOKENIZER.decode(answer) for answer in plain("llama")[1]]


def test_a_checkpoints_own_settings_of_generation_are_not_used():
    model = bytes_only("llama")
    model.generation_config.update(
        repetition_penalty=5.0, no_repeat_ngram_size=1, do_sample=True, min_length=9
    )
    lm = shared.SharedPrefixLM(pretrained=model, tokenizer=TOKENIZER, batch_size=6)
    answers = lm.generate_until(generations(PROMPTS, [], TOKENS), disable_tqdm=True)
    assert answers == [TOKENIZER.decode(answer) for answer in plain("llama")[1]]


def test_a_tokenizer_without_an_end_uses_the_models():
    tokenizer = families.tokenizer()
    for kind in ("bos_token", "eos_token", "pad_token"):
        setattr(tokenizer, kind, None)
    model = bytes_only("llama")
    lm = shared.SharedPrefixLM(pretrained=model, tokenizer=tokenizer, batch_size=6)
    assert lm.tokenizer.eos_token == "<eos>"
    answers = lm.generate_until(generations(PROMPTS, [], TOKENS), disable_tqdm=True)
    assert answers == [TOKENIZER.decode(answer) for answer in plain("llama")[1]]

    tokenizer.eos_token = None
    model.generation_config.eos_token_id = model.config.eos_token_id = None
    lm = shared.SharedPrefixLM(pretrained=model, tokenizer=tokenizer, batch_size=6)
    with pytest.raises(Refusal, match="neither the model's tokenizer nor its config names an end of text"):
        lm.generate_until(generations(PROMPTS, [], TOKENS), disable_tqdm=True)
    model.config.eos_token_id = 999
    with pytest.raises(Refusal, match="the model's tokenizer has no token 999, its config's end of text"):
        lm.generate_until(generations(PROMPTS, [], TOKENS), disable_tqdm=True)


@pytest.mark.parametrize(
    ("name", "kind"),
    [("git", "equal lengths"), ("moshi", "padded"), ("llama", "padded"), ("mamba", "equal lengths")],
)
def test_only_models_that_a_trial_lets_pass_are_padded(name, kind):
    for dtype in (torch.float32, torch.bfloat16):
        assert batching(generators.model(name).to(dtype)) == kind


def test_rounding_of_inputs_is_no_wrong_mask():
    """One code more or less moves logits by more than fp32 rounds."""
    model = families.wide("llama")

    def rounded(_: torch.nn.Module, args: tuple[torch.Tensor]) -> torch.Tensor:
        scale = args[0].abs().amax(-1, keepdim=True).clamp(min=1e-9) / 7
        return ((args[0] + 0.05 * len(args[0]) * scale) / scale).round() * scale  # a batch is a little off

    for module in model.modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_pre_hook(rounded)
    assert batching(model) == "equal lengths"
    scheme = SimpleNamespace(input_activations={"num_bits": 4})
    again = copy.deepcopy(model)
    again.model.layers[0].mlp.gate_proj.quantization_scheme = scheme
    assert batching(again) == "padded"


@pytest.mark.parametrize("name", generators.NAMES)
def test_a_model_whose_masks_have_no_window_reads_no_more_than_its_cache_keeps(name):
    assert reliable_length(generators.model(name)) == (64 if name == "moshi" else None)
    if name == "moshi":
        assert ask(name, 6).max_length == 64
