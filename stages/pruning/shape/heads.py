"""Head pruning: the least important attention heads of every block are removed.

A head is a slice of attention: rows of q, k and v, columns of o. With grouped queries (2305.13245) several
query heads share one key and value head. Either such groups are removed as a whole (`unit: groups`; without
sharing, a group is a head), or every group loses the same number of its query heads and the keys and values
stay (`unit: queries`): otherwise groups would differ in size, which no config can describe. The importance of
a unit is (see `stages.pruning.shape.width` for the last two):

- `magnitude`: the L2 norm of all weights that are removed with it (as for filters in 1608.08710);
- `activation`: the root mean square over tokens of the input of o from its heads (Minitron, 2407.14679);
- `llm-bip` (2412.06419): a bound on how much the attention's output changes without it, the sum over its
  features of their root mean square times the L2 norm of their column of o;
- `random`, the control.

Fewer heads need a config in which `head_dim` is a setting of its own: in OPT, GPT-NeoX and GPT-2 it is the
hidden size over the number of heads, so they are refused. So is a family whose heads depend on each other
before o, through a norm over all of them (BitNet) or in pairs (DiffLlama).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from stages.compress.select import random_scores
from stages.core.errors import Refusal
from stages.core.schema import Seed
from stages.pruning.shape.anatomy import Part, attentions
from stages.pruning.shape.attention import NO_FEWER, HeadLayout, Unit, cut_heads, head_settings, layout_of
from stages.pruning.shape.shrink import Cuts
from stages.pruning.shape.shrinker import Shrinker, change_bound, count_left

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel


class Heads(Shrinker):
    """Keep the same number of heads in every block, those of the highest importance."""

    method: Literal["heads"]
    importance: Literal["magnitude", "activation", "llm-bip", "random"]
    unit: Unit = "groups"
    """What is removed: key and value heads with their query heads, or as many query heads of each group."""
    remove: Annotated[float, Field(ge=0, lt=1)] | None = None
    """The share of units to remove (of each group's query heads for `unit: queries`); the number kept is
    rounded up. Give this or `keep`."""
    keep: Annotated[int, Field(ge=1)] | None = None
    """The number of query heads that remain."""
    seed: Seed | None = None
    """Seed of the draw; only for importance random."""

    @model_validator(mode="after")
    def _one_target(self) -> Self:
        if (self.remove is None) == (self.keep is None):
            raise ValueError("give exactly one of remove and keep")
        return self

    @property
    def refuses(self) -> Mapping[str, str]:
        """Families in which the size of a head is the hidden size over the number of heads."""
        return dict.fromkeys(("opt", "gpt_neox", "gpt2"), f"{NO_FEWER}; remove neurons or blocks instead")

    def target(self, layout: HeadLayout) -> HeadLayout:
        """Return the heads that remain.

        Raises:
            Refusal: they do not spread evenly over groups, are more than there are, or none would go.
        """
        by_group = self.unit == "groups"
        if not by_group and layout.shared == 1:
            raise Refusal("every query head has its own keys and values; remove them with unit: groups.")
        if by_group and layout.groups == 1:
            raise Refusal("all query heads share one key and value head; remove some with unit: queries.")
        count, step = (layout.groups, layout.shared) if by_group else (layout.shared, layout.groups)
        if self.keep is None:
            assert self.remove is not None
            left = count_left(count, self.remove, "groups" if by_group else "query heads of a group")
        else:
            left = self.keep // step
            if self.keep % step or left > count:
                raise Refusal(
                    f"keep {self.keep} of {layout.queries} query heads ({layout.groups} groups of "
                    f"{layout.shared}): allowed with unit {self.unit}: "
                    f"{', '.join(str(step * n) for n in range(1, count + 1))}."
                )
        return HeadLayout(left * step, left if by_group else layout.groups, layout.size)

    def parts(self, model: PreTrainedModel) -> dict[str, Part]:
        """Return the attentions."""
        return attentions(model)

    def plan(
        self, model: PreTrainedModel, parts: Mapping[str, Part], rms: Mapping[str, Tensor]
    ) -> tuple[Cuts, dict[str, int], dict[str, Any]]:
        """Choose the heads that remain in every block."""
        first = next(iter(parts.values()))
        before = layout_of(model, first)
        after = self.target(before)
        notes = {"heads": {"before": before.queries, "after": after.queries}}
        if after == before:
            return {}, {}, notes
        scores = {name: self.scores(part, rms.get(name), before, name) for name, part in parts.items()}
        cuts, kept = cut_heads(model, parts, scores, before, after, self.unit)
        return cuts, head_settings(model, after), {"heads": {**notes["heads"], "kept": kept}}

    def scores(self, part: Part, rms: Tensor | None, layout: HeadLayout, name: str) -> Tensor:
        """Return the importance of the units of a block, `[groups]` or `[queries]` fp32.

        Args:
            rms: `[queries * size]` fp32, the root mean square of the input of o over tokens.
            name: of the block.
        """
        count = layout.groups if self.unit == "groups" else layout.queries
        if self.importance == "random":
            assert self.seed is not None
            return random_scores(self.seed, name, count)
        writer = part.writer.weight.float()
        if self.importance == "magnitude":
            squares = writer.square().sum(0).view(count, -1).sum(1)
            for reader in part.readers:
                # keys and values are removed only with their group
                if self.unit == "groups" or reader.weight.shape[0] == part.width:
                    squares = squares + reader.weight.float().square().sum(1).view(count, -1).sum(1)
            return squares.sqrt()
        assert rms is not None
        if self.importance == "activation":
            return rms.square().view(count, -1).sum(1).sqrt()
        return change_bound(writer, rms).view(count, -1).sum(1)
