"""Round to nearest: each weight goes to the closest point of its group's grid. Needs no data."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from stages.core.schema import NoData
from stages.model.grid import Codes
from stages.quantization.quantizer import IntegerQuantizer

if TYPE_CHECKING:
    from torch import Tensor


class RTN(IntegerQuantizer):
    """Round to the nearest code of a grid of `bits` bits a `group_size` columns."""

    method: Literal["rtn"]
    calibration: NoData

    def weights(self, weight: Tensor, statistic: None) -> Codes:
        """Codes of `weight` `[out, in]`, scales in its dtype. Zeros stay zero, as 0 is on the grid."""
        return self.grid.nearest(weight)
