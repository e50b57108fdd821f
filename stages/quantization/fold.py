"""Folding: move a scale per channel from a group of linears into their feed; the output stays the same.

Linears that read x compute W x = (W * s)(x / s) for any positive scale s of the channels of x. The module
that writes x can write x / s at no cost: a norm divides its weight (and bias), a linear its rows (see
`stages.quantization.feeds`). AWQ and SmoothQuant choose s so that rounding loses less.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Self

from pydantic import model_validator

from stages.compress.capture import Group
from stages.compress.method import WeightMethod
from stages.core.errors import Refusal
from stages.corpus.windows import Calibration
from stages.quantization.feeds import Feed, find_feeds

if TYPE_CHECKING:
    from torch import Tensor


class Folding(WeightMethod):
    """A method that scales the inputs of a block's linears before it replaces their weights."""

    calibration: Calibration

    prepares = True

    @model_validator(mode="after")
    def _whole_blocks(self) -> Self:
        if (sequential := self.calibration.sequential) != "block":
            raise ValueError(
                f"calibration.sequential is {sequential}, but scales are folded into whole blocks; "
                "set sequential: block"
            )
        return self

    def prepare(self, groups: list[Group], block: Callable[[], list[Tensor]]) -> dict[str, list[str]]:
        """Fold a scale into the linears of every group with a feed; note those of the others as unscaled."""
        unscaled: list[str] = []
        for group, feed in zip(groups, find_feeds(groups, block), strict=True):
            names = [linear.name for linear in group.linears]
            if feed is None:
                unscaled += names
                continue
            try:
                scale = self.scale(
                    [linear.weight for linear in group.linears], group.statistic, feed.reachable
                )
                fold(group, feed, scale)
            except Refusal as refusal:
                raise type(refusal)(f"{', '.join(names)}: {refusal}") from refusal
            self.after_fold(group.statistic, scale)
        return {"unscaled_linears": unscaled}

    def scale(self, weights: list[Tensor], statistic: Any, reachable: Callable[[Tensor], Tensor]) -> Tensor:
        """Return the scale of a group, `[in]` fp32, all positive, as `reachable` returned it.

        Args:
            weights: `[out, in]` of each linear of the group.
            statistic: of the inputs they share.
            reachable: see `Feed`.
        """
        raise NotImplementedError

    def after_fold(self, statistic: Any, scale: Tensor) -> None:
        """Update the statistic of a group whose inputs are divided by `scale` from now on."""


def fold(group: Group, feed: Feed, scale: Tensor) -> None:
    """Divide the group's inputs by a reachable `scale` `[in]` fp32 and multiply its weights by it.

    Raises:
        Refusal: a changed weight exceeds the range of its dtype.
    """
    feed.divide(scale)
    changed = [parameter.data for parameter in feed.module.parameters(recurse=False)]
    for linear in group.linears:
        linear.weight.copy_(linear.weight.float() * scale.to(linear.weight.device))
        changed.append(linear.weight)
    if not all(tensor.isfinite().all() for tensor in changed):
        raise Refusal(
            f"folding in scales of {scale.min():.3g} to {scale.max():.3g} exceeds the range of "
            f"{changed[0].dtype}; set run.dtype to bfloat16 or float32."
        )
