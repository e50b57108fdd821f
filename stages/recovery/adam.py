"""AdamW (1711.05101) with fp32 masters beside the weights a model computes with.

A step of 1e-5 is lost in a bf16 weight, whose neighbours lie 1/256 of it apart. So each weight has an fp32
master that takes the steps, and the weight is what `publish` makes of it: the nearest number of its dtype,
the master under a mask, the master rounded to a grid. Every promise about weights is kept in that one place.
`ByAdam` is what the arms that are trained so have in common.
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
"""The new weight from a master, fp32, and the weight as it is now; both shaped as stored."""


class Adam:
    """AdamW over the fp32 masters of `weights`; matrices decay, biases and norms do not.

    Args:
        weights: by name. They get fp32 gradients from here on.
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
            {"params": [one for one in masters if one.ndim >= 2], "weight_decay": weight_decay},
            {"params": [one for one in masters if one.ndim < 2], "weight_decay": 0.0},
        ]
        self._optimizer = torch.optim.AdamW(
            [group for group in groups if group["params"]], lr=0.0, betas=betas, eps=EPSILON, fused=True
        )

    def step(self, learning_rate: float) -> None:
        """One step along `grad` of the weights, which may be None, and the weights published again."""
        for name, weight in self._weights.items():
            self._masters[name].grad = weight.grad
        for group in self._optimizer.param_groups:
            group["lr"] = learning_rate
        self._optimizer.step()
        for master in self._masters.values():
            master.grad = None
        self._publish_all()

    def state(self) -> dict[str, Tensor]:
        """Masters, both moments and the number of steps of each, by `<name>.<kind>`."""
        told = {f"{name}.master": master for name, master in self._masters.items()}
        for name, master in self._masters.items():
            for kind, tensor in self._optimizer.state.get(master, {}).items():
                told[f"{name}.{kind}"] = tensor
        return told

    def load(self, state: Mapping[str, Tensor]) -> None:
        """What `state` told, into place; the weights are published from it."""
        for name, master in self._masters.items():
            master.copy_(state[f"{name}.master"])
            kinds = ("step", "exp_avg", "exp_avg_sq")
            if f"{name}.step" in state:
                self._optimizer.state[master] = {
                    kind: state[f"{name}.{kind}"].to("cpu" if kind == "step" else master.device)
                    for kind in kinds
                }
        self._publish_all()

    @no_grad
    def _publish_all(self) -> None:
        for name, weight in self._weights.items():
            master = self._masters[name]
            weight.copy_(self._publish[name](master, weight) if name in self._publish else master)


class ByAdam(Arm):
    """An arm whose weights take AdamW's steps; what else it is, its class says.

    Args:
        weights: what is trained, by name.
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
        """See `Arm`."""
        return self._trained

    def step(self, learning_rate: float) -> None:
        """AdamW on the masters, which are then published."""
        self._adam.step(learning_rate)

    def state(self) -> dict[str, Tensor]:
        """Masters and moments; the weights follow from them."""
        return self._adam.state()

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Masters and moments of an earlier run, and the weights they stand for."""
        self._adam.load(state)
