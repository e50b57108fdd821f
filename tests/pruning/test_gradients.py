"""Gradients of the loss behind a prompt, against torch's own."""

import pytest
import torch
from torch.nn import functional as F

from stages.core.errors import Refusal
from stages.model.blocks import linears
from stages.pruning.gradients import loss_gradients, mean_loss
from tests import families

pytestmark = [pytest.mark.numerics, pytest.mark.device]
WINDOWS = families.windows(3, 24)


def nats(model: torch.nn.Module) -> torch.Tensor:
    """The loss of every token but the first, `[windows, tokens - 1]`, without the model's own loss."""
    logits = model(input_ids=WINDOWS, use_cache=False).logits[:, :-1]
    losses = F.cross_entropy(logits.flatten(0, 1), WINDOWS[:, 1:].flatten(), reduction="none")
    return losses.view(len(WINDOWS), -1)


@pytest.mark.parametrize("family", families.CONFIGS)
def test_gradients_are_those_of_the_loss_behind_the_prompt(family):
    model = families.model(family).float()
    targets = linears(model)
    for prompt in (1, 9):
        model.requires_grad_(True)
        model.zero_grad()
        expected = nats(model)[:, prompt - 1 :].mean()
        expected.backward()
        wanted = {linear.name: linear.module.weight.grad.clone() for linear in targets}
        model.zero_grad()
        gradients, loss = loss_gradients(model, targets, WINDOWS, prompt_length=prompt, label="test")
        assert loss == pytest.approx(expected.item(), rel=1e-5)
        assert loss == pytest.approx(mean_loss(model, WINDOWS, prompt), rel=1e-6)
        for linear in targets:
            stored = wanted[linear.name].T if linear.transposed else wanted[linear.name]
            torch.testing.assert_close(gradients[linear.name], stored, rtol=1e-3, atol=1e-7)
        assert not any(parameter.requires_grad for parameter in model.parameters())


def test_predicting_prompt_tokens_adds_nothing_but_their_own_loss():
    """The same windows, only the mask changes: the difference is the prompt's part of the sum."""
    model = families.model("llama").float()
    targets = linears(model)
    every, _ = loss_gradients(model, targets, WINDOWS, label="all")
    behind, _ = loss_gradients(model, targets, WINDOWS, prompt_length=9, label="generated")
    model.requires_grad_(True)
    nats(model)[:, :8].mean().backward()
    for linear in targets:
        prompt = linear.module.weight.grad
        difference = every[linear.name] * 23 - behind[linear.name] * 15
        torch.testing.assert_close(difference, prompt * 8, rtol=1e-3, atol=1e-5)
        assert not torch.allclose(every[linear.name], behind[linear.name])


def test_gradients_that_are_not_finite_are_refused():
    model = families.model("llama").float()
    linears(model)[0].weight[0, 0] = torch.nan
    with pytest.raises(Refusal, match=r"NaN or infinite gradients in model\.layers"):
        loss_gradients(model, linears(model), WINDOWS, label="test")
