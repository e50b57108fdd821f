"""Runs without some blocks, against models that do not have them."""

import copy
import itertools

import pytest
import torch
from transformers import AutoModelForCausalLM, GPTJConfig

from stages.core.errors import Refusal
from stages.pruning.depth import rank
from stages.pruning.depth.ablate import Ablation, ScoredRows
from stages.pruning.depth.remove import remove_blocks
from tests import families, generators
from tests.deep import WINDOWS, deep, logits, loss, without, without_attention

pytestmark = [pytest.mark.numerics, pytest.mark.device]
TEXT = ScoredRows.of_text(WINDOWS)


@pytest.mark.parametrize("target", ["block", "attention"])
@pytest.mark.parametrize("family", families.CONFIGS)
def test_a_run_without_a_block_is_a_model_without_it(family, target):
    model = deep(family, 3)
    before = logits(model)
    losses = rank.perplexity(Ablation(model, TEXT, 2, target, "test"), [0, 1, 2])
    reference = without if target == "block" else without_attention
    for number, value in losses.items():
        assert value == pytest.approx(loss(reference(model, {number})), abs=1e-5)
    assert len({round(value, 4) for value in losses.values()}) == 3
    assert torch.equal(logits(model), before)


def test_sets_run_together_give_what_they_give_alone():
    model = deep("gemma3", 4)
    sets = [frozenset(c) for n in range(5) for c in itertools.combinations(range(4), n)]
    losses = Ablation(model, TEXT, 3, "block", "test").losses(sets)
    for omitted in sets:
        assert losses[omitted] == pytest.approx(loss(without(model, omitted)), abs=1e-5)


@pytest.mark.parametrize("target", ["block", "attention"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "phi3"])
def test_a_short_row_scores_what_it_does_alone(name, target):
    """Rows of graded items are padded to the longest of all, which LongRoPE (Phi-3) must not see."""
    model, tokens = generators.model(name), families.windows(4, 40)
    predicted = torch.zeros_like(tokens, dtype=torch.bool)
    ends = [14, 40, 17, 30]
    for row, end in enumerate(ends):
        predicted[row, end - 4 : end] = True
        tokens[row, end:] = 0
    sets = [frozenset(), frozenset({1})]
    together = Ablation(model, ScoredRows(tokens, predicted), 3, target, "test").likelihoods(sets)
    for row, end in enumerate(ends):
        alone = ScoredRows(tokens[row, None, :end], predicted[row, None, :end])
        for omitted, value in Ablation(model, alone, 1, target, "test").likelihoods(sets).items():
            assert float(together[omitted][row]) == pytest.approx(float(value), abs=2e-3)


def test_blocks_that_return_more_than_the_stream():
    config = GPTJConfig(
        vocab_size=259, n_embd=32, n_layer=3, n_head=4, rotary_dim=8, n_positions=64, bos_token_id=256,
        eos_token_id=257, initializer_range=0.2,
    )  # fmt: skip
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval().to(families.DEVICE)
    losses = rank.perplexity(Ablation(model, TEXT, 2, "block", "test"), [0, 1, 2])
    for number, value in losses.items():
        reference = copy.deepcopy(model)
        remove_blocks(reference, {number})
        assert value == pytest.approx(loss(reference), abs=1e-5)


@pytest.mark.parametrize("target", ["block", "attention"])
def test_blocks_that_read_what_others_leave_beside_the_stream_are_refused(target):
    """A run that starts at a later block would not have it."""
    with pytest.raises(
        Refusal, match=r"blocks of Gemma4\w+ read what earlier ones leave in shared_kv_states"
    ):
        Ablation(families.wide("gemma4"), TEXT, 2, target, "test")
