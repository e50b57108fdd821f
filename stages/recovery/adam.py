"""AdamW (1711.05101) with fp32 masters beside the weights a model computes with.

Near any bf16 weight the next number is about 1/256 of it away, so adding 1e-5 usually changes nothing. So
each weight has an fp32 master that takes the steps, and `publish` derives the weight from it: the nearest
number of its dtype, the master under a mask, the master rounded to a grid. Every promise about weights is
kept in that one place.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, TypeAlias

from stages.core.lazy import torch
from stages.core.numbers import no_grad
from stages.recovery.arm import Arm

if TYPE_CHECKING:
    from torch import Tensor, nn

EPSILON = 1e-8
Publish: TypeAlias = "Callable[[Tensor, Tensor], Tensor]"
"""Computes the new weight from its fp32 master and the current weight; both are shaped as stored."""
_OPTIMIZER_STATE = ("step", "exp_avg", "exp_avg_sq")


class Adam:
    """AdamW over the fp32 masters of `weights`; matrices decay, biases and norms do not.

    Args:
        weights: by name. From here on their gradients are fp32.
        publish: by name, how a master becomes a weight, where that is more than a cast.
    """

    def __init__(
        self,
        weights: Mapping[str, nn.Parameter],
        *,
        weight_decay: float,
        betas: tuple[float, float] = (0.9, 0.999),
        publish: Mapping[str, Publish] | None = None,
    ) -> None:
        self._weights = dict(weights)
        self._publish = dict(publish or {})
        for weight in self._weights.values():
            weight.grad_dtype = torch.float32  # sums over micro-batches are not rounded to the weight's dtype
        self._masters = {
            name: weight.detach().to(torch.float32, copy=True) for name, weight in self._weights.items()
        }
        masters = list(self._masters.values())
        groups = [
            {"params": [master for master in masters if master.ndim >= 2], "weight_decay": weight_decay},
            {"params": [master for master in masters if master.ndim < 2], "weight_decay": 0.0},
        ]
        self._optimizer = torch.optim.AdamW(
            [group for group in groups if group["params"]], lr=0.0, betas=betas, eps=EPSILON, fused=True
        )

    def step(self, learning_rate: float) -> None:
        """Take one step along the weights' `grad`, which may be None, and publish the weights."""
        for name, weight in self._weights.items():
            self._masters[name].grad = weight.grad
        for group in self._optimizer.param_groups:
            group["lr"] = learning_rate
        self._optimizer.step()
        for master in self._masters.values():
            master.grad = None
        self._publish_all()

    def state(self) -> dict[str, Tensor]:
        """Return the masters, both moments and the number of steps of each, by `<name>.<kind>`."""
        state = {f"{name}.master": master for name, master in self._masters.items()}
        for name, master in self._masters.items():
            for kind, tensor in self._optimizer.state.get(master, {}).items():
                state[f"{name}.{kind}"] = tensor
        return state

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Restore a `state`, which may be on another device, and publish the weights."""
        for name, master in self._masters.items():
            master.copy_(state[f"{name}.master"])
            if f"{name}.step" in state:
                # Fused AdamW keeps even the number of steps on the device of the parameter.
                self._optimizer.state[master] = {
                    kind: state[f"{name}.{kind}"].to(master.device) for kind in _OPTIMIZER_STATE
                }
        self._publish_all()

    @no_grad
    def _publish_all(self) -> None:
        for name, weight in self._weights.items():
            master = self._masters[name]
            weight.copy_(self._publish[name](master, weight) if name in self._publish else master)


class AdamArm(Arm):
    """An arm whose weights take the steps of AdamW.

    Args:
        weights: the parameters to train, by name.
        weight_decay, publish: see `Adam`.
    """

    def __init__(
        self,
        weights: Mapping[str, nn.Parameter],
        *,
        weight_decay: float,
        publish: Mapping[str, Publish] | None = None,
    ) -> None:
        self._trained = dict(weights)
        self._adam = Adam(weights, weight_decay=weight_decay, publish=publish)

    def trained(self) -> dict[str, nn.Parameter]:
        """Return the weights."""
        return self._trained

    def step(self, learning_rate: float) -> None:
        """Step the masters and publish the weights."""
        self._adam.step(learning_rate)

    def state(self) -> dict[str, Tensor]:
        """Return masters and moments; the weights follow from them."""
        return self._adam.state()

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Restore masters and moments, and publish the weights."""
        self._adam.load(state)
