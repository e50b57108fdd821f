"""FP8 (2209.05433): eight-bit floats with four exponent and three mantissa bits. Needs no data.

Half the size of bf16, and twice the speed on hardware that multiplies E4M3 numbers if `activations` are
rounded to them as well. Any reader of the checkpoint does that rounding when the model runs, with a scale per
token, so it is part of the model evaluated here. Where a model passes a linear the tokens of all texts as one
matrix (OPT's fc1), transformers uses one scale for all of them, and an answer depends on the batch it is in.
See `stages.model.floats`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from stages.core.schema import NoData
from stages.model.floats import Float8
from stages.quantization.quantizer import Quantizer

if TYPE_CHECKING:
    from torch import Tensor


class FP8(Quantizer):
    """Round to the nearest E4M3 number, with the largest of each row (or of the matrix) scaled to 448."""

    method: Literal["fp8"]
    bits: Literal[8] = 8
    group_size: None = None
    strategy: Literal["channel", "tensor"] = "channel"
    """Whether each row has its own scale or the whole matrix shares one."""
    activations: Literal["none", "dynamic"] = "none"
    """Whether inputs are rounded to E4M3 too, with a scale per token computed as the model runs."""
    calibration: NoData

    @property
    def rounds_inputs(self) -> bool:
        """Whether `activations` are rounded."""
        return self.activations == "dynamic"

    def weights(self, weight: Tensor, statistic: None) -> Float8:
        """Return the codes of `weight` `[out, in]`; their scales have its dtype."""
        return Float8.nearest(weight, by_row=self.strategy == "channel", dynamic=self.rounds_inputs)
