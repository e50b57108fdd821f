"""The heads of an attention: how many, how they share keys and values, and whether there can be fewer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from stages.core.errors import Refusal
from stages.core.lazy import torch
from stages.pruning.shape.anatomy import Part, reach
from stages.pruning.shape.shrink import CONFIG, columns, misfits

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

NO_FEWER = "its config cannot say fewer heads"


@dataclass(frozen=True)
class Shape:
    """The heads of an attention: how many for queries, how many for keys and values, how wide each."""

    queries: int
    groups: int
    size: int

    @property
    def shared(self) -> int:
        """Query heads of a group."""
        return self.queries // self.groups

    def features(self, heads: Tensor) -> Tensor:
        """The features of these heads, in the order given, int64."""
        return (heads[:, None] * self.size + torch.arange(self.size, device=heads.device)).flatten()


def shape_of(model: PreTrainedModel, part: Part) -> Shape:
    """The heads of every attention of a model, given one."""
    config: Any = model.config.get_text_config()
    queries: int = config.num_attention_heads
    return Shape(queries, getattr(config, "num_key_value_heads", None) or queries, part.width // queries)


def numbers(model: PreTrainedModel, shape: Shape) -> dict[str, int]:
    """What a config must say of these heads."""
    config = model.config.get_text_config()
    said = {"num_attention_heads": shape.queries}
    if not isinstance(getattr(type(config), "head_dim", None), property):  # derived, it has no say
        said["head_dim"] = shape.size
    if hasattr(config, "num_key_value_heads"):
        said["num_key_value_heads"] = shape.groups
    return said


def check_family(
    model: PreTrainedModel, part: Part, before: Shape, after: Shape, possible: list[Shape]
) -> None:
    """Refuse a model that cannot have the heads of `after`, or any fewer, saying which.

    Args:
        part: the attention of one of its blocks.
        possible: what else could be asked for.

    Raises:
        Refusal: by the name of the family.
    """
    family, name = type(model).__name__, f"{part.writer.name}.weight"

    def problem(shape: Shape) -> str | None:
        """Why the config cannot say `shape`: its own words, or the size o would have."""
        kept = columns(part.writer, torch.arange(shape.queries * shape.size))
        told = misfits(model, kept, numbers(model, shape))
        return told.get(CONFIG) or told.get(name)

    if why := problem(after):
        reasons = {shape: problem(shape) for shape in possible}
        if fitting := [str(shape.queries) for shape, reason in reasons.items() if reason is None]:
            raise Refusal(
                f"{family} cannot have {after.queries} heads: {why}; allowed: {', '.join(fitting)}."
            )
        why = next((reason for reason in reasons.values() if reason and reason.startswith(name)), why)
        raise Refusal(f"{family} cannot lose heads: {NO_FEWER} of {before.size} features, with which {why}.")
    slices = (before.queries * before.size, before.groups * before.size)
    if fused := [one.name for one in part.readers if one.weight.shape[0] not in slices]:
        raise Refusal(
            f"{family} cannot lose heads: {', '.join(fused)} holds more than the heads of one of query, key "
            "and value, in an order of its own."
        )


def check_apart(model: PreTrainedModel, parts: Mapping[str, Part], shape: Shape) -> None:
    """Refuse a model whose heads reach each other before o, as without one the others would change.

    Args:
        parts: the attentions, by the full name of their block.

    Raises:
        Refusal: by the name of the family and of the linear whose heads are not apart.
    """
    far = reach(model, parts, shape.size)
    for one in (one for part in parts.values() for one in part.readers):
        # query heads reach themselves, keys and values all heads of their group
        if far[one.name] > shape.queries * shape.size**2 // one.weight.shape[0]:
            raise Refusal(
                f"{type(model).__name__} cannot lose heads: what {one.name} puts out for the first of them "
                "reaches others, as under a norm over all heads or with heads in pairs; remove neurons or "
                "blocks instead."
            )
