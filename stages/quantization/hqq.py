"""HQQ (half-quadratic quantization, Badri and Shaji 2023, mobiusml.github.io/hqq_blog). Needs no data.

The grid of each group is fitted so that sum |w - ŵ|^p is small with p < 1, which forgives outliers that a
square would not. Half-quadratic splitting turns this into two steps with closed solutions: shrink w - ŵ, by
the shrinkage that belongs to p, to an error e; fit the grid to w - e by least squares. Then the tie between e
and w - ŵ is tightened (beta times kappa) and both steps are repeated.

The published method fits the zero point alone and lets it be any real number. Here it is a whole number, so
that 0 stays on the grid, zeros stay zero and the file is an ordinary one. Moving a whole zero point alone
gains nothing, since it shifts every value by a step, so the least squares fit the scale as well. Of all grids
on the way, each group keeps the one with the least error; the first of them is that of round to nearest. A
smaller error in the weights does not promise a better model.
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
    """False is the published method; true leaves only the scale to fit."""
    lp_norm: Annotated[float, Field(gt=0, lt=1)] = 0.7
    """The exponent p."""
    beta: Annotated[float, Field(gt=0)] = 10.0
    """How tightly e is tied to the error at first. At 10, the weights of a language model, about a hundredth
    in size, are fitted by least squares alone; larger values give up more of the outliers for the other
    weights."""
    kappa: Annotated[float, Field(ge=1)] = 1.01
    """Factor by which beta grows per iteration."""
    iterations: Annotated[int, Field(ge=1)] = 20
    """At most; the method stops once the error of a matrix no longer falls."""
    calibration: NoData

    def weights(self, weight: Tensor, statistic: None) -> Codes:
        """Return the codes of `weight` `[out, in]`; their scales have its dtype."""
        groups = weight.float().reshape(-1, self.group_size or weight.shape[1])
        low, high = bounds(self.bits)
        best_scale, best_zero = self.grid.fit(groups, weight.dtype)
        scale, zero = best_scale, torch.zeros_like(best_scale) if best_zero is None else best_zero
        error = best = self.error(groups, best_scale, best_zero)
        beta, before = self.beta, torch.inf
        for _ in range(self.iterations):
            if not error.sum() < before:
                break
            before = float(error.sum())
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
            error = self.error(groups, scale, whole)
            better = error < best
            best, best_scale = torch.where(better, error, best), torch.where(better, scale, best_scale)
            if best_zero is not None and whole is not None:
                best_zero = torch.where(better, whole, best_zero)
        best_codes = self.grid.round(groups, best_scale, best_zero).view(weight.shape)
        rows = len(weight)
        zero_point = None if best_zero is None else best_zero.view(rows, -1)
        return self.grid.to_codes(best_codes, best_scale.view(rows, -1), zero_point, weight.dtype)

    def error(self, groups: Tensor, scale: Tensor, zero_point: Tensor | None) -> Tensor:
        """Return sum |w - ŵ|^p of each row of `groups` `[rows, columns]`, `[rows, 1]`."""
        codes = self.grid.round(groups, scale, zero_point)
        near = (codes if zero_point is None else codes - zero_point) * scale
        return (groups - near).abs().pow(self.lp_norm).sum(1, keepdim=True)
