"""Round to nearest: each weight goes to the closest point of its group's grid. Needs no data."""

from typing import Literal

import torch
from torch import Tensor

from stages.core.grid import Codes, round_to_codes, scale_of
from stages.core.schema import NoData
from stages.quantize.options import Quantizer


class RTN(Quantizer):
    """Round to the nearest code of a symmetric grid of `bits` bits a `group_size` columns."""

    method: Literal["rtn"]
    calibration: NoData

    def weights(self, weight: Tensor, statistic: None) -> Codes:
        """Codes of `weight` `[out, in]`, scales in its dtype. Zeros stay zero, as code 0 is exactly 0."""
        size = self.group_size or weight.shape[1]
        groups = weight.float().reshape(-1, size)
        scale = scale_of(groups, self.bits, weight.dtype)
        return Codes(
            codes=round_to_codes(groups, scale, self.bits).to(torch.int8).view(weight.shape),
            scale=scale.to(weight.dtype).view(weight.shape[0], -1),
            bits=self.bits,
            group_size=self.group_size,
        )
