"""Width pruning: the least important neurons of every MLP are removed, and the model is smaller for it.

A neuron is an inside feature of an MLP: a row of gate and of up (of fc1 where there is no gate) and a column
of down. Every block keeps the same number, so the checkpoint stays plain. With g and u a neuron's rows:

- `ppm`, peak-to-peak magnitude (2512.22671; MAW in its first versions): (max g + |min g|) plus the same of u.
  The down projection is not used;
- `vow`: variance of g plus variance of u; `pon`: L1 norm of g times L1 norm of u; both from the same paper;
- `l2`: the L2 norm of g and u together;
- `activation`: the root mean square of the neuron's value over tokens (Minitron, 2407.14679);
- `llm-bip` (2412.06419): a bound on how much the block's output changes. Without the neuron, the MLP's
  output at a token changes by its value there times its column of down: over tokens, by the root mean square
  of the one times the L2 norm of the other. What follows inside the block, a norm at most, stretches that by
  a factor alike for all its neurons (its Lipschitz constant), which is left out;
- `random`, the control.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import fields
from math import ceil
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from stages.compress.select import drawn
from stages.core.errors import Refusal
from stages.core.lazy import torch
from stages.core.schema import Seed
from stages.pruning.shape.anatomy import Part, mlps
from stages.pruning.shape.shrink import Cuts, columns, misfits, rows
from stages.pruning.shape.shrinker import Shrinker, change_bound, most_important, remaining

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel


class Width(Shrinker):
    """Keep the same number of neurons in every MLP, those of the highest importance.

    The number is rounded up, first to a whole one and then to a multiple of `multiple_of`, so that never
    more is removed than asked for: 40 % of 8192 neurons removed leaves 4916, or 4992 as a multiple of 64.
    """

    method: Literal["width"]
    importance: Literal["ppm", "vow", "pon", "l2", "activation", "llm-bip", "random"]
    remove: Annotated[float, Field(ge=0, lt=1)] | None = None
    """The share of the neurons that goes; or:"""
    expansion: Annotated[float, Field(gt=0)] | None = None
    """The width to keep over the hidden size."""
    multiple_of: Annotated[int, Field(ge=1)] = 1
    """What the width must be a multiple of; 64 or 128 suit matrix units and group_size."""
    seed: Seed | None = None
    """Of importance random."""

    @model_validator(mode="after")
    def _one_target(self) -> Self:
        if (self.remove is None) == (self.expansion is None):
            raise ValueError("give exactly one of remove and expansion")
        return self

    def kept(self, width: int, hidden: int) -> int:
        """How many of `width` neurons are kept.

        Raises:
            Refusal: more than there are.
        """
        if self.remove is not None:
            wanted, said = remaining(width, self.remove, "neurons"), f"remove {self.remove:g}"
        else:
            assert self.expansion is not None
            wanted, said = max(1, ceil(self.expansion * hidden - 1e-6)), f"expansion {self.expansion:g}"
        rounded = ceil(wanted / self.multiple_of) * self.multiple_of
        if rounded > width:
            raise Refusal(
                f"{said} with multiple_of {self.multiple_of} keeps {rounded} neurons, the model has {width} "
                f"(an expansion of {width / hidden:.4g}); keep fewer or lower multiple_of."
            )
        return rounded

    def scores(self, part: Part, loudness: Tensor | None, name: str) -> Tensor:
        """The importance of the neurons of an MLP, `[width]` fp32.

        Args:
            loudness: `[width]` fp32, the root mean square of the neurons' values, for what is measured.
            name: of the block.
        """
        if self.importance == "random":
            assert self.seed is not None
            return drawn(self.seed, name, part.width)
        if self.importance in BY_WEIGHT:
            return BY_WEIGHT[self.importance]([one.weight.float() for one in part.readers])
        assert loudness is not None
        return loudness if self.importance == "activation" else change_bound(part.writer.weight, loudness)

    def parts(self, model: PreTrainedModel) -> dict[str, Part]:
        """The MLPs."""
        return mlps(model)

    def plan(
        self, model: PreTrainedModel, parts: Mapping[str, Part], loudness: Mapping[str, Tensor]
    ) -> tuple[Cuts, dict[str, int], dict[str, Any]]:
        """The neurons kept of every block."""
        hidden, width = next(iter(parts.values())).writer.weight.shape
        count = self.kept(width, hidden)
        cuts: Cuts = {}
        for name, part in parts.items():
            indices = most_important(self.scores(part, loudness.get(name), name), count)
            for one in part.readers:
                cuts |= rows(one, indices)
            cuts |= columns(part.writer, indices)
        notes = {"width": {"before": width, "after": count}, "expansion": count / hidden}
        return cuts, ruling(model, cuts, width, count), notes


def peak_to_peak(weights: list[Tensor]) -> Tensor:
    """Sum over `weights`, each `[neurons, in]`, of max + |min| of every row (PPM): `[neurons]`."""
    return sum((weight.amax(1) + weight.amin(1).abs() for weight in weights), torch.tensor(0.0))


def variance(weights: list[Tensor]) -> Tensor:
    """Sum of the unbiased variances of every row (VOW)."""
    return sum((weight.var(1) for weight in weights), torch.tensor(0.0))


def norm_product(weights: list[Tensor]) -> Tensor:
    """Product of the L1 norms of every row (PON)."""
    return torch.stack([weight.abs().sum(1) for weight in weights]).prod(0)


def l2_norm(weights: list[Tensor]) -> Tensor:
    """The L2 norm of a neuron's rows together."""
    return torch.cat(weights, 1).square().sum(1).sqrt()


BY_WEIGHT: dict[str, Callable[[list[Tensor]], Tensor]] = {
    "ppm": peak_to_peak, "vow": variance, "pon": norm_product, "l2": l2_norm,
}  # fmt: skip


def ruling(model: PreTrainedModel, cuts: Cuts, width: int, count: int) -> dict[str, int]:
    """The config's number that rules the width of the MLPs, by its key, set to `count`.

    It is found by trying: those that are `width` now, and those that are unset, where a family derives it.

    Raises:
        Refusal: none rules it alone.
    """
    if count == width:
        return {}
    for key in _candidates(model.config.get_text_config(), width):
        if not misfits(model, cuts, {key: count}):
            return {key: count}
    raise Refusal(
        f"{type(model).__name__} cannot lose neurons: its config has no number that rules the width of its "
        f"MLPs ({width}) and nothing else."
    )


def _candidates(config: Any, width: int) -> Iterator[str]:
    values = {field.name: getattr(config, field.name, None) for field in fields(config)}
    yield from (key for key, value in values.items() if type(value) is int and value == width)
    numbers = {field.name for field in fields(config) if "int" in str(field.type)}
    yield from (key for key, value in values.items() if value is None and key in numbers)
