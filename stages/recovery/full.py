"""Full fine-tuning: every parameter trains, except the frozen weights of the block linears.

The gradient of frozen weights is zeroed before it counts in the clipped norm or in a moment. Their moments
stay zero, so AdamW moves them by exactly nothing, and no step breaks a mask, not even the last. Weight decay
would move those that are not zero, so they are put back bit for bit.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from stages.core.lazy import torch
from stages.model.blocks import blocks, linears
from stages.recovery.adam import AdamArm, Publish
from stages.recovery.arm import Arm, Recovered
from stages.recovery.freezing import GradientMasks, trainable_mask
from stages.recovery.keep import Keeping

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

    from stages.recovery.grids import SourceGrid


class Full(Keeping):
    """Train every parameter with AdamW, except matrices that `ignore` names."""

    method: Literal["full"]

    def arm(self, model: PreTrainedModel, grid: SourceGrid | None) -> Arm:
        """Return an arm for every parameter; see `Tuning.arm`."""
        return _FullArm(model, self, grid)


class _FullArm(AdamArm):
    def __init__(self, model: PreTrainedModel, recipe: Full, grid: SourceGrid | None) -> None:
        self.model, self._recipe, self._grid = model, recipe, grid
        self._frozen = recipe.frozen(linears(model, recipe.ignore))
        ignored = tuple(f"{block}.{name}." for block, _ in blocks(model) for name in recipe.ignore)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(not f"{name}.".startswith(ignored))
        trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
        frozen = {f"{name}.weight": mask for name, mask in self._frozen.items()}
        decays = recipe.weight_decay > 0 and recipe.keep != "mask"
        publish = {name: _holding(mask) for name, mask in frozen.items()} if decays else {}
        super().__init__(trained, weight_decay=recipe.weight_decay, publish=publish)
        trainable = {name: trainable_mask(mask) for name, mask in frozen.items()}
        self.masks = GradientMasks(trained, trainable)

    def finish(self) -> Recovered:
        return self._recipe.recovered(self.model, self._frozen, self._grid)


def _holding(frozen: Tensor) -> Publish:
    """Return a function that publishes the master, except where the weight is frozen."""
    return lambda master, weight: torch.where(frozen, weight, master.to(weight.dtype))
