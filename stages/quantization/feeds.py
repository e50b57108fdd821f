"""What feeds a group of linears, and alone: where a scale of the group's inputs can be taken out again.

It is found by trying, so no class of a model is known here. A candidate's output is divided by random powers
of two and the group's inputs multiplied by them again, which rounds nothing. It feeds the group where the
inputs arrive divided by just that, and nothing else reads it where the block's output is then the same to the
last bit (in float16, whose range ends where small products still live, to 8 bits). So the value projection
feeds the output projection through attention, up feeds down through the gate's product, and fc1 feeds fc2
through a ReLU but not a GELU. Not found, and so left unscaled: grouped queries, where a value channel goes to
several inputs of the output projection; one linear for q, k and v; a norm whose output goes on along the
residual stream.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from stages.compress.walk import Group
from stages.core.lazy import torch
from stages.model.blocks import Linear

if TYPE_CHECKING:
    from torch import Tensor, nn


class Feed(Protocol):
    """A module whose output is what a group of linears reads, channel for channel, and nothing else does."""

    @property
    def module(self) -> nn.Module:
        """The module."""

    def reachable(self, scale: Tensor) -> Tensor:
        """The scale `[channels]` nearest to `scale` that its output can be divided by, all positive."""

    def divide(self, scale: Tensor) -> None:
        """Divide its output by a reachable `scale` `[channels]`, in place."""


@dataclass(frozen=True)
class Rows:
    """A linear, divided by dividing its rows and bias."""

    linear: Linear

    @property
    def module(self) -> nn.Module:
        """The linear's module."""
        return self.linear.module

    def reachable(self, scale: Tensor) -> Tensor:
        """Any scale is."""
        return scale

    def divide(self, scale: Tensor) -> None:
        """Each value is rounded once."""
        self.linear.weight.copy_(self.linear.weight.float() / scale[:, None])
        _divide(self.module.bias, scale)


@dataclass(frozen=True)
class Norm:
    """A norm that multiplies its channels by `origin + weight`: origin is 0, in Gemma 1."""

    module: nn.Module
    origin: float

    def reachable(self, scale: Tensor) -> Tensor:
        """What the rounding of the weight in its dtype makes of `scale`.

        Near origin 1 that is coarse. The linears are multiplied by what has come of it, so they never
        disagree with the norm. A channel that would be rounded away keeps its weight.
        """
        now = self._factor()
        then = (now / scale - self.origin).to(self._weight.dtype).double() + self.origin
        made = torch.where(now == 0, scale.double(), now / then)
        return torch.where((then == 0) & (now != 0), torch.ones_like(made), made).float()

    def divide(self, scale: Tensor) -> None:
        """The weight, and the bias where there is one."""
        self._weight.copy_(self._factor() / scale - self.origin)
        _divide(getattr(self.module, "bias", None), scale)

    @property
    def _weight(self) -> Tensor:
        return self.module.get_parameter("weight").data

    def _factor(self) -> Tensor:
        return self._weight.double() + self.origin


def feeds(groups: list[Group], block: Callable[[], Any]) -> list[Feed | None]:
    """What a scale of each group's inputs can be folded into, None where there is nothing.

    Args:
        groups: of one block, in the order in which they compute.
        block: computes the block's output for the window whose inputs the groups hold.
    """
    plain = _hidden(block())
    found: list[Feed | None] = []
    for number, group in enumerate(groups):
        candidates = _candidates(group, groups[:number])
        found.append(next((one for one in candidates if _alone_feeds(one, group, block, plain)), None))
    return found


def _divide(bias: Any, scale: Tensor) -> None:
    if bias is not None:
        bias.data.copy_(bias.data.float() / scale)


def _hidden(output: Any) -> Tensor:
    """The hidden states a block returns, by themselves or first of several things."""
    hidden: Tensor = output if isinstance(output, torch.Tensor) else output[0]
    return hidden


def _candidates(group: Group, before: list[Group]) -> list[Feed]:
    """What might feed the group: the module that made its inputs, else linears before it, nearest first."""
    width = group.inputs.shape[-1]
    linears = [one for other in before for one in other.linears if one.weight.shape[0] == width]
    if group.feeder is None or not list(group.feeder.parameters()):
        return [Rows(one) for one in reversed(linears)]
    if made := [one for one in linears if one.module is group.feeder]:
        return [Rows(made[0])]
    origin = _origin(group.feeder, group.inputs)
    return [] if origin is None else [Norm(group.feeder, origin)]


def _origin(module: nn.Module, inputs: Tensor) -> float | None:
    """What a norm adds to its weight before it multiplies by it; None for what is no such norm.

    It is the weight, taken negative, at which nothing comes out.
    """
    own = dict(module.named_parameters())
    weight = own.get("weight")
    if not set(own) <= {"weight", "bias"} or weight is None or weight.shape != inputs.shape[-1:]:
        return None
    ramp = torch.linspace(-1, 2, len(weight), dtype=inputs.dtype, device=inputs.device)

    def silent(origin: float) -> bool:
        swapped = {name: torch.zeros_like(tensor) for name, tensor in own.items()}
        swapped["weight"] = torch.full_like(weight, -origin)
        return not torch.func.functional_call(module, swapped, (ramp[None, None],)).any()

    origins = [origin for origin in (0.0, 1.0) if silent(origin)]
    return origins[0] if len(origins) == 1 else None


def _alone_feeds(feed: Feed, group: Group, block: Callable[[], Any], plain: Tensor) -> bool:
    """Whether the feed's output is what the group reads, channel for channel, and nothing else does."""
    inputs = group.inputs
    exponents = torch.randint(-3, 4, inputs.shape[-1:], generator=torch.Generator("cpu").manual_seed(0))
    factors = (2.0**exponents).to(inputs.device, inputs.dtype)
    arrived: list[bool] = []

    def shrink(_: nn.Module, args: object, output: Tensor) -> Tensor:
        return output / factors

    def grow(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        restored = args[0] * factors
        arrived.append(_same(restored, inputs))
        return (restored, *args[1:])

    handles = [feed.module.register_forward_hook(shrink)]
    handles += [linear.module.register_forward_pre_hook(grow) for linear in group.linears]
    try:
        output = _hidden(block())
    finally:
        for handle in handles:
            handle.remove()
    return all(arrived) and _same(output, plain)


def _same(found: Tensor, expected: Tensor) -> bool:
    if expected.dtype != torch.float16:
        return torch.equal(found, expected)
    wide = expected.float()
    return torch.allclose(found.float(), wide, rtol=2**-8, atol=2**-8 * float(wide.abs().mean()))
