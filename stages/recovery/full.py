"""Full fine-tuning: every parameter trains, but the frozen weights of the block linears.

Their gradient is taken away before it counts in the clipped norm or in a moment. So their moments are never
anything but zero, AdamW moves them by exactly nothing, and a mask is not lost in any step, the last included.
Weight decay would move them where they are not zero; there they get back the very numbers they had.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Literal

from stages.core.lazy import torch
from stages.recovery.adam import ByAdam, Publish
from stages.recovery.arm import Arm, Finished
from stages.recovery.keep import Keeping, moving

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

    from stages.recovery.grids import SourceGrid


class Full(Keeping):
    """Train every parameter with AdamW; matrices that `ignore` names are left alone."""

    method: Literal["full"]

    def arm(self, model: PreTrainedModel, grid: SourceGrid | None) -> Arm:
        """See `Tuning.arm`."""
        return _Full(model, self, grid)


class _Full(ByAdam):
    def __init__(self, model: PreTrainedModel, recipe: Full, grid: SourceGrid | None) -> None:
        from stages.model.blocks import blocks, linears

        self.model, self._recipe, self._grid = model, recipe, grid
        self._frozen = recipe.frozen(linears(model, recipe.ignore))
        left = tuple(f"{block}.{name}." for block, _ in blocks(model) for name in recipe.ignore)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(not f"{name}.".startswith(left))
        trained = {name: one for name, one in model.named_parameters() if one.requires_grad}
        decays = recipe.weight_decay > 0 and recipe.keep != "mask"
        publish = {f"{name}.weight": _holding(mask) for name, mask in self._frozen.items() if decays}
        super().__init__(trained, weight_decay=recipe.weight_decay, publish=publish)
        scratch = trained[next(iter(trained))].new_empty(
            max((mask.numel() for mask in self._frozen.values()), default=0), dtype=torch.float32
        )
        for name, mask in self._frozen.items():
            trained[f"{name}.weight"].register_post_accumulate_grad_hook(_without(mask, scratch))

    def finish(self) -> Finished:
        return self._recipe.finished(self.model, self._frozen, self._grid)


def _holding(frozen: Tensor) -> Publish:
    """The master where it may move, the weight as it is where it is frozen."""
    return lambda master, weight: torch.where(frozen, weight, master.to(weight.dtype))


def _without(frozen: Tensor, scratch: Tensor) -> Callable[[Tensor], None]:
    """Takes the frozen weights' gradient away, as a hook of the parameter.

    Args:
        scratch: fp32, at least as many as `frozen`, so that the product is one of a single dtype in memory
            that is there already.
    """
    kept, ones = moving(frozen), scratch[: frozen.numel()].view(frozen.shape)

    def hook(parameter: Tensor) -> None:
        assert parameter.grad is not None
        parameter.grad.mul_(ones.copy_(kept))

    return hook
