"""The names of a model's parameters in its files, which some families store under other names.

`Gemma3ForConditionalGeneration` has `model.language_model.layers.0...` and stores `language_model.model...`.
transformers renames when it loads and when it saves; both directions are taken from there, so no family is
named here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from stages.core.errors import Refusal

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel


def naming(model: PreTrainedModel) -> Callable[[str], tuple[str, bool]]:
    """Return the function from a tensor's name in a file to the parameter that loading makes of it.

    It returns the parameter's name, and whether the tensor is only a part of it or holds several (a mixture's
    experts are stored apart, gate and up of some families in one).
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

    mapping = get_model_conversion_mapping(model)
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    prefix, parameters = model.base_model_prefix, model.state_dict()

    def in_model(name: str) -> tuple[str, bool]:
        renamed, converter = rename_source_key(name, renamings, converters, prefix, parameters)
        if renamed not in parameters and name in parameters:  # a renaming that is not for this tensor
            renamed, converter = rename_source_key(name, [], [], prefix, parameters)
        return renamed, converter is not None

    return in_model


def as_stored(
    model: PreTrainedModel, tensors: Mapping[str, Tensor], *, packed: bool = False
) -> dict[str, Tensor]:
    """Return `tensors`, named as in the model, as a checkpoint's files hold them.

    Args:
        packed: whether linears of the checkpoint are packed. Transformers then takes each part of a split
            tensor (a mixture's experts) for packed as well, so such tensors stay whole, under their names in
            the model, which it loads too.
    """
    from transformers.core_model_loading import revert_weight_conversion

    if not packed:
        return dict(revert_weight_conversion(model, dict(tensors)))
    stored: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        parts = revert_weight_conversion(model, {name: tensor})
        renamed = [part is tensor for part in parts.values()] == [True]
        stored |= parts if renamed else {name: tensor}
    return stored


def check_names(label: str, model: PreTrainedModel) -> None:
    """Refuse a model whose parameters would not be read again from the names they are stored under.

    Args:
        label: the checkpoint's name in a refusal.

    Raises:
        Refusal: some tensor, as it would be stored, is not read as a parameter of its shape.
    """
    parameters = {name: parameter.detach().to("meta") for name, parameter in model.named_parameters()}
    in_model, lost = naming(model), []
    for key, tensor in as_stored(model, parameters).items():
        name, converted = in_model(key)
        if not converted and (name not in parameters or parameters[name].shape != tensor.shape):
            lost.append(key)
    if lost:
        raise Refusal(
            f"{label}: transformers stores tensors of {type(model).__name__} under names that it does not "
            f"read again ({', '.join(lost[:4])}), so no result could be written; use another checkpoint of "
            "the model, such as its text model alone."
        )
