"""SmoothQuant (2211.10438): 8-bit weights and 8-bit inputs, with the difficulty shared between the two.

Rounded to 8 bits with one scale per token, inputs suffer from the few channels that are a hundred times
larger than the rest, while weights have room to spare. Each channel's input is divided, and its weights
multiplied, by s_j = max|x_j|^alpha / max|W_j|^(1 - alpha), which makes the two maxima equal at alpha 0.5. The
maximum of W_j is over all linears that read the channel.

Weights are rounded here, one scale per row; inputs are rounded when the model runs, one scale per token, as
the checkpoint's format says. A family whose linears the format does not know is refused, because its inputs
would not be rounded. Where a model passes a linear `[tokens, in]` without a dimension of windows (OPT's fc1
and fc2), transformers uses one scale for all tokens of a batch; the record names those linears.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field

from stages.compress.statistics import Statistic
from stages.core.lazy import torch
from stages.core.numbers import finite
from stages.model.grid import Int8, Integers
from stages.quantization.fold import Folding
from stages.quantization.quantizer import Quantizer

if TYPE_CHECKING:
    from torch import Tensor

    from stages.compress.capture import Group


class InputPeak(Statistic):
    """The largest magnitude of every input feature."""

    def __init__(self, in_features: int, device: torch.device) -> None:
        super().__init__(in_features, device)
        self._peak = torch.zeros(in_features, device=device)

    def _add(self, inputs: Tensor) -> None:
        self._peak = torch.maximum(self._peak, inputs.abs().amax(0).float())

    def finite(self) -> bool:
        """Tell whether the peaks of all features are finite."""
        return finite(self._peak)

    def dead(self) -> Tensor:
        """Return the features that were zero on every token, `[in_features]` bool."""
        return self._peak == 0

    def peak(self) -> Tensor:
        """Return the maximum over tokens of |x_j|, `[in_features]` fp32."""
        return self._peak


class SmoothQuant(Folding, Quantizer):
    """Balance inputs against weights, then round both to 8 bits."""

    method: Literal["smoothquant"]
    alpha: Annotated[float, Field(ge=0, le=1)] = 0.5
    """0 makes the columns of the weights equally large, 1 those of the inputs; in between, both move."""
    bits: Literal[8] = 8
    group_size: None = None

    statistic = InputPeak

    @property
    def rounds_inputs(self) -> bool:
        """Always true."""
        return True

    def prepare(self, groups: list[Group], block: Callable[[], list[Tensor]]) -> dict[str, list[str]]:
        """Fold, and note the linears whose inputs transformers rounds with one scale per batch."""
        shared = [linear.name for group in groups if group.inputs.ndim == 2 for linear in group.linears]
        return {**super().prepare(groups, block), "inputs_share_a_scale": shared}

    def scale(
        self, weights: list[Tensor], statistic: InputPeak, reachable: Callable[[Tensor], Tensor]
    ) -> Tensor:
        """Return max|x|^alpha / max|W|^(1 - alpha) over `weights` `[out, in]`, 1 where either is zero."""
        inputs = statistic.peak()
        columns = torch.stack([weight.abs().amax(0) for weight in weights]).amax(0).float()
        scale = inputs**self.alpha / columns ** (1 - self.alpha)
        return reachable(torch.where((inputs == 0) | (columns == 0), torch.ones_like(scale), scale))

    def weights(self, weight: Tensor, statistic: InputPeak) -> Int8:
        """Return the codes of the scaled `weight` `[out, in]`, with one scale per row in its dtype."""
        nearest = Integers(8, None).nearest(weight)
        return Int8(nearest.codes, nearest.scale)
