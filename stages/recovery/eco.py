"""ECO (2601.22101): training without master weights; what rounding loses goes into the momentum.

Weights are on the source's grid before and after every step, and no finer copy of them is kept. A step gives
w~ = w - u, the grid gives q = round(w~), and the error e = w~ - q would be lost, and with it every step that
is smaller than half of the grid's. ECO takes it out of the first moment, from where it comes back in the
steps that follow.

How much: with the learning rate taken in, SGD's moment is m = beta m + (1 - beta) lr g and the step u = m.
Adding d to m adds beta^k d to the k-th step from here, sum d beta / (1 - beta) in all. These steps shall
add up to e, and a step is subtracted, so

    d = -e (1 - beta) / beta = e (1 - 1 / beta),

the paper's (1 / lr) (1 - 1 / beta) e for a moment without the learning rate. Taken in, it returns e whatever
the schedule does next. Hence w - m beta / (1 - beta), where the weights would come to rest if no gradient
came any more, moves by lr g a step exactly, as if there were no grid.

Adam's step is m / (1 - beta^t) / D with D = sqrt(v / (1 - beta2^t)) + epsilon, so d has D as a factor, held
for what it is now, and in place of the sum beta / (1 - beta) that of beta^k / (1 - beta^(t+k)), which tends
to it. What is cut off at the end of the codes' range is no rounding error and is not fed back, or it would
pile up.

The price: a weight moves to the next code only once the step alone crosses half of the grid's, so it lags
behind its masters' path by up to beta / (1 - beta) / 2 steps of the grid. The rate it takes is higher than
plain training's. Rounding is to the nearest; the paper finds a drawn one somewhat better.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, ClassVar, Literal

from stages.core.lazy import torch
from stages.core.numbers import no_grad
from stages.recovery.adam import EPSILON
from stages.recovery.arm import Arm, Finished
from stages.recovery.grids import SourceGrid, integers, rounded, unfrozen
from stages.recovery.tuning import Tuning

if TYPE_CHECKING:
    from torch import Tensor, nn
    from transformers import PreTrainedModel

    from stages.model.grid import Codes

BETAS = (0.9, 0.999)


class ECO(Tuning):
    """Train weights that never leave the source's grid, their rounding errors fed into the momentum."""

    on_grid: ClassVar[bool] = True
    method: Literal["eco"]
    optimizer: Literal["adam", "sgd"] = "adam"
    """What the momentum is that of."""
    feedback: bool = True
    """False drops the rounding errors: the control, in which small steps are lost."""
    keep: Literal["mask", "none"] = "mask"
    """Whether weights that are zero in the source stay zero."""

    @property
    def refuses(self) -> Mapping[str, str]:
        """GPT-2, whose linears no format holds on a grid."""
        return {"gpt2": "no format holds codes of its Conv1D, so no source of it has a grid in its files"}

    def arm(self, model: PreTrainedModel, grid: SourceGrid | None) -> Arm:
        """Moments for every linear on the grid; nothing else is trained."""
        return ErrorCompensating(self, model, integers(grid))


class ErrorCompensating(Arm):
    """Weights on the grid and the moments of their gradients and errors."""

    def __init__(self, recipe: ECO, model: PreTrainedModel, grid: Mapping[str, Codes]) -> None:
        self.model = model
        self._recipe, self._codes = recipe, dict(grid)
        self._weights = unfrozen(model, grid, recipe.ignore)
        self._zeros: dict[str, Tensor] = {}
        self._steps = torch.zeros((), dtype=torch.int64)
        self._first: dict[str, Tensor] = {}
        self._second: dict[str, Tensor] = {}
        for name, weight in self._weights.items():
            self._first[name] = torch.zeros_like(weight, dtype=torch.float32)
            if recipe.optimizer == "adam":
                self._second[name] = torch.zeros_like(weight, dtype=torch.float32)
            if recipe.keep == "mask":
                self._zeros[name] = weight == 0
                weight.register_post_accumulate_grad_hook(self._mask(name))

    def _mask(self, name: str) -> Callable[[Tensor], None]:
        """Takes away the gradient of pruned weights before it counts in anything, as a hook."""

        def hook(weight: Tensor) -> None:
            assert weight.grad is not None
            weight.grad.masked_fill_(self._zeros[name], 0)

        return hook

    def trained(self) -> dict[str, nn.Parameter]:
        """The weights on the grid."""
        return self._weights

    @no_grad
    def step(self, learning_rate: float) -> None:
        """A step of the optimizer, rounded; its error goes into the first moment."""
        self._steps += 1
        for name, weight in self._weights.items():
            if weight.grad is None:
                continue
            moment = self._first[name].mul_(BETAS[0]).add_(weight.grad, alpha=(1 - BETAS[0]) * learning_rate)
            scale, back = self._scale(name, weight.grad)
            wanted = weight.float() * (1 - learning_rate * self._recipe.weight_decay) - moment / scale
            self._codes[name] = code = rounded(name, self._codes[name], wanted)
            weight.copy_(code.dequantize())
            if self._recipe.feedback:
                error = (wanted - weight) * code.inside(wanted)
                moment.sub_(error * scale / back)

    def _scale(self, name: str, gradient: Tensor) -> tuple[Tensor | float, float]:
        """What divides the first moment to give the step; and what one unit in it adds up to, so divided."""
        if self._recipe.optimizer == "sgd":
            return 1.0, BETAS[0] / (1 - BETAS[0])
        steps = int(self._steps)
        second = self._second[name].mul_(BETAS[1]).addcmul_(gradient, gradient, value=1 - BETAS[1])
        bias = 1 - BETAS[0] ** steps
        scale = (second / (1 - BETAS[1] ** steps)).sqrt_().add_(EPSILON).mul_(bias)
        return scale, bias * returned(BETAS[0], steps)

    def state(self) -> dict[str, Tensor]:
        """Codes, moments and the number of steps; the weights follow from the codes."""
        codes = {name: self._codes[name].codes for name in self._weights}
        kinds = {"codes": codes, "first": self._first, "second": self._second}
        told = {f"{name}.{kind}": tensor for kind, found in kinds.items() for name, tensor in found.items()}
        return {**told, "steps": self._steps}

    @no_grad
    def load(self, state: Mapping[str, Tensor]) -> None:
        """What `state` told, into place, and the weights."""
        for name, weight in self._weights.items():
            codes = state[f"{name}.codes"].to(weight.device)
            self._codes[name] = replace(self._codes[name], codes=codes)
            weight.copy_(self._codes[name].dequantize())
        for name, tensor in self.state().items():
            tensor.copy_(state[name])

    def finish(self) -> Finished:
        """The weights and their codes."""
        return Finished(self.model, keep=self._zeros, codes=self._codes)


def returned(beta: float, step: int) -> float:
    """The sum over k >= 1 of beta^k / (1 - beta^(step + k)): what 1 in Adam's moment adds to later steps."""
    terms = math.ceil(math.log(1e-12) / math.log(beta))
    return sum(beta**k / (1 - beta ** (step + k)) for k in range(1, terms))
