"""Round to nearest: each weight moves to the closest point of its group's grid. Needs no data."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from stages.core.schema import NoData
from stages.model.grid import Codes
from stages.quantization.quantizer import IntegerQuantizer

if TYPE_CHECKING:
    from torch import Tensor


class RTN(IntegerQuantizer):
    """Round to the nearest code of a `bits`-bit grid with one scale per `group_size` columns."""

    method: Literal["rtn"]
    calibration: NoData

    def weights(self, weight: Tensor, statistic: None) -> Codes:
        """Return the codes of `weight` `[out, in]`; their scales have its dtype. Zeros stay zero."""
        return self.grid.nearest(weight)
