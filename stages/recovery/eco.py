"""ECO (2601.22101): train without master weights, and feed rounding errors into the momentum.

Weights are on the source's grid before and after every step, and no finer copy of them is kept. A step gives
w~ = w - u, the grid gives q = round(w~), and the error e = w~ - q would be lost, and with it every step
smaller than half a grid step. ECO takes the error out of the first moment, from where it returns in the
following steps.

By how much: with the learning rate included, SGD's moment is m = beta m + (1 - beta) lr g, and the step u is
m itself. Adding d to m adds beta^k d to the k-th step from here, d beta / (1 - beta) in all. The weight must
change by e in all, and steps are subtracted from it, so

    d = -e (1 - beta) / beta = e (1 - 1 / beta),

which is the paper's (1 / lr) (1 - 1 / beta) e for a moment without the learning rate. With the learning rate
included, e returns in full whatever the schedule does next. Hence w - m beta / (1 - beta), where the weights
would come to rest without further gradients, moves by lr g per step, exactly as without a grid.

Adam's step is m / (1 - beta^t) / D with D = sqrt(v / (1 - beta2^t)) + epsilon. So d gets the factor D, at its
current value, and the sum beta / (1 - beta) becomes that of beta^k / (1 - beta^(t+k)), which tends to it.
Values clamped at the end of the codes' range are not rounding errors and are not fed back, or they would pile
up.

The price: a weight moves to the next code only once a single step exceeds half a grid step, so it lags behind
the path of masters by up to beta / (1 - beta) / 2 grid steps. ECO needs a higher learning rate than plain
training. Rounding is to nearest; the paper finds stochastic rounding somewhat better.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Literal

from stages.core.lazy import torch
from stages.core.numbers import no_grad
from stages.recovery.adam import EPSILON
from stages.recovery.arm import Arm, Recovered
from stages.recovery.freezing import GradientMasks, trainable_mask
from stages.recovery.ongrid import GridWeights, OnGrid

if TYPE_CHECKING:
    from torch import Tensor, nn
    from transformers import PreTrainedModel

    from stages.recovery.grids import SourceGrid

BETAS = (0.9, 0.999)


class ECO(OnGrid):
    """Train weights that never leave the source's grid, with rounding errors fed into the momentum."""

    method: Literal["eco"]
    optimizer: Literal["adam", "sgd"] = "adam"
    """The optimizer; its first moment receives the rounding errors."""
    feedback: bool = True
    """False drops the rounding errors: the control, in which small steps are lost."""

    def arm(self, model: PreTrainedModel, grid: SourceGrid | None) -> Arm:
        """Return an arm with moments for every linear on the grid."""
        return _ECOArm(self, model, grid)


class _ECOArm(Arm):
    """Weights on the grid, and the moments of their gradients and errors."""

    def __init__(self, recipe: ECO, model: PreTrainedModel, grid: SourceGrid | None) -> None:
        self.model, self._recipe = model, recipe
        self._weights = GridWeights(recipe, model, grid)
        self._steps = torch.zeros((), dtype=torch.int64)
        self._first: dict[str, Tensor] = {}
        self._second: dict[str, Tensor] = {}
        for name, weight in self._weights.parameters.items():
            self._first[name] = torch.zeros_like(weight, dtype=torch.float32)
            if recipe.optimizer == "adam":
                self._second[name] = torch.zeros_like(weight, dtype=torch.float32)
        trainable = {name: trainable_mask(zeros) for name, zeros in self._weights.zeros.items()}
        self.masks = GradientMasks(self._weights.parameters, trainable)

    def trained(self) -> dict[str, nn.Parameter]:
        return self._weights.parameters

    @no_grad
    def step(self, learning_rate: float) -> None:
        """Take a step of the optimizer, round, and feed the error into the first moment."""
        self._steps += 1
        for name, weight in self._weights.parameters.items():
            if weight.grad is None:
                continue
            moment = self._first[name].mul_(BETAS[0]).add_(weight.grad, alpha=(1 - BETAS[0]) * learning_rate)
            divisor, later = self._divisor(name, weight.grad)
            target = weight.float() * (1 - learning_rate * self._recipe.weight_decay) - moment / divisor
            codes = self._weights.round(name, target)
            weight.copy_(codes.dequantize())
            if self._recipe.feedback:
                error = (target - weight) * codes.inside(target)
                moment.sub_(error * divisor / later)

    def _divisor(self, name: str, gradient: Tensor) -> tuple[Tensor | float, float]:
        """Update the second moment, and return what turns the first moment into steps.

        Returns:
            The divisor of the first moment that gives this step; and the sum of the later steps that follow
            without further gradients, as a multiple of this step.
        """
        if self._recipe.optimizer == "sgd":
            return 1.0, BETAS[0] / (1 - BETAS[0])
        steps = int(self._steps)
        second = self._second[name].mul_(BETAS[1]).addcmul_(gradient, gradient, value=1 - BETAS[1])
        bias = 1 - BETAS[0] ** steps
        divisor = (second / (1 - BETAS[1] ** steps)).sqrt_().add_(EPSILON).mul_(bias)
        return divisor, bias * sum_of_later_steps(BETAS[0], steps)

    def state(self) -> dict[str, Tensor]:
        """Return codes, moments and the number of steps; the weights follow from the codes."""
        codes = {name: self._weights.codes[name].codes for name in self._weights.parameters}
        kinds = {"codes": codes, "first": self._first, "second": self._second}
        state = {
            f"{name}.{kind}": tensor for kind, tensors in kinds.items() for name, tensor in tensors.items()
        }
        return {**state, "steps": self._steps}

    @no_grad
    def load(self, state: Mapping[str, Tensor]) -> None:
        """Restore codes, weights, moments and the number of steps."""
        all_codes = self._weights.codes
        for name, weight in self._weights.parameters.items():
            all_codes[name] = replace(all_codes[name], codes=state[f"{name}.codes"].to(weight.device))
            weight.copy_(all_codes[name].dequantize())
        for name, tensor in self.state().items():
            tensor.copy_(state[name])

    def finish(self) -> Recovered:
        return self._weights.recovered()


def sum_of_later_steps(beta: float, step: int) -> float:
    """Return the sum over k >= 1 of beta^k / (1 - beta^(step + k)).

    It is what 1 in Adam's first moment adds to the steps after `step`.
    """
    terms = math.ceil(math.log(1e-12) / math.log(beta))
    return sum(beta**k / (1 - beta ** (step + k)) for k in range(1, terms))
