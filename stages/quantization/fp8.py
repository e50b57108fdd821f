"""FP8 (2209.05433): eight-bit floats of four exponent and three mantissa bits. Needs no data.

Half the size of bf16, and on hardware that multiplies E4M3 numbers twice the speed, when `activations` are
rounded to them as well. That is done when the model runs, with a scale found for each token, by any reader
of the checkpoint; it is part of the model that is evaluated here. Where a model hands a linear the tokens of
all texts as one matrix (OPT's fc1), transformers finds one scale for all of them, so that an answer depends
on what it is batched with. See `stages.model.floats`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from stages.core.schema import NoData
from stages.model.floats import Float8
from stages.quantization.quantizer import Quantizer

if TYPE_CHECKING:
    from torch import Tensor


class FP8(Quantizer):
    """Round to the nearest E4M3 number, the largest of each row (or matrix) brought to 448."""

    method: Literal["fp8"]
    bits: Literal[8] = 8
    group_size: None = None
    strategy: Literal["channel", "tensor"] = "channel"
    """What shares a scale: a row, or the whole matrix."""
    activations: Literal["none", "dynamic"] = "none"
    """Whether inputs are rounded to E4M3 too, with a scale a token found as the model runs."""
    calibration: NoData

    @property
    def rounds_inputs(self) -> bool:
        """As `activations` says."""
        return self.activations == "dynamic"

    def weights(self, weight: Tensor, statistic: None) -> Float8:
        """Codes of `weight` `[out, in]`, scales in its dtype."""
        return Float8.nearest(weight, by_row=self.strategy == "channel", dynamic=self.rounds_inputs)
