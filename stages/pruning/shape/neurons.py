"""The neurons of an MLP: cutting some out, and the setting of the config that says how many there are."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import fields
from typing import TYPE_CHECKING, Any

from stages.core.errors import Refusal
from stages.pruning.shape.anatomy import Part
from stages.pruning.shape.shrink import Cuts, keep_inputs, keep_outputs, misfits
from stages.pruning.shape.shrinker import most_important

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel


def cut_neurons(parts: Mapping[str, Part], scores: Mapping[str, Tensor], count: int) -> Cuts:
    """Return the cuts that leave the `count` neurons with the highest scores in every MLP.

    Args:
        parts: the MLPs, by the full name of their block.
        scores: `[width]`, by the same names.
    """
    cuts: Cuts = {}
    for name, part in parts.items():
        indices = most_important(scores[name], count)
        for reader in part.readers:
            cuts |= keep_outputs(reader, indices)
        cuts |= keep_inputs(part.writer, indices)
    return cuts


def width_setting(model: PreTrainedModel, cuts: Cuts, width: int, count: int) -> dict[str, int]:
    """Return the config's key for the width of the MLPs with `count`; nothing if the width does not change.

    It is found by trying the settings that are `width` now and then those that are unset, which a family
    derives.

    Raises:
        Refusal: no setting describes the cuts.
    """
    if count == width:
        return {}
    for key in _candidates(model.config.get_text_config(), width):
        if not misfits(model, cuts, {key: count}):
            return {key: count}
    raise Refusal(
        f"{type(model).__name__} cannot lose neurons: its config has no setting for the width of its MLPs "
        f"({width}) that affects nothing else."
    )


def _candidates(config: Any, width: int) -> Iterator[str]:
    by_block = config.per_layer_attributes or ()  # which raise when read
    settings = [field for field in fields(config) if field.name not in by_block]
    values = {field.name: getattr(config, field.name, None) for field in settings}
    yield from (key for key, value in values.items() if type(value) is int and value == width)
    integers = {field.name for field in settings if "int" in str(field.type)}
    yield from (key for key, value in values.items() if value is None and key in integers)
