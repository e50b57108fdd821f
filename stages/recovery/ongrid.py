"""Training on the grid of a quantized source, which `qat` and `eco` share.

The linears on the grid are trained and nothing else is. They are on the grid after every step, with the
scales and zero points of the source, so the result is written packed as the source is.

A code of zero may be a pruned weight or just a small one; the file does not tell. `keep: mask` treats them
all as pruned, like the rest of the project; `keep: none` trains them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar, Literal

from stages.core.lazy import torch
from stages.model.blocks import linears
from stages.model.grid import Codes
from stages.recovery.arm import Recovered
from stages.recovery.grids import SourceGrid, round_to_grid
from stages.recovery.tuning import Tuning

if TYPE_CHECKING:
    from torch import Tensor, nn
    from transformers import PreTrainedModel


class OnGrid(Tuning):
    """Train the weights on the source's integer grid."""

    on_grid: ClassVar[bool] = True
    keep: Literal["mask", "none"] = "mask"
    """Whether weights that are zero in the source stay zero."""

    @property
    def refuses(self) -> Mapping[str, str]:
        """GPT-2, whose linears no format holds on a grid."""
        return {"gpt2": "no format holds codes of its Conv1D, so its files have no grid"}


class GridWeights:
    """The weights of a model on its source's grid. From here on they alone get gradients, in fp32.

    Args:
        grid: the source's, of a kind that `check_source` accepts.

    Attributes:
        codes: of every linear on the grid, those of `ignore` too, by name.
        parameters: the weights of the linears that train, by name.
        zeros: where weights must stay zero, bool, by name; empty with `keep: none`.
    """

    def __init__(self, recipe: OnGrid, model: PreTrainedModel, grid: SourceGrid | None) -> None:
        self._model = model
        self.codes = {name: code for name, code in (grid or {}).items() if isinstance(code, Codes)}
        names = [linear.name for linear in linears(model, recipe.ignore) if linear.name in self.codes]
        self.parameters: dict[str, nn.Parameter] = {
            name: model.get_parameter(f"{name}.weight") for name in names
        }
        model.requires_grad_(False)
        for weight in self.parameters.values():
            weight.requires_grad_(True)
            weight.grad_dtype = torch.float32
        self.zeros: dict[str, Tensor] = {}
        if recipe.keep == "mask":
            self.zeros = {name: weight == 0 for name, weight in self.parameters.items()}

    def round(self, name: str, weight: Tensor) -> Codes:
        """Round `weight` `[out, in]` to the grid of linear `name`; keep and return its codes.

        Raises:
            Refusal: see `round_to_grid`.
        """
        self.codes[name] = round_to_grid(name, self.codes[name], weight)
        return self.codes[name]

    def recovered(self) -> Recovered:
        """Return the model with its codes."""
        return Recovered(self._model, zeros=self.zeros, codes=self.codes)
