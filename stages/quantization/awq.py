"""AWQ (2306.00978): scale up the input channels that matter before rounding, and undo it upstream.

A channel with large inputs costs the most when its weights are rounded. Multiplied by s > 1 before rounding,
and its input divided by s, a weight of it is rounded s times more finely, for as long as it does not stretch
the scale of its group. The scales of a group of linears are mean|x|^alpha a channel, divided by
sqrt(max * min), and alpha is searched on a grid in [0, 1): the one with the least squared error of the
group's outputs over all tokens. That error is exact from the Hessian of the inputs, tr(D H DT) with
D = dequantized(W s) / s - W, so no activation is kept. At alpha 0 this is round to nearest, which the search
therefore never falls behind.

`clip` then searches for each group of the grid how much its range may shrink, by the error of that group's
own columns. Zeros of the source stay zero: neither a scale nor a narrower range moves them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field

from stages.compress.statistics import Hessian
from stages.core.lazy import torch
from stages.model.grid import Codes
from stages.quantization.fold import Folding
from stages.quantization.quantizer import IntegerQuantizer

if TYPE_CHECKING:
    from torch import Tensor

STRIPE = 192
"""Columns of a Hessian multiplied at a time, so that little of its empty half is."""
SHRINKS = tuple(1 - step / 20 for step in range(10))
"""The shares of a group's range that the search for clipping tries."""


class Activations(Hessian):
    """The Hessian of a linear's inputs and how large each of them is."""

    def __init__(self, in_features: int, device: torch.device) -> None:
        super().__init__(in_features, device)
        self._sizes = torch.zeros(in_features, device=device)

    def _add(self, inputs: Tensor) -> None:
        super()._add(inputs)
        self._sizes += inputs.float().abs().sum(0)

    def magnitude(self) -> Tensor:
        """`[in]` fp32: mean over tokens of |x_j|."""
        return self._sizes / self.num_tokens

    def divide(self, scale: Tensor) -> None:
        """Become the statistic of the inputs divided by `scale` `[in]`."""
        self._sizes /= scale
        self._sum /= scale[:, None] * scale


class AWQ(Folding, IntegerQuantizer):
    """Round to nearest after a search for the scale of each input channel."""

    method: Literal["awq"]
    num_alphas: Annotated[int, Field(ge=1)] = 20
    """How many exponents are tried, evenly spaced from 0 to below 1."""
    clip: bool = False
    """Whether to search for a narrower range of each group of the grid as well."""

    statistic = Activations

    def scale(
        self, weights: list[Tensor], statistic: Activations, reachable: Callable[[Tensor], Tensor]
    ) -> Tensor:
        """The candidate with the least error summed over `weights` `[out, in]`; ties take the lower alpha."""
        magnitude, upper = statistic.magnitude(), statistic.matrix().triu()
        upper.diagonal().div_(2)
        unit = unit_of(torch.stack([weight.abs().amax() for weight in weights]).amax())
        best, least = torch.ones_like(magnitude), torch.tensor(torch.inf)
        for step in range(self.num_alphas):
            scale = reachable(candidate(magnitude, step / self.num_alphas))
            error = torch.stack([self._error(weight, scale, upper, unit) for weight in weights]).sum()
            if error < least:
                best, least = scale, error
        return best

    def folded(self, statistic: Activations, scale: Tensor) -> None:
        """The statistic is of the scaled inputs from now on."""
        statistic.divide(scale)

    def weights(self, weight: Tensor, statistic: Activations) -> Codes:
        """Codes of the scaled `weight` `[out, in]`, scales in its dtype."""
        return self.grid.nearest(self.clipped(weight, statistic.matrix()) if self.clip else weight)

    def clipped(self, weight: Tensor, hessian: Tensor) -> Tensor:
        """`weight` `[out, in]` cut off where that lowers the error of a group's columns by themselves."""
        size = self.group_size or weight.shape[1]
        groups = weight.float().view(len(weight), -1, size)
        low, high = groups.amin(2, keepdim=True).clamp(max=0), groups.amax(2, keepdim=True).clamp(min=0)
        if self.symmetric:
            high = torch.maximum(-low, high)
            low = -high
        within = torch.stack([hessian[at : at + size, at : at + size] for at in range(0, len(hessian), size)])
        unit = unit_of(torch.maximum(-low, high))
        best = weight
        least = torch.full(groups.shape[:2], torch.inf, device=weight.device)
        for shrink in SHRINKS:
            tried = groups.clamp(low * shrink, high * shrink).view_as(weight).to(weight.dtype)
            lost = (self.grid.nearest(tried).dequantize().float() - weight.float()).view_as(groups)
            lost = (lost * unit).transpose(0, 1)
            error = ((lost @ within) * lost).sum(2).T
            better = error < least
            best = torch.where(better.repeat_interleave(size, 1), tried, best)
            least = torch.where(better, error, least)
        return best

    def _error(self, weight: Tensor, scale: Tensor, upper: Tensor, unit: Tensor) -> Tensor:
        """tr(D H DT) of rounding `weight` `[out, in]` under `scale` `[in]`, H = `upper` + its transpose.

        D is taken times `unit`.
        """
        scaled = (weight.float() * scale).to(weight.dtype)
        lost = self.grid.nearest(scaled).dequantize().float() / scale - weight.float()
        lost *= unit
        halves = [
            ((lost[:, :stop] @ upper[:stop, stop - STRIPE : stop]) * lost[:, stop - STRIPE : stop]).sum()
            for stop in range(STRIPE, len(upper) + STRIPE, STRIPE)
        ]
        return 2 * torch.stack(halves).sum()


def unit_of(size: Tensor) -> Tensor:
    """A power of two next to 1 / `size`, fp32: errors times it can be squared, and lose no digit by it."""
    exponent = torch.frexp(size.float()).exponent.clamp(-126, 126)
    return torch.ldexp(torch.ones_like(size, dtype=torch.float32), -exponent)


def candidate(magnitude: Tensor, alpha: float) -> Tensor:
    """magnitude^alpha divided by sqrt(max * min), `[in]` fp32.

    A channel that was zero on every token counts as large as the least of the others.
    """
    seen = magnitude[magnitude > 0]
    if not len(seen):
        return torch.ones_like(magnitude)
    scale = magnitude.clamp(min=seen.min()) ** alpha
    return scale / (scale.max() * scale.min()).sqrt()
