"""Folding: a scale a channel moves from what feeds a group of linears into the linears, and nothing changes.

Linears that read x compute W x = (W * s)(x / s) for any positive scale s of x's channels. What wrote x can
write x / s at no cost: a norm divides its weight (and bias), a linear its rows (see `stages.quantization.feeds`).
AWQ and SmoothQuant choose s so that what is rounded afterwards loses less.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Self

from pydantic import model_validator

from stages.compress.method import WeightMethod
from stages.compress.walk import Group
from stages.core.errors import Refusal
from stages.corpus.windows import Calibration
from stages.quantization.feeds import Feed, feeds

if TYPE_CHECKING:
    from torch import Tensor


class Folding(WeightMethod):
    """A method that scales the inputs of a block's linears before it replaces their weights."""

    calibration: Calibration

    prepares = True

    @model_validator(mode="after")
    def _whole_blocks(self) -> Self:
        if (given := self.calibration.sequential) != "block":
            raise ValueError(
                f"calibration.sequential is {given}; a scale is folded into a block as a whole, from "
                "statistics of all of it: say sequential: block"
            )
        return self

    def prepare(self, groups: list[Group], block: Callable[[], Any]) -> dict[str, list[str]]:
        """Fold a scale into the linears of every group that has a feed; notes those left `unscaled`."""
        unscaled: list[str] = []
        for group, feed in zip(groups, feeds(groups, block), strict=True):
            if feed is None:
                unscaled += [linear.name for linear in group.linears]
                continue
            try:
                scale = self.scale([one.weight for one in group.linears], group.statistic, feed.reachable)
                fold(group, feed, scale)
            except Refusal as refusal:
                raise type(refusal)(f"{', '.join(one.name for one in group.linears)}: {refusal}") from refusal
            self.folded(group.statistic, scale)
        return {"unscaled_linears": unscaled}

    def scale(self, weights: list[Tensor], statistic: Any, reachable: Callable[[Tensor], Tensor]) -> Tensor:
        """The scale `[in]` of a group, all positive, fp32, as `reachable` returns it.

        Args:
            weights: of the group's linears, `[out, in]` each.
            statistic: of the inputs they share.
            reachable: see `Feed`.
        """
        raise NotImplementedError

    def folded(self, statistic: Any, scale: Tensor) -> None:
        """Told when a group's inputs have been divided by `scale`, which its statistic has not seen."""


def fold(group: Group, feed: Feed, scale: Tensor) -> None:
    """Divide what the group reads by a reachable `scale` `[in]` fp32 and multiply its weights by it.

    Raises:
        Refusal: a weight that its dtype cannot hold any more.
    """
    feed.divide(scale)
    changed = [parameter.data for parameter in feed.module.parameters(recurse=False)]
    for linear in group.linears:
        linear.weight.copy_(linear.weight.float() * scale)
        changed.append(linear.weight)
    if not all(tensor.isfinite().all() for tensor in changed):
        raise Refusal(
            f"folding scales of {scale.min():.3g} to {scale.max():.3g} into it leaves the range of "
            f"{changed[0].dtype}; run in bfloat16 or float32."
        )
