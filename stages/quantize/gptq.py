"""GPTQ (2210.17323): round one column at a time and let the columns still to come make up for it.

The loop and its algebra are those of `stages.core.surgeon`; with H = I this is round to nearest.

Zeros of the source stay zero: a position that is zero when the method starts is rounded to code 0
whatever has been added to it since, and what that costs is passed on like any other rounding error
(the joint form of SparseGPT, 2301.00774). Scales are set when a group is reached, from the updated
weights. A feature no token ever moved (a dead column) is rounded as it is and passes nothing on.
"""

from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from stages.core.calibration import Calibration
from stages.core.grid import Codes, round_to_codes, scale_of
from stages.core.statistics import Hessian
from stages.core.surgeon import COLUMNS, sweep
from stages.quantize.options import IntegerQuantizer


class GPTQ(IntegerQuantizer):
    """Round columns in order, compensating on later columns through the inverse Hessian."""

    method: Literal["gptq"]
    damping: Annotated[float, Field(gt=0, lt=1)] = 0.01
    """Share of the Hessian's mean diagonal added to it."""
    calibration: Calibration

    statistic = Hessian

    def weights(self, weight: Tensor, statistic: Hessian) -> Codes:
        """Codes of `weight` `[out, in]`, scales in its dtype.

        Raises:
            Refusal: the damped Hessian is not positive definite.
        """
        factor = statistic.inverse_factor(self.damping)
        work, keep = weight.float().T.contiguous(), (weight != 0).T.contiguous()
        columns, rows = work.shape
        size = self.group_size or columns
        codes = torch.zeros(columns, rows, dtype=torch.int8, device=weight.device)
        scales: list[Tensor] = []

        def settle(j: int, column: Tensor) -> Tensor:
            if j % size == 0:
                group = slice(j, j + size)
                scales.append(scale_of((work[group] * keep[group]).T, self.bits, weight.dtype)[:, 0])
            code = round_to_codes(column, scales[-1], self.bits) * keep[j]
            codes[j] = code.to(torch.int8)
            return (code * scales[-1]).to(weight.dtype).float()

        # No group may straddle two runs, as its scale is set from values that are up to date.
        run = size * max(1, COLUMNS // size) if self.group_size else COLUMNS
        sweep(work, factor, settle, run=run)
        scale = torch.stack(scales, 1).to(weight.dtype)
        return Codes(codes.T.contiguous(), scale, self.bits, self.group_size)
