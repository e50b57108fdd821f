"""Quantization-aware training (1712.05877): what is trained is what rounding makes of the weights.

Each weight of the source's grid has an fp32 master. The forward pass sees the master rounded to the grid,
scales and zero points as the source has them. Rounding has a slope of zero nearly everywhere, so its gradient
is taken as if it were not there (the straight-through estimator, 1308.3432), but where a master has left the
range of the codes: there the rounded weight does not move with it, and the gradient is zero. Masters begin at
the source's weights, so at first nothing changes; a code does once its master is half a step away, so a
recipe of few steps wants a higher learning rate than plain training.

A code of zero may be a pruned weight or only a small one; the file cannot tell. `keep: mask` takes all of
them for pruned, as everything else in the project does; `keep: none` trains them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, ClassVar, Literal

from stages.recovery.adam import ByAdam, Publish
from stages.recovery.arm import Arm, Finished
from stages.recovery.grids import SourceGrid, integers, rounded, unfrozen
from stages.recovery.tuning import Tuning

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

    from stages.model.grid import Codes


class QAT(Tuning):
    """Train the weights on the source's grid through rounding, by AdamW on fp32 masters."""

    on_grid: ClassVar[bool] = True
    method: Literal["qat"]
    keep: Literal["mask", "none"] = "mask"
    """Whether weights that are zero in the source stay zero."""

    @property
    def refuses(self) -> Mapping[str, str]:
        """GPT-2, whose linears no format holds on a grid."""
        return {"gpt2": "no format holds codes of its Conv1D, so no source of it has a grid in its files"}

    def arm(self, model: PreTrainedModel, grid: SourceGrid | None) -> Arm:
        """Masters for every linear on the grid; nothing else is trained."""
        return Rounded(self, model, integers(grid))


class Rounded(ByAdam):
    """Weights that are their masters rounded to the grid after every step."""

    def __init__(self, recipe: QAT, model: PreTrainedModel, grid: Mapping[str, Codes]) -> None:
        self.model = model
        self._codes = dict(grid)
        weights = unfrozen(model, grid, recipe.ignore)
        self._zeros: dict[str, Tensor] = {}
        if recipe.keep == "mask":
            self._zeros = {name: weight == 0 for name, weight in weights.items()}
        self._open: dict[str, Tensor] = {name: ~zeros for name, zeros in self._zeros.items()}
        for name, weight in weights.items():
            weight.register_post_accumulate_grad_hook(self._straight_through(name))
        publish = {name: self._publish(name) for name in weights}
        super().__init__(weights, weight_decay=recipe.weight_decay, publish=publish)

    def _straight_through(self, name: str) -> Callable[[Tensor], None]:
        """The master's gradient from the weight's: none where it is pruned or beyond the codes; a hook."""

        def hook(weight: Tensor) -> None:
            assert weight.grad is not None
            if name in self._open:
                weight.grad.mul_(self._open[name])

        return hook

    def _publish(self, name: str) -> Publish:
        def publish(master: Tensor, weight: Tensor) -> Tensor:
            self._codes[name] = rounded(name, self._codes[name], master)
            inside = self._codes[name].inside(master)
            self._open[name] = inside & ~self._zeros[name] if name in self._zeros else inside
            return self._codes[name].dequantize().to(weight.dtype)

        return publish

    def finish(self) -> Finished:
        """The weights and their codes."""
        return Finished(self.model, keep=self._zeros, codes=self._codes)
