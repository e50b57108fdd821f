"""NVFP4 (2509.25149): four-bit floats with an eight-bit scale for every 16 columns. Needs no data.

4.5 bits per weight. E4M3 scales have a small range, so one fp32 number per matrix brings the largest of them
to 448. See `stages.model.floats`. Weights only: activations stay as they are. An engine that fuses q, k and
v, or gate and up, into one matrix uses one of their fp32 numbers for all and may lose precision.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from stages.core.schema import NoData
from stages.model import floats
from stages.quantization.quantizer import Quantizer

if TYPE_CHECKING:
    from torch import Tensor


class NVFP4(Quantizer):
    """Round to the nearest E2M1 number times the E4M3 scale of its group."""

    method: Literal["nvfp4"]
    bits: Literal[4] = 4
    group_size: Literal[16] = 16
    calibration: NoData

    def weights(self, weight: Tensor, statistic: None) -> floats.NVFloat4:
        """Return the codes of `weight` `[out, in]`."""
        return floats.NVFloat4.nearest(weight)
