"""The heads of an attention: how many, how they share keys and values, and a model with fewer of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from stages.core.errors import Refusal
from stages.core.lazy import torch
from stages.pruning.shape.anatomy import Part, reach
from stages.pruning.shape.shrink import CONFIG, Cuts, keep_inputs, keep_outputs, misfits
from stages.pruning.shape.shrinker import most_important

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

NO_FEWER = "its config cannot describe fewer heads"
Unit = Literal["groups", "queries"]
"""What is removed: key and value heads with their query heads, or as many query heads of each group."""


@dataclass(frozen=True)
class HeadLayout:
    """The heads of an attention: how many for queries, how many for keys and values, features of each."""

    queries: int
    groups: int
    size: int

    @property
    def shared(self) -> int:
        """The number of query heads in a group."""
        return self.queries // self.groups

    def features(self, heads: Tensor) -> Tensor:
        """Return the features of these heads, in the order of `heads`, int64."""
        return (heads[:, None] * self.size + torch.arange(self.size, device=heads.device)).flatten()


def layout_of(model: PreTrainedModel, part: Part) -> HeadLayout:
    """Return the heads of every attention of a model, of which `part` is one.

    Where the config does not name the number of key and value heads, every query head has its own, if the
    linears are as wide as that.

    Raises:
        Refusal: blocks differ in their heads, or a linear holds keys and values that several query heads
            share, in an unknown order.
    """
    config: Any = model.config.get_text_config()
    heads = {"num_attention_heads", "num_key_value_heads", "head_dim"}
    by_block = heads & set(config.per_layer_attributes or ())
    if by_block:
        raise Refusal(
            f"{type(model).__name__} cannot lose heads: its config has {', '.join(sorted(by_block))} by "
            "block, and all blocks must have the same; remove neurons or blocks instead."
        )
    queries: int = config.num_attention_heads
    layout = HeadLayout(
        queries, getattr(config, "num_key_value_heads", None) or queries, part.width // queries
    )
    own = (part.width, 3 * part.width)  # q, k or v; or all three
    if layout.shared == 1 and any(reader.weight.shape[0] not in own for reader in part.readers):
        raise _fused(model, part, layout)
    return layout


def _fused(model: PreTrainedModel, part: Part, layout: HeadLayout) -> Refusal:
    """Return the refusal of linears that hold more than the heads of only q, k or v."""
    widths = (layout.queries * layout.size, layout.groups * layout.size)
    names = [reader.name for reader in part.readers if reader.weight.shape[0] not in widths]
    return Refusal(
        f"{type(model).__name__} cannot lose heads: {', '.join(names)} holds more than the heads of only q, "
        "k or v, in an unknown order; remove neurons or blocks instead."
    )


def head_settings(model: PreTrainedModel, layout: HeadLayout) -> dict[str, int]:
    """Return the numbers that describe these heads in the model's config."""
    config = model.config.get_text_config()
    settings = {"num_attention_heads": layout.queries}
    if not isinstance(getattr(type(config), "head_dim", None), property):  # derived from other numbers
        settings["head_dim"] = layout.size
    if hasattr(config, "num_key_value_heads"):
        settings["num_key_value_heads"] = layout.groups
    return settings


def check_heads(
    model: PreTrainedModel, part: Part, before: HeadLayout, after: HeadLayout, others: list[HeadLayout]
) -> None:
    """Refuse a model that cannot have the heads of `after`; say which numbers it can have, or why none.

    Args:
        part: the attention of one of its blocks.
        others: the layouts that a recipe could name instead.

    Raises:
        Refusal: the config cannot describe the heads, or a linear holds more than the heads of q, k or v.
    """
    family, name = type(model).__name__, f"{part.writer.name}.weight"

    def problem(layout: HeadLayout) -> str | None:
        """Return why the config cannot describe `layout`: its own error, or the shape o would have."""
        cuts = keep_inputs(part.writer, torch.arange(layout.queries * layout.size))
        problems = misfits(model, cuts, head_settings(model, layout))
        return problems.get(CONFIG) or problems.get(name)

    if why := problem(after):
        reasons = {layout: problem(layout) for layout in others}
        if allowed := [str(layout.queries) for layout, reason in reasons.items() if reason is None]:
            raise Refusal(
                f"{family} cannot have {after.queries} heads: {why}; allowed: {', '.join(allowed)}."
            )
        why = next((reason for reason in reasons.values() if reason and reason.startswith(name)), why)
        raise Refusal(f"{family} cannot lose heads: {NO_FEWER} of {before.size} features, with which {why}.")
    widths = (before.queries * before.size, before.groups * before.size)
    if any(reader.weight.shape[0] not in widths for reader in part.readers):
        raise _fused(model, part, before)


def check_apart(model: PreTrainedModel, parts: Mapping[str, Part], layout: HeadLayout) -> None:
    """Refuse a model whose heads depend on each other before o, where removing one would change the others.

    Args:
        parts: the attentions, by the full name of their block.

    Raises:
        Refusal: the heads of some linear depend on each other.
    """
    reaches = reach(model, parts, layout.size)
    for reader in (reader for part in parts.values() for reader in part.readers):
        # query heads reach only themselves, keys and values all heads of their group
        if reaches[reader.name] > layout.queries * layout.size**2 // reader.weight.shape[0]:
            raise Refusal(
                f"{type(model).__name__} cannot lose heads: the output of {reader.name} for the first head "
                "reaches others, as under a norm over all heads or with heads in pairs; remove neurons or "
                "blocks instead."
            )


def cut_heads(
    model: PreTrainedModel,
    parts: Mapping[str, Part],
    scores: Mapping[str, Tensor],
    before: HeadLayout,
    after: HeadLayout,
    unit: Unit,
) -> tuple[Cuts, dict[str, list[int]]]:
    """Return the cuts that leave the units with the highest scores in every attention, and the heads kept.

    Args:
        parts: the attentions, by the full name of their block.
        scores: `[groups]` or `[queries]`, by the same names.

    Raises:
        Refusal: the config cannot describe the heads, or heads depend on each other before o.
    """
    check_heads(model, next(iter(parts.values())), before, after, _smaller(before, unit))
    check_apart(model, parts, before)
    cuts: Cuts = {}
    kept: dict[str, list[int]] = {}
    for name, part in parts.items():
        heads, groups = _choose(scores[name], before, after, unit)
        by_count = {before.queries: heads, before.groups: groups}
        for reader in part.readers:
            chosen = by_count[reader.weight.shape[0] // before.size]
            cuts |= keep_outputs(reader, before.features(chosen))
        cuts |= keep_inputs(part.writer, before.features(heads))
        kept[name] = heads.tolist()
    if problems := misfits(model, cuts, head_settings(model, after)):
        raise Refusal(f"{type(model).__name__} cannot lose heads: {next(iter(problems.values()))}.")
    return cuts, kept


def _smaller(layout: HeadLayout, unit: Unit) -> list[HeadLayout]:
    """Return every layout with fewer heads that a recipe could name."""
    if unit == "groups":
        return [HeadLayout(n * layout.shared, n, layout.size) for n in range(1, layout.groups)]
    return [HeadLayout(n * layout.groups, layout.groups, layout.size) for n in range(1, layout.shared)]


def _choose(scores: Tensor, before: HeadLayout, after: HeadLayout, unit: Unit) -> tuple[Tensor, Tensor]:
    """Return the query heads that remain in a block, and its key and value heads, both ascending."""
    if unit == "groups":
        groups = most_important(scores, after.groups)
        inside = torch.arange(before.shared, device=groups.device)
        return (groups[:, None] * before.shared + inside).flatten(), groups
    heads = [
        most_important(of_group, after.shared) + number * before.shared
        for number, of_group in enumerate(scores.view(before.groups, before.shared))
    ]
    return torch.cat(heads), torch.arange(before.groups, device=scores.device)
