"""Head pruning: the least important attention heads of every block are removed.

A head is a slice of attention: rows of q, k and v, columns of o. With grouped queries (2305.13245) several
query heads share one key and value head. Either such a group goes as a whole (`unit: groups`; where nothing
is shared, a group is a head), or every group loses the same number of its query heads and the keys and values
stay (`unit: queries`): anything else would leave groups of unequal size, which no config can say. How
important a unit is (see `stages.pruning.shape.width` for the last two):

- `magnitude`: the L2 norm of all the weights that go with it (as for filters in 1608.08710);
- `activation`: the root mean square over tokens of what its heads hand to o (Minitron, 2407.14679);
- `llm-bip` (2412.06419): a bound on how much the attention's output changes without it, the sum over its
  features of their root mean square times the L2 norm of their column of o;
- `random`, the control.

Only a family whose config gives `head_dim` a say of its own can have fewer heads: in OPT, GPT-NeoX and GPT-2
a head is the hidden size over the number of heads, so they are refused. So is a family whose heads reach each
other before o, through a norm over all of them (BitNet) or in pairs (DiffLlama).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from stages.compress.select import drawn
from stages.core.errors import Refusal
from stages.core.lazy import torch
from stages.core.schema import Seed
from stages.pruning.shape.anatomy import Part, attentions
from stages.pruning.shape.attention import NO_FEWER, Shape, check_apart, check_family, numbers, shape_of
from stages.pruning.shape.shrink import Cuts, columns, misfits, rows
from stages.pruning.shape.shrinker import Shrinker, change_bound, most_important, remaining

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel


class Heads(Shrinker):
    """Keep the same number of heads in every block, those of the highest importance."""

    method: Literal["heads"]
    importance: Literal["magnitude", "activation", "llm-bip", "random"]
    unit: Literal["groups", "queries"] = "groups"
    """What is removed: key and value heads with their query heads, or query heads, as many of each group."""
    remove: Annotated[float, Field(ge=0, lt=1)] | None = None
    """The share of the units that goes, of a group's query heads where these are removed; what is left is
    rounded up. Or:"""
    keep: Annotated[int, Field(ge=1)] | None = None
    """The number of query heads that is left."""
    seed: Seed | None = None
    """Of importance random."""

    @model_validator(mode="after")
    def _one_target(self) -> Self:
        if (self.remove is None) == (self.keep is None):
            raise ValueError("give exactly one of remove and keep")
        return self

    @property
    def refuses(self) -> Mapping[str, str]:
        """Families in which a head is the hidden size over the number of heads."""
        return dict.fromkeys(("opt", "gpt_neox", "gpt2"), f"{NO_FEWER}; remove neurons or blocks instead")

    def kept(self, shape: Shape) -> Shape:
        """The heads that are left.

        Raises:
            Refusal: they cannot be shared out evenly, or are more than there are, or none would go.
        """
        whole = self.unit == "groups"
        if not whole and shape.shared == 1:
            raise Refusal("every query head has keys and values of its own; remove them as unit: groups.")
        count, step = (shape.groups, shape.shared) if whole else (shape.shared, shape.groups)
        if self.keep is None:
            assert self.remove is not None
            left = remaining(count, self.remove, "groups" if whole else "query heads of a group")
        else:
            left = self.keep // step
            if self.keep % step or left > count:
                raise Refusal(
                    f"keep {self.keep} of {shape.queries} query heads ({shape.groups} groups of "
                    f"{shape.shared}): allowed with unit {self.unit} are "
                    f"{', '.join(str(step * n) for n in range(1, count + 1))}."
                )
        return Shape(left * step, left if whole else shape.groups, shape.size)

    def parts(self, model: PreTrainedModel) -> dict[str, Part]:
        """The attentions."""
        return attentions(model)

    def plan(
        self, model: PreTrainedModel, parts: Mapping[str, Part], loudness: Mapping[str, Tensor]
    ) -> tuple[Cuts, dict[str, int], dict[str, Any]]:
        """The heads kept of every block."""
        before = shape_of(model, next(iter(parts.values())))
        after = self.kept(before)
        notes = {"heads": {"before": before.queries, "after": after.queries}}
        if after == before:
            return {}, {}, notes
        check_family(model, next(iter(parts.values())), before, after, self._fewer(before))
        check_apart(model, parts, before)
        cuts: Cuts = {}
        told: dict[str, list[int]] = {}
        for name, part in parts.items():
            heads, groups = self._chosen(part, loudness.get(name), before, after, name)
            for one in part.readers:
                slices = {before.queries: heads, before.groups: groups}[one.weight.shape[0] // before.size]
                cuts |= rows(one, before.features(slices))
            cuts |= columns(part.writer, before.features(heads))
            told[name] = heads.tolist()
        if problems := misfits(model, cuts, numbers(model, after)):
            raise Refusal(f"{type(model).__name__} cannot lose heads: {next(iter(problems.values()))}.")
        return cuts, numbers(model, after), {"heads": {**notes["heads"], "kept": told}}

    def _fewer(self, shape: Shape) -> list[Shape]:
        """Every smaller number of heads that could be asked for."""
        if self.unit == "groups":
            return [Shape(n * shape.shared, n, shape.size) for n in range(1, shape.groups)]
        return [Shape(n * shape.groups, shape.groups, shape.size) for n in range(1, shape.shared)]

    def _chosen(
        self, part: Part, loudness: Tensor | None, before: Shape, after: Shape, name: str
    ) -> tuple[Tensor, Tensor]:
        """The query heads kept of a block, and its key and value heads, both ascending."""
        each = self.scores(part, loudness, before, name)
        if self.unit == "groups":
            groups = most_important(each, after.groups)
            inside = torch.arange(before.shared, device=groups.device)
            return (groups[:, None] * before.shared + inside).flatten(), groups
        kept = [
            most_important(scores, after.shared) + number * before.shared
            for number, scores in enumerate(each.view(before.groups, before.shared))
        ]
        return torch.cat(kept), torch.arange(before.groups, device=each.device)

    def scores(self, part: Part, loudness: Tensor | None, shape: Shape, name: str) -> Tensor:
        """The importance of the units of a block, `[groups]` or `[queries]` fp32.

        Args:
            loudness: `[queries * size]` fp32, the root mean square of what o is handed.
            name: of the block.
        """
        count = shape.groups if self.unit == "groups" else shape.queries
        if self.importance == "random":
            assert self.seed is not None
            return drawn(self.seed, name, count)
        writer = part.writer.weight.float()
        if self.importance == "magnitude":
            squares = writer.square().sum(0).view(count, -1).sum(1)
            for one in part.readers:
                # keys and values go with their group only
                if self.unit == "groups" or one.weight.shape[0] == part.width:
                    squares = squares + one.weight.float().square().sum(1).view(count, -1).sum(1)
            return squares.sqrt()
        assert loudness is not None
        if self.importance == "activation":
            return loudness.square().view(count, -1).sum(1).sqrt()
        return change_bound(writer, loudness).view(count, -1).sum(1)
