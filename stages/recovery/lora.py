"""LoRA (2106.09685) that leaves frozen weights alone, in training, in the merge and in the file.

A plain adapter trains W + BA and merges it, which fills every zero of W. Here the layer computes W + M * BA,
with M the positions that are not frozen (`stages.recovery.keep`), in the forward pass as in the merge. What
is trained is what is merged, and a pruned weight stays exactly zero. The price is the full-size product BA
once per forward pass and linear, small beside the forward pass of a few hundred tokens, and a full-size
gradient of it in the backward pass. With `keep: none` there is no mask, and peft's own layer is used.

On a quantized source these are adapters over its dequantized weights (QLoRA, 2305.14314, without its grid).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field

from stages.core.lazy import importing, torch
from stages.model.blocks import linears
from stages.recovery.adam import AdamArm
from stages.recovery.arm import Arm, Recovered
from stages.recovery.freezing import trainable_mask
from stages.recovery.keep import Keeping

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from stages.recovery.grids import SourceGrid


class LoRA(Keeping):
    """Train low-rank updates of every block linear, and merge them where weights are not frozen."""

    method: Literal["lora"]
    rank: Annotated[int, Field(ge=1)]
    alpha: Annotated[float, Field(gt=0)]
    """The update is scaled by alpha / rank."""

    def arm(self, model: PreTrainedModel, grid: SourceGrid | None) -> Arm:
        """Return an arm for the adapters; see `Tuning.arm`."""
        return _LoRAArm(model, self, grid)


class _LoRAArm(AdamArm):
    def __init__(self, model: PreTrainedModel, recipe: LoRA, grid: SourceGrid | None) -> None:
        with importing():
            import peft
        from transformers.pytorch_utils import Conv1D

        from stages.recovery.masked import MaskedLinear

        self._recipe, self._grid = recipe, grid
        targets = linears(model, recipe.ignore)
        frozen = recipe.frozen(targets)
        self._trainable = {name: trainable_mask(frozen.pop(name)) for name in list(frozen)}
        config = peft.LoraConfig(
            r=recipe.rank,
            lora_alpha=recipe.alpha,
            target_modules=[linear.name for linear in targets],
            fan_in_fan_out=targets[0].transposed,
            task_type="CAUSAL_LM",
        )
        if self._trainable:
            config._register_custom_module({torch.nn.Linear: MaskedLinear, Conv1D: MaskedLinear})
        torch.manual_seed(recipe.seed)
        self._adapted = peft.get_peft_model(model, config)
        self.model = self._adapted.get_base_model()
        for name, trainable in self._trainable.items():
            layer = self.model.get_submodule(name)
            assert isinstance(layer, MaskedLinear)
            layer.trainable_mask = trainable
        trained = {
            name: parameter for name, parameter in self.model.named_parameters() if parameter.requires_grad
        }
        super().__init__(trained, weight_decay=recipe.weight_decay)

    def finish(self) -> Recovered:
        model = self._adapted.eval().merge_and_unload()
        frozen = {name: trainable == 0 for name, trainable in self._trainable.items()}
        return self._recipe.recovered(model, frozen, self._grid)
