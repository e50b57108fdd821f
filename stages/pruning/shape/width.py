"""Width pruning: the least important neurons of every MLP are removed, which makes the model smaller.

A neuron is an inside feature of an MLP: a row of gate and of up (of fc1 where there is no gate) and a column
of down. Every block keeps the same number, so the checkpoint stays plain. With g and u a neuron's rows:

- `ppm`, peak-to-peak magnitude (2512.22671; MAW in its first versions): (max g + |min g|) plus the same of u.
  The down projection is not used;
- `vow`: variance of g plus variance of u; `pon`: L1 norm of g times L1 norm of u; both from the same paper;
- `l2`: the L2 norm of g and u together;
- `activation`: the root mean square of the neuron's value over tokens (Minitron, 2407.14679);
- `llm-bip` (2412.06419): a bound on how much the block's output changes. Without the neuron, the MLP's
  output at a token changes by the neuron's value there times its column of down; over tokens, by the root
  mean square of the value times the L2 norm of the column. At most a norm follows inside the block, which
  stretches this by a factor that is the same for all its neurons (its Lipschitz constant) and is left out;
- `random`, the control.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from math import ceil
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from stages.compress.select import random_scores
from stages.core.errors import Refusal
from stages.core.lazy import torch
from stages.core.schema import Seed
from stages.pruning.shape.anatomy import Part, mlps
from stages.pruning.shape.neurons import cut_neurons, width_setting
from stages.pruning.shape.shrink import Cuts
from stages.pruning.shape.shrinker import Shrinker, change_bound, count_left

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel


class Width(Shrinker):
    """Keep the same number of neurons in every MLP, those of the highest importance.

    The number is rounded up, first to a whole one and then to a multiple of `multiple_of`, so that at most
    the given share is removed: 40 % of 8192 neurons removed leaves 4916, or 4992 as a multiple of 128.
    """

    method: Literal["width"]
    importance: Literal["ppm", "vow", "pon", "l2", "activation", "llm-bip", "random"]
    remove: Annotated[float, Field(ge=0, lt=1)] | None = None
    """The share of neurons to remove. Give this or `expansion`."""
    expansion: Annotated[float, Field(gt=0)] | None = None
    """The width to keep, divided by the hidden size."""
    multiple_of: Annotated[int, Field(ge=1)] = 1
    """The width is a multiple of this; 64 or 128 suit matrix units and group_size."""
    seed: Seed | None = None
    """Seed of the draw; only for importance random."""

    @model_validator(mode="after")
    def _one_target(self) -> Self:
        if (self.remove is None) == (self.expansion is None):
            raise ValueError("give exactly one of remove and expansion")
        return self

    def target(self, width: int, hidden: int) -> int:
        """Return how many of `width` neurons to keep.

        Raises:
            Refusal: more than there are.
        """
        if self.remove is not None:
            wanted, setting = count_left(width, self.remove, "neurons"), f"remove {self.remove:g}"
        else:
            assert self.expansion is not None
            wanted, setting = max(1, ceil(self.expansion * hidden - 1e-6)), f"expansion {self.expansion:g}"
        rounded = ceil(wanted / self.multiple_of) * self.multiple_of
        if rounded > width:
            raise Refusal(
                f"{setting} with multiple_of {self.multiple_of} keeps {rounded} neurons, but the model has "
                f"{width} (an expansion of {width / hidden:.4g}); keep fewer or lower multiple_of."
            )
        return rounded

    def scores(self, part: Part, rms: Tensor | None, name: str) -> Tensor:
        """Return the importance of the neurons of an MLP, `[width]` fp32.

        Args:
            rms: `[width]` fp32, the root mean square of the neurons' values, if importance is measured.
            name: of the block.
        """
        if self.importance == "random":
            assert self.seed is not None
            return random_scores(self.seed, name, part.width)
        if self.importance in BY_WEIGHT:
            return BY_WEIGHT[self.importance]([reader.weight.float() for reader in part.readers])
        assert rms is not None
        return rms if self.importance == "activation" else change_bound(part.writer.weight, rms)

    def parts(self, model: PreTrainedModel) -> dict[str, Part]:
        """Return the MLPs."""
        return mlps(model)

    def plan(
        self, model: PreTrainedModel, parts: Mapping[str, Part], rms: Mapping[str, Tensor]
    ) -> tuple[Cuts, dict[str, int], dict[str, Any]]:
        """Choose the neurons that remain in every block."""
        hidden, width = next(iter(parts.values())).writer.weight.shape
        count = self.target(width, hidden)
        scores = {name: self.scores(part, rms.get(name), name) for name, part in parts.items()}
        cuts = cut_neurons(parts, scores, count)
        notes = {"width": {"before": width, "after": count}, "expansion": count / hidden}
        return cuts, width_setting(model, cuts, width, count), notes


def peak_to_peak(weights: list[Tensor]) -> Tensor:
    """Return the sum over `weights`, each `[neurons, in]`, of max + |min| of every row (PPM): `[neurons]`."""
    return sum((weight.amax(1) + weight.amin(1).abs() for weight in weights), torch.tensor(0.0))


def variance(weights: list[Tensor]) -> Tensor:
    """Return the sum of the unbiased variances of every row (VOW)."""
    return sum((weight.var(1) for weight in weights), torch.tensor(0.0))


def norm_product(weights: list[Tensor]) -> Tensor:
    """Return the product of the L1 norms of every row (PON)."""
    return torch.stack([weight.abs().sum(1) for weight in weights]).prod(0)


def l2_norm(weights: list[Tensor]) -> Tensor:
    """Return the L2 norm of a neuron's rows together."""
    return torch.cat(weights, 1).square().sum(1).sqrt()


BY_WEIGHT: dict[str, Callable[[list[Tensor]], Tensor]] = {
    "ppm": peak_to_peak, "vow": variance, "pon": norm_product, "l2": l2_norm,
}  # fmt: skip
"""The importances that are computed from the weights of gate and up, or of the only first linear."""
