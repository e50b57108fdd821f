"""AWQ (2306.00978): scale up important input channels before rounding, and undo the scale upstream.

Rounding costs most in channels with large inputs. If a channel's weights are multiplied by s > 1 before
rounding and its input is divided by s, the weights are rounded s times more finely, as long as they do not
stretch the scale of their group. Candidate scales of a group of linears are mean|x|^alpha per channel,
divided by sqrt(max * min), with alpha on a grid in [0, 1); the candidate with the least squared error of the
group's outputs over all tokens wins. That error follows exactly from the Hessian of the inputs, tr(D H DT)
with D = dequantized(W s) / s - W, so no activations are kept. Alpha 0 is round to nearest, so the search
never does worse.

`clip` then searches how far the range of each grid group may shrink, by the error of that group's columns
alone. Zeros of the source stay zero: neither scaling nor clipping moves them.
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

_STRIPE = 192
"""Columns of a Hessian multiplied at a time; narrow stripes waste little on its empty half."""
_SHRINKS = tuple(1 - step / 20 for step in range(10))
"""Shares of a group's range that clipping tries."""


class Activations(Hessian):
    """The Hessian of a linear's inputs, and the mean magnitude of each input."""

    def __init__(self, in_features: int, device: torch.device) -> None:
        super().__init__(in_features, device)
        self._magnitudes = torch.zeros(in_features, device=device)

    def _add(self, inputs: Tensor) -> None:
        super()._add(inputs)
        self._magnitudes += inputs.float().abs().sum(0)

    def magnitude(self) -> Tensor:
        """Return the mean over tokens of |x_j|, `[in]` fp32."""
        return self._magnitudes / self.num_tokens

    def divide(self, scale: Tensor) -> None:
        """Turn this into the statistic of the inputs divided by `scale` `[in]`."""
        self._magnitudes /= scale
        self._sum /= scale[:, None] * scale


class AWQ(Folding, IntegerQuantizer):
    """Search for a scale of each input channel, then round to nearest."""

    method: Literal["awq"]
    num_alphas: Annotated[int, Field(ge=1)] = 20
    """Number of exponents to try, evenly spaced from 0 to below 1."""
    clip: bool = False
    """Whether to search for a narrower range of each grid group as well."""

    statistic = Activations

    def scale(
        self, weights: list[Tensor], statistic: Activations, reachable: Callable[[Tensor], Tensor]
    ) -> Tensor:
        """Return the candidate with the least error summed over `weights` `[out, in]`.

        Ties go to the lower alpha.
        """
        magnitude, upper = statistic.magnitude(), statistic.matrix().triu()
        upper.diagonal().div_(2)
        unit = inverse_power_of_two(torch.stack([weight.abs().amax() for weight in weights]).amax())
        best, least = torch.ones_like(magnitude), torch.tensor(torch.inf)
        for step in range(self.num_alphas):
            scale = reachable(channel_scale(magnitude, step / self.num_alphas))
            error = torch.stack([self.output_error(weight, scale, upper, unit) for weight in weights]).sum()
            if error < least:
                best, least = scale, error
        return best

    def after_fold(self, statistic: Activations, scale: Tensor) -> None:
        """Divide the statistic by `scale`, as its inputs are."""
        statistic.divide(scale)

    def weights(self, weight: Tensor, statistic: Activations) -> Codes:
        """Return the codes of the scaled `weight` `[out, in]`; their scales have its dtype."""
        return self.grid.nearest(self.clipped(weight, statistic.matrix()) if self.clip else weight)

    def clipped(self, weight: Tensor, hessian: Tensor) -> Tensor:
        """Return `weight` `[out, in]`, clipped where that lowers the error of a group's columns alone."""
        size = self.group_size or weight.shape[1]
        groups = weight.float().view(len(weight), -1, size)
        low, high = groups.amin(2, keepdim=True).clamp(max=0), groups.amax(2, keepdim=True).clamp(min=0)
        if self.symmetric:
            high = torch.maximum(-low, high)
            low = -high
        hessians = torch.stack(
            [hessian[at : at + size, at : at + size] for at in range(0, len(hessian), size)]
        )
        unit = inverse_power_of_two(torch.maximum(-low, high))
        best = weight
        least = torch.full(groups.shape[:2], torch.inf, device=weight.device)
        for shrink in _SHRINKS:
            clamped = groups.clamp(low * shrink, high * shrink).view_as(weight).to(weight.dtype)
            lost = (self.grid.nearest(clamped).dequantize().float() - weight.float()).view_as(groups)
            lost = (lost * unit).transpose(0, 1)
            error = ((lost @ hessians) * lost).sum(2).T
            better = error < least
            best = torch.where(better.repeat_interleave(size, 1), clamped, best)
            least = torch.where(better, error, least)
        return best

    def output_error(self, weight: Tensor, scale: Tensor, upper: Tensor, unit: Tensor) -> Tensor:
        """Return tr(D H DT) of rounding `weight` `[out, in]` under `scale` `[in]`.

        Args:
            upper: `[in, in]`, with H = `upper` + its transpose.
            unit: scalar by which D is multiplied.
        """
        scaled = (weight.float() * scale).to(weight.dtype)
        lost = self.grid.nearest(scaled).dequantize().float() / scale - weight.float()
        lost *= unit
        halves = [
            ((lost[:, :stop] @ upper[:stop, stop - _STRIPE : stop]) * lost[:, stop - _STRIPE : stop]).sum()
            for stop in range(_STRIPE, len(upper) + _STRIPE, _STRIPE)
        ]
        return 2 * torch.stack(halves).sum()


def inverse_power_of_two(size: Tensor) -> Tensor:
    """Return the power of two next to 1 / `size`, fp32.

    Errors multiplied by it can be squared in fp32, and the product is exact.
    """
    exponent = torch.frexp(size.float()).exponent.clamp(-126, 126)
    return torch.ldexp(torch.ones_like(size, dtype=torch.float32), -exponent)


def channel_scale(magnitude: Tensor, alpha: float) -> Tensor:
    """Return magnitude^alpha divided by sqrt(max * min), `[in]` fp32.

    A channel that was zero on every token gets the smallest magnitude of the others.
    """
    positive = magnitude[magnitude > 0]
    if not len(positive):
        return torch.ones_like(magnitude)
    scale = magnitude.clamp(min=positive.min()) ** alpha
    return scale / (scale.max() * scale.min()).sqrt()
