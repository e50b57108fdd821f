"""Which weights do not train: a mask's zeros, or the small weights of a model that is not pruned.

A frozen weight keeps the value it has when training begins, bit for bit. Four arms of Junk DNA (2310.02277):

- `mask`: the zeros of the source are frozen, so what was sparse stays sparse.
- `none`: nothing is; a sparse source may become dense again.
- `small`: the weights that magnitude pruning would remove keep their values ("dense with freezing").
- `shuffled`: the same weights, permuted among themselves within each matrix before training. Where this is
  worse than `small`, it is the values of small weights that counted, not that so many were left out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Literal, Self

from pydantic import Field, model_validator

from stages.compress.select import grown, lowest
from stages.core.lazy import torch
from stages.core.numbers import count_of, generator
from stages.core.schema import Strict
from stages.model.blocks import Linear
from stages.recovery.arm import Finished
from stages.recovery.grids import put_on
from stages.recovery.tuning import Tuning

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

    from stages.recovery.grids import SourceGrid


class Small(Strict):
    """Which weights are small: those that the method `magnitude` would make zero."""

    sparsity: Annotated[float, Field(gt=0, lt=1)]
    """Their share."""
    scope: Literal["matrix", "global", "row"] = "matrix"
    """What a weight is compared with."""

    def of(self, found: Sequence[Linear]) -> dict[str, Tensor]:
        """Where they are in each linear, bool `[out, in]`, by name; zeros are, ties fall to the first."""
        scores = {one.name: one.weight.float().abs() for one in found}
        if self.scope == "global":
            flat = torch.cat([score.flatten() for score in scores.values()])
            chosen = grown(flat, flat == 0, count_of(self.sparsity, len(flat)))
            parts = chosen.split([score.numel() for score in scores.values()])
            return {one.name: part.view(one.weight.shape) for one, part in zip(found, parts, strict=True)}
        by_row = self.scope == "row"
        return {
            name: lowest(score.__getitem__, score == 0, count_of(self.sparsity, score.numel()), by_row=by_row)
            for name, score in scores.items()
        }


class Keeping(Tuning):
    """Training in which some weights of the block linears are frozen."""

    keep: Literal["mask", "none", "small", "shuffled"] = "mask"
    """What is frozen; see the module."""
    small: Small | None = None
    """With keep `small` or `shuffled`: which weights those are."""
    requantize: bool | None = None
    """Of a quantized source, and only there: whether the result is rounded on its grid again, or dense."""

    @model_validator(mode="after")
    def _small_is_said(self) -> Self:
        wanted = self.keep in ("small", "shuffled")
        if wanted and self.small is None:
            raise ValueError(f"keep {self.keep} needs small, such as small: {{sparsity: 0.5, scope: matrix}}")
        if not wanted and self.small is not None:
            raise ValueError(
                f"keep {self.keep} has no use for small; leave it out, or say keep: small or shuffled"
            )
        return self

    def frozen(self, found: Sequence[Linear]) -> dict[str, Tensor]:
        """Where each linear's weight is frozen, bool, shaped as stored, by name; empty for keep none.

        With `shuffled` the frozen weights are permuted in place.
        """
        if self.keep == "none":
            return {}
        if self.keep == "mask":
            return {one.name: one.module.get_parameter("weight").data == 0 for one in found}
        assert self.small is not None
        small = self.small.of(found)
        if self.keep == "shuffled":
            for one in found:
                _shuffle(one.weight, small[one.name], f"{self.seed} {one.name}")
        return {one.name: (small[one.name].T if one.transposed else small[one.name]) for one in found}

    def finished(
        self, model: PreTrainedModel, frozen: Mapping[str, Tensor], grid: SourceGrid | None
    ) -> Finished:
        """What was trained with these weights `frozen`, on the source's grid again where asked for."""
        model = model.requires_grad_(False).eval()
        codes = put_on(grid, model) if grid and self.requantize else {}
        notes = {"frozen_weights": sum(int(mask.sum()) for mask in frozen.values())}
        return Finished(model, keep=frozen if self.keep == "mask" else {}, codes=codes, notes=notes)


def moving(frozen: Tensor) -> Tensor:
    """1 where weights train and 0 where they are `frozen`, int8; a CPU multiplies faster than it fills."""
    return (~frozen).view(torch.int8)


def _shuffle(weight: Tensor, chosen: Tensor, salt: str) -> None:
    """Permute the `chosen` entries of `weight` `[out, in]` in place, by a draw that `salt` decides alone."""
    draw = generator(salt)
    values = weight[chosen]
    weight[chosen] = values[torch.randperm(len(values), generator=draw).to(values.device)]
