"""ECO: every rounding error returns through the momentum."""

from typing import Any

import pytest
import torch

from stages.recovery.arm import Arm
from stages.recovery.eco import BETAS, sum_of_later_steps
from tests.tuned import quantized, recipe, steps

pytestmark = [pytest.mark.numerics, pytest.mark.device]


def eco(bits: int = 3, **options: Any) -> Arm:
    """Return an arm for a fresh quantized model."""
    return recipe("eco", source="quantize/m", keep="none", **options).arm(*quantized(bits))


def gradients(weight: torch.Tensor, count: int, draw: torch.Generator) -> list[torch.Tensor]:
    """Draw gradients of one size, with which Adam's second moment stays the same, and random signs."""
    return [torch.randn(weight.shape, generator=draw).to(weight.device).sign() * 0.5 for _ in range(count)]


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_every_rounding_error_comes_back(optimizer):
    """The weights come to rest, once gradients end, where they would without a grid.

    The reference is the optimizer's own recursion in fp64 on weights that are not rounded, with the
    contributions of each gradient to all later steps summed one by one. The schedule changes at every step.
    """
    arm, grid = eco(bits=8, optimizer=optimizer), quantized(bits=8)[1]
    name, weight = next(iter(arm.trained().items()))
    start, beta, count = weight.detach().double(), BETAS[0], 12
    rates = [2e-5 * (1 + t % 5) for t in range(count)]
    rest = start.clone()
    for t, gradient in enumerate(gradients(weight, count, torch.Generator().manual_seed(0)), start=1):
        weight.grad = gradient
        arm.step(rates[t - 1])
        divided = gradient.double() / 0.5 if optimizer == "adam" else gradient.double()
        for later in range(400):
            bias = 1 - beta ** (t + later) if optimizer == "adam" else 1.0
            rest -= rates[t - 1] * (1 - beta) * beta**later * divided / bias
    moment = arm.state()[f"{name}.first"].double()
    ahead = moment * beta / (1 - beta)
    if optimizer == "adam":
        ahead = moment / 0.5 * sum_of_later_steps(beta, count)
    inside = grid[name].inside(rest)
    torch.testing.assert_close((weight.detach() - ahead)[inside], rest[inside], rtol=0, atol=1e-6)
    plain = eco(bits=8, optimizer=optimizer, feedback=False)
    weight = next(iter(plain.trained().values()))
    for rate, gradient in zip(rates, gradients(weight, count, torch.Generator().manual_seed(0)), strict=True):
        weight.grad = gradient
        plain.step(rate)
    assert (weight.detach() - rest).abs().max() > 1e-5


@pytest.mark.parametrize("step", [1, 5, 1000])
def test_the_sum_of_later_steps_of_a_unit_of_momentum(step):
    moment, total = 1.0, 0.0
    for k in range(1, 500):
        moment *= 0.9
        total += moment / (1 - 0.9 ** (step + k))
    assert sum_of_later_steps(0.9, step) == pytest.approx(total)
    if step == 1000:
        assert total == pytest.approx(9)  # beta / (1 - beta), the paper's


@pytest.mark.parametrize(("optimizer", "rate"), [("adam", 1e-3), ("sgd", 0.02)])
def test_feedback_learns_where_plain_rounding_loses_its_steps(optimizer, rate):
    losses = {
        feedback: steps(eco(optimizer=optimizer, feedback=feedback), rate, 60) for feedback in (True, False)
    }
    first = losses[True][0]
    assert first - losses[True][-1] > 5 * (first - losses[False][-1])
    assert losses[True][-1] < first - 0.1
