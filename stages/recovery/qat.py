"""Quantization-aware training (1712.05877): the forward pass computes with rounded weights.

Each weight on the source's grid has an fp32 master, and the forward pass sees the master rounded to the grid,
with the scales and zero points of the source. The slope of rounding is zero nearly everywhere, so
gradients pass it as if it were the identity (the straight-through estimator, 1308.3432), except where a
master is beyond the range of the codes: there the rounded weight does not move with it, and the gradient is
zero.

Masters start at the source's weights, so nothing changes at first; a code changes once its master is half a
grid step away. A recipe of few steps therefore needs a higher learning rate than plain training.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from stages.core.lazy import torch
from stages.recovery.adam import AdamArm, Publish
from stages.recovery.arm import Arm, Recovered
from stages.recovery.freezing import GradientMasks, trainable_mask
from stages.recovery.ongrid import GridWeights, OnGrid

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

    from stages.recovery.grids import SourceGrid


class QAT(OnGrid):
    """Train the weights on the source's grid through rounding, by AdamW on fp32 masters."""

    method: Literal["qat"]

    def arm(self, model: PreTrainedModel, grid: SourceGrid | None) -> Arm:
        """Return an arm with masters for every linear on the grid."""
        return _QATArm(self, model, grid)


class _QATArm(AdamArm):
    """Weights that are their masters rounded to the grid after every step."""

    def __init__(self, recipe: QAT, model: PreTrainedModel, grid: SourceGrid | None) -> None:
        self.model = model
        self._weights = GridWeights(recipe, model, grid)
        weights, zeros = self._weights.parameters, self._weights.zeros
        self._trainable = {
            name: trainable_mask(zeros[name]) if name in zeros else torch.ones_like(weight, dtype=torch.int8)
            for name, weight in weights.items()
        }
        self.masks = GradientMasks(weights, self._trainable)
        publish = {name: self._publish(name) for name in weights}
        super().__init__(weights, weight_decay=recipe.weight_decay, publish=publish)

    def _publish(self, name: str) -> Publish:
        """Return a function that rounds a master, and lets its gradient through where it is not clamped."""

        def publish(master: Tensor, weight: Tensor) -> Tensor:
            codes = self._weights.round(name, master)
            inside = codes.inside(master)
            if name in self._weights.zeros:
                inside &= ~self._weights.zeros[name]
            self._trainable[name].copy_(inside)
            return codes.dequantize().to(weight.dtype)

        return publish

    def finish(self) -> Recovered:
        return self._weights.recovered()
