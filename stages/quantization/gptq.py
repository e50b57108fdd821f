"""GPTQ (2210.17323): round one column at a time and let the remaining columns compensate.

The loop and its algebra are those of `stages.compress.surgeon`; with H = I this is round to nearest.

Zeros of the source stay zero: a position that is zero when the method starts is rounded to the code of 0
whatever has been added to it since, and the error is passed on like any other rounding error (the joint form
of SparseGPT, 2301.00774). A dead column, whose feature is zero on every token, is rounded as it is and passes
nothing on.

The scale of a group is set when the group is reached, from the updated weights, or with `static_groups`
before the first column, from the source's. With `act_order`, columns are taken in descending order of the
Hessian's diagonal, so that the most important are rounded while most others can still compensate. The columns
of a group are then rounded at different times, so its scale must be static. Columns are stored in their
original order, in an ordinary file.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal, Self

from pydantic import Field, model_validator

from stages.compress.statistics import Hessian
from stages.compress.surgeon import COLUMNS, sweep
from stages.core.lazy import torch
from stages.corpus.windows import Calibration
from stages.model.grid import Codes
from stages.quantization.quantizer import IntegerQuantizer

if TYPE_CHECKING:
    from torch import Tensor


class GPTQ(IntegerQuantizer):
    """Round columns in order, compensating on later columns through the inverse Hessian."""

    method: Literal["gptq"]
    damping: Annotated[float, Field(gt=0, lt=1)] = 0.01
    """Share of the Hessian's mean diagonal to add to the diagonal."""
    act_order: bool = False
    """Whether columns are rounded by descending diagonal of the Hessian; needs static_groups."""
    static_groups: bool = False
    """Whether the scales of all groups are set from the source before any column is rounded."""
    calibration: Calibration

    statistic = Hessian
    on_dead = "rounded as they are"

    @model_validator(mode="after")
    def _agree(self) -> Self:
        if self.act_order and self.group_size and not self.static_groups:
            raise ValueError(
                "act_order mixes the columns of all groups, so their scales must be set before the first "
                "column; add static_groups: true, or set group_size: null"
            )
        if self.static_groups and self.group_size is None:
            raise ValueError("static_groups has no effect with group_size: null; leave it out")
        return self

    def weights(self, weight: Tensor, statistic: Hessian) -> Codes:
        """Return the codes of `weight` `[out, in]`; their scales have its dtype.

        Raises:
            Refusal: the damped Hessian is not positive definite.
        """
        factor = statistic.inverse_factor(self.damping, descending=self.act_order)
        columns, rows = weight.shape[1], weight.shape[0]
        order = statistic.order() if self.act_order else torch.arange(columns, device=weight.device)
        work = weight.float().T[order].contiguous()
        keep = work != 0
        size = self.group_size or columns
        static = self.static_groups or self.act_order
        place = order.tolist()
        scales: list[Tensor] = []
        zeros: list[Tensor] = []
        codes = torch.zeros(columns, rows, dtype=torch.int8, device=weight.device)

        def fit(group: Tensor) -> None:
            scale, zero = self.grid.fit(group, weight.dtype)
            scales.append(scale[:, 0])
            if zero is not None:
                zeros.append(zero[:, 0])

        def settle(j: int, column: Tensor) -> Tensor:
            if not static and j % size == 0:
                fit((work[j : j + size] * keep[j : j + size]).T)
            scale = scales[place[j] // size]
            zero = zeros[place[j] // size] if zeros else None
            codes[place[j]] = code = self.grid.round(column * keep[j], scale, zero)
            return ((code if zero is None else code - zero) * scale).to(weight.dtype).float()

        if static:
            for group in weight.float().split(size, 1):
                fit(group)
        # Where scales are set from updated weights, no group may straddle two panels.
        panel = COLUMNS if static or size == columns else size * max(1, COLUMNS // size)
        sweep(work, factor, settle, panel=panel)
        zero_point = torch.stack(zeros, 1) if zeros else None
        return self.grid.to_codes(codes.T, torch.stack(scales, 1), zero_point, weight.dtype)
