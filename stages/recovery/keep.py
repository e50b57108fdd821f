"""Which weights do not train: the zeros of a mask, or the small weights of a dense model.

A frozen weight keeps the value it has when training begins, bit for bit. The four conditions of Junk DNA
(2310.02277):

- `mask`: the zeros of the source are frozen, so a sparse model stays sparse.
- `none`: nothing is frozen; a sparse source may become dense again.
- `small`: the weights that magnitude pruning would remove keep their values ("dense with freezing").
- `shuffled`: the same weights, permuted among themselves within each matrix before training. If this is worse
  than `small`, the values of small weights matter, not just how many are frozen.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Literal, Self

from pydantic import Field, model_validator

from stages.compress.select import extend_mask, extend_overall
from stages.core.lazy import torch
from stages.core.numbers import count_of, generator
from stages.core.schema import Strict
from stages.model.blocks import Linear
from stages.recovery.arm import Recovered
from stages.recovery.grids import requantize_model
from stages.recovery.tuning import Tuning

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

    from stages.recovery.grids import SourceGrid


class Small(Strict):
    """Which weights are small: those that the method `magnitude` would make zero."""

    sparsity: Annotated[float, Field(gt=0, lt=1)]
    """Share of the weights that are small."""
    scope: Literal["matrix", "global", "row"] = "matrix"
    """The weights a weight is compared with."""

    def masks(self, linears: Sequence[Linear]) -> dict[str, Tensor]:
        """Return where each linear's weight is small, bool `[out, in]`, by name.

        Zeros are always small; ties go to the first.
        """
        scores = {linear.name: linear.weight.float().abs() for linear in linears}
        if self.scope == "global":
            flat = torch.cat([score.flatten() for score in scores.values()])
            chosen = extend_overall(flat, flat == 0, count_of(self.sparsity, len(flat)))
            parts = chosen.split([score.numel() for score in scores.values()])
            return {name: part.view(scores[name].shape) for name, part in zip(scores, parts, strict=True)}
        by_row = self.scope == "row"
        return {
            name: extend_mask(
                score.__getitem__, score == 0, count_of(self.sparsity, score.numel()), by_row=by_row
            )
            for name, score in scores.items()
        }


class Keeping(Tuning):
    """Training in which some weights of the block linears are frozen."""

    keep: Literal["mask", "none", "small", "shuffled"] = "mask"
    """Which weights are frozen; see the module."""
    small: Small | None = None
    """Which weights are small, with keep `small` or `shuffled`."""
    requantize: bool | None = None
    """Whether the result of a quantized source is rounded to its grid again or written dense. Required for a
    quantized source, refused for any other."""

    @model_validator(mode="after")
    def _small_is_used(self) -> Self:
        uses_small = self.keep in ("small", "shuffled")
        if uses_small and self.small is None:
            raise ValueError(f"keep {self.keep} needs small, such as small: {{sparsity: 0.5, scope: matrix}}")
        if not uses_small and self.small is not None:
            raise ValueError(
                f"small has no effect with keep {self.keep}; leave it out, or set keep: small or shuffled"
            )
        return self

    def frozen(self, linears: Sequence[Linear]) -> dict[str, Tensor]:
        """Return where each linear's weight is frozen, bool, shaped as stored, by name; empty for keep none.

        With `shuffled` the frozen weights are permuted in place.
        """
        if self.keep == "none":
            return {}
        if self.keep == "mask":
            return {linear.name: linear.module.get_parameter("weight").data == 0 for linear in linears}
        assert self.small is not None
        small = self.small.masks(linears)
        if self.keep == "shuffled":
            for linear in linears:
                _shuffle(linear.weight, small[linear.name], f"{self.seed} {linear.name}")
        return {
            linear.name: small[linear.name].T if linear.transposed else small[linear.name]
            for linear in linears
        }

    def recovered(
        self, model: PreTrainedModel, frozen: Mapping[str, Tensor], grid: SourceGrid | None
    ) -> Recovered:
        """Return the model trained with `frozen` weights, on the source's grid again with `requantize`."""
        model = model.requires_grad_(False).eval()
        codes = requantize_model(grid, model) if grid and self.requantize else {}
        notes = {"frozen_weights": sum(int(mask.sum()) for mask in frozen.values())}
        return Recovered(model, zeros=frozen if self.keep == "mask" else {}, codes=codes, notes=notes)


def _shuffle(weight: Tensor, chosen: Tensor, draw: str) -> None:
    """Permute the `chosen` entries of `weight` `[out, in]` in place.

    Args:
        draw: the name of the draw, which seeds it; see `generator`.
    """
    values = weight[chosen]
    order = torch.randperm(len(values), generator=generator(draw))
    weight[chosen] = values[order.to(values.device)]
