"""Find the module that feeds a group of linears, so that a scale of the group's inputs can be folded into it.

Candidates are tested by running the block, so no model class is named here. A candidate's output is divided
by random powers of two, and the group's inputs are multiplied by the same powers; neither rounds anything.
The candidate feeds the group if the inputs arrive divided by exactly those powers, and it feeds nothing else
if the block's output is then the same to the last bit (to 8 bits in float16, where dividing makes small
values subnormal). Tensors that a block leaves for later blocks count as its output: a value projection whose
values later blocks read feeds more than this block's output projection.

So the value projection feeds the output projection through attention, up feeds down through the product with
the gate, and fc1 feeds fc2 through a ReLU but not through a GELU. A group without a feed stays unscaled: an
output projection under grouped queries, where a value channel goes to several of its inputs; an output
projection behind a single linear for q, k and v; linears after a norm whose output continues along the
residual stream.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from stages.compress.capture import Group
from stages.core.lazy import torch
from stages.model.blocks import Linear

if TYPE_CHECKING:
    from torch import Tensor, nn


class Feed(Protocol):
    """A module whose output is the input of one group of linears, channel by channel, and of nothing else."""

    @property
    def module(self) -> nn.Module:
        """The module."""

    def reachable(self, scale: Tensor) -> Tensor:
        """Return the positive scale nearest to `scale` `[channels]` by which the output can be divided."""

    def divide(self, scale: Tensor) -> None:
        """Divide the output by a reachable `scale` `[channels]`, in place."""


@dataclass(frozen=True)
class LinearFeed:
    """A linear: dividing its rows and bias divides its output."""

    linear: Linear

    @property
    def module(self) -> nn.Module:
        """The linear's module."""
        return self.linear.module

    def reachable(self, scale: Tensor) -> Tensor:
        """Return `scale`: a linear can be divided by any."""
        return scale

    def divide(self, scale: Tensor) -> None:
        """Divide the rows of the weight and the bias, rounding each value once."""
        weight = self.linear.weight
        weight.copy_(weight.float() / scale.to(weight.device)[:, None])
        _divide(self.module.bias, scale)


@dataclass(frozen=True)
class NormFeed:
    """A norm that multiplies its channels by `origin + weight`; `origin` is 0, or 1 as in Gemma.

    Its few numbers are computed in fp64 on the CPU, as not every device has fp64.
    """

    module: nn.Module
    origin: float

    def reachable(self, scale: Tensor) -> Tensor:
        """Return the scale that is left of `scale` once the norm's weight is rounded to its dtype.

        Rounding is coarse where `origin` is 1. The linears are multiplied by the scale returned here, so they
        agree with the norm. A channel whose factor would be rounded to zero keeps its weight.
        """
        wanted, before = scale.cpu().double(), self._factor()
        after = (before / wanted - self.origin).to(self._weight.dtype).double() + self.origin
        rounded = torch.where(before == 0, wanted, before / after)
        rounded = torch.where((after == 0) & (before != 0), torch.ones_like(rounded), rounded)
        return rounded.float().to(scale.device)

    def divide(self, scale: Tensor) -> None:
        """Divide the factor `origin + weight`, and the bias if there is one."""
        self._weight.copy_(self._factor() / scale.cpu() - self.origin)
        _divide(getattr(self.module, "bias", None), scale)

    @property
    def _weight(self) -> Tensor:
        return self.module.get_parameter("weight").data

    def _factor(self) -> Tensor:
        return self._weight.cpu().double() + self.origin


def find_feeds(groups: list[Group], block: Callable[[], list[Tensor]]) -> list[Feed | None]:
    """Return the feed of each group, None for a group without one.

    Args:
        groups: the groups of one block, in the order in which they compute.
        block: see `stages.compress.block_steps.Prepare`.
    """
    expected = block()
    feeds: list[Feed | None] = []
    for number, group in enumerate(groups):
        candidates = _candidates(group, groups[:number])
        feeds.append(next((feed for feed in candidates if _is_only_feed(feed, group, block, expected)), None))
    return feeds


def _divide(bias: Any, scale: Tensor) -> None:
    if bias is not None:
        bias.data.copy_(bias.data.float() / scale.to(bias.device))


def _candidates(group: Group, earlier: list[Group]) -> list[Feed]:
    """Return the module that made the group's inputs, or else earlier linears, nearest first."""
    width = group.inputs.shape[-1]
    linears = [linear for other in earlier for linear in other.linears if linear.weight.shape[0] == width]
    if group.feeder is None or not list(group.feeder.parameters()):
        return [LinearFeed(linear) for linear in reversed(linears)]
    if feeding := [linear for linear in linears if linear.module is group.feeder]:
        return [LinearFeed(feeding[0])]
    origin = _origin(group.feeder, group.inputs)
    return [] if origin is None else [NormFeed(group.feeder, origin)]


def _origin(module: nn.Module, inputs: Tensor) -> float | None:
    """Return the number a norm adds to its weight before multiplying by it; None if `module` is no such norm.

    With the weight at minus that number, the norm's output is zero.
    """
    parameters = dict(module.named_parameters())
    weight = parameters.get("weight")
    if not set(parameters) <= {"weight", "bias"} or weight is None or weight.shape != inputs.shape[-1:]:
        return None
    ramp = torch.linspace(-1, 2, len(weight), dtype=inputs.dtype, device=inputs.device)

    def is_silent(origin: float) -> bool:
        swapped = {name: torch.zeros_like(parameter) for name, parameter in parameters.items()}
        swapped["weight"] = torch.full_like(weight, -origin)
        return not torch.func.functional_call(module, swapped, (ramp[None, None],)).any()

    origins = [origin for origin in (0.0, 1.0) if is_silent(origin)]
    return origins[0] if len(origins) == 1 else None


def _is_only_feed(
    feed: Feed, group: Group, block: Callable[[], list[Tensor]], expected: list[Tensor]
) -> bool:
    """Tell whether the feed's output is the group's input, channel by channel, and the input of nothing else.

    Args:
        expected: what the block returns without any factors.
    """
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
        effects = block()
    finally:
        for handle in handles:
            handle.remove()
    return all(arrived) and all(map(_same, effects, expected))


def _same(actual: Tensor, expected: Tensor) -> bool:
    if expected.dtype != torch.float16:
        return torch.equal(actual, expected)
    wide = expected.float()
    return torch.allclose(actual.float(), wide, rtol=2**-8, atol=2**-8 * float(wide.abs().mean()))
