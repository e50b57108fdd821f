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

from stages.compress.rounding import Rounding
from stages.compress.statistics import Hessian
from stages.compress.surgeon import COLUMNS, check_errors, side_by_side, sweep
from stages.corpus.windows import Calibration
from stages.model.grid import Codes
from stages.quantization.quantizer import IntegerQuantizer

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from torch import Tensor

    from stages.model.blocks import Linear


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

    def replace_group(self, linears: Sequence[Linear], statistic: Hessian, plan: int) -> Iterator[Codes]:
        """Yield the codes of linears that share their inputs; they are swept side by side."""
        return self._swept([linear.weight for linear in linears], statistic)

    def weights(self, weight: Tensor, statistic: Hessian) -> Codes:
        """Return the codes of `weight` `[out, in]`; their scales have its dtype.

        Raises:
            Refusal: the damped Hessian is not positive definite, or errors overflow.
        """
        return next(self._swept([weight], statistic))

    def _swept(self, weights: Sequence[Tensor], statistic: Hessian) -> Iterator[Codes]:
        factor = statistic.inverse_factor(self.damping, descending=self.act_order)
        order = statistic.order() if self.act_order else None
        source, parts = side_by_side(weights)
        work = source if order is None else source[order]
        gone = work == 0
        rounding = Rounding(self.grid, work, weights[0].dtype, order)
        size, columns = rounding.size, len(work)

        def fit(start: int) -> None:
            group = slice(start, start + size)
            rounding.fit(start // size, work[group].masked_fill(gone[group], 0))

        if self.static_groups or self.act_order or size == columns:
            for number, group in enumerate(source.split(size)):
                rounding.fit(number, group)
            worst = sweep(work, factor, gone, rounding)
        else:  # no group may straddle two panels
            panel = size * max(1, COLUMNS // size)
            worst = sweep(work, factor, gone, rounding, begin=fit, unit=size, panel=panel)
        for rows in parts:
            check_errors(worst[rows])
            yield rounding.result(rows)
