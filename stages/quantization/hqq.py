"""HQQ (half-quadratic quantization, Badri and Shaji 2023, mobiusml.github.io/hqq_blog). Needs no data.

The grid of a group is moved so that sum |w - ŵ|^p is small with p < 1, which forgives outliers what a square
would not. Half-quadratic splitting makes that two steps that are each solved at once: an error e is drawn
towards w - ŵ by the shrinkage that belongs to p, and the grid is fitted to w - e by least squares; then the
tie between e and w - ŵ is tightened (beta times kappa), and again.

The published method fits the zero point alone and lets it be any real number. Here it is a whole number,
so that 0 stays on the grid, zeros stay zeros and the file is an ordinary one; moving it alone then gains
nothing (a step of it is a step of every value), so the same least squares fit the scale as well. Of all grids
passed through, each group keeps the one with the least error, and round to nearest's is the first of them.
Less error in the weights is no promise of less in what the model says.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field

from stages.core.lazy import torch
from stages.core.schema import NoData
from stages.model.grid import Codes, bounds
from stages.quantization.quantizer import IntegerQuantizer

if TYPE_CHECKING:
    from torch import Tensor


class HQQ(IntegerQuantizer):
    """Fit each group's scale and zero point to the weights by a norm that forgives outliers."""

    method: Literal["hqq"]
    symmetric: bool = False
    """False is the method as it is meant; true leaves the scale alone to be fitted."""
    lp_norm: Annotated[float, Field(gt=0, lt=1)] = 0.7
    """p."""
    beta: Annotated[float, Field(gt=0)] = 10.0
    """How tightly e is tied to the error at first. At 10 weights of a language model, a hundredth or so, are
    fitted by least squares alone; the larger, the more is given up of outliers for the rest."""
    kappa: Annotated[float, Field(ge=1)] = 1.01
    """What beta grows by each time."""
    iterations: Annotated[int, Field(ge=1)] = 20
    """At most; the method ends when the errors of a matrix no longer fall."""
    calibration: NoData

    def weights(self, weight: Tensor, statistic: None) -> Codes:
        """Codes of `weight` `[out, in]`, scales in its dtype."""
        groups = weight.float().reshape(-1, self.group_size or weight.shape[1])
        low, high = bounds(self.bits)
        best_scale, best_zero = self.grid.fit(groups, weight.dtype)
        scale, zero = best_scale, torch.zeros_like(best_scale) if best_zero is None else best_zero
        loss = best = self.loss(groups, best_scale, best_zero)
        beta, before = self.beta, torch.inf
        for _ in range(self.iterations):
            if not loss.sum() < before:
                break
            before = float(loss.sum())
            codes = (groups / scale + zero).round().clamp(low, high)
            away = groups - (codes - zero) * scale
            shrunk = away.abs() - away.abs().clamp(min=1e-12) ** (self.lp_norm - 1) / beta
            target = groups - away.sign() * shrunk.clamp(min=0)
            if best_zero is not None:
                zero = (codes - target / scale).mean(1, keepdim=True).clamp(low, high)
            steps = codes - zero
            fitted = (target * steps).sum(1, keepdim=True) / steps.square().sum(1, keepdim=True)
            fitted = fitted.to(weight.dtype).float()
            scale = torch.where((fitted > 0) & fitted.isfinite(), fitted, scale)
            beta *= self.kappa
            whole = None if best_zero is None else zero.round()
            loss = self.loss(groups, scale, whole)
            better = loss < best
            best, best_scale = torch.where(better, loss, best), torch.where(better, scale, best_scale)
            if best_zero is not None and whole is not None:
                best_zero = torch.where(better, whole, best_zero)
        made = self.grid.round(groups, best_scale, best_zero).view(weight.shape)
        rows = len(weight)
        zero_point = None if best_zero is None else best_zero.view(rows, -1)
        return self.grid.made(made, best_scale.view(rows, -1), zero_point, weight.dtype)

    def loss(self, groups: Tensor, scale: Tensor, zero_point: Tensor | None) -> Tensor:
        """sum |w - ŵ|^p of each row of `groups` `[rows, columns]`, `[rows, 1]`."""
        codes = self.grid.round(groups, scale, zero_point)
        near = (codes if zero_point is None else codes - zero_point) * scale
        return (groups - near).abs().pow(self.lp_norm).sum(1, keepdim=True)
