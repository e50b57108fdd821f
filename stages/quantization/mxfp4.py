"""MXFP4 (2310.10537): four-bit floats with a power of two as scale for every 32 columns. Needs no data.

4.25 bits per weight. A power of two is a coarse scale: the largest value of a group lands between 3.5 and 7
while the grid ends at 6, so about two fifths of the range may go unused. NVFP4 pays a quarter of a bit for a
finer scale. See `stages.model.floats`. Weights only: activations stay as they are.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from stages.core.schema import NoData
from stages.model import floats
from stages.quantization.quantizer import Quantizer

if TYPE_CHECKING:
    from torch import Tensor


class MXFP4(Quantizer):
    """Round to the nearest E2M1 number times the power of two of its group."""

    method: Literal["mxfp4"]
    bits: Literal[4] = 4
    group_size: Literal[32] = 32
    calibration: NoData

    def weights(self, weight: Tensor, statistic: None) -> floats.MXFloat4:
        """Return the codes of `weight` `[out, in]`."""
        return floats.MXFloat4.nearest(weight)
