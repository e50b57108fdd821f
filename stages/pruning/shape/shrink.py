"""Making a model smaller: from kept indices to a plain checkpoint that says its new sizes.

Neurons and heads are slices of matrices. To remove one is to leave out its rows in the linears that make it
and its columns in the linear that reads it; the model that is left computes what the dense one would with
that column zeroed. It is a plain checkpoint if the family's config can say its sizes, and the proof is a
model built empty from the config: every parameter must have the shape of what is kept.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, TypeAlias

from stages.core.lazy import torch
from stages.model.blocks import Linear

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedConfig, PreTrainedModel

Cuts: TypeAlias = "dict[str, tuple[int, Tensor]]"
"""What is kept of parameters, by full name: the dimension, as stored, and the indices, ascending int64."""
CONFIG = "config"
"""Where `misfits` says what the config itself refuses."""


def rows(linear: Linear, indices: Tensor) -> Cuts:
    """Keep these outputs of a linear; its bias follows."""
    cuts = {f"{linear.name}.weight": (1 if linear.transposed else 0, indices)}
    return cuts | ({f"{linear.name}.bias": (0, indices)} if linear.module.bias is not None else {})


def columns(linear: Linear, indices: Tensor) -> Cuts:
    """Keep these inputs of a linear."""
    return {f"{linear.name}.weight": (0 if linear.transposed else 1, indices)}


def kept(tensor: Tensor, name: str, cuts: Cuts) -> Tensor:
    """What is kept of the parameter `name`, or of anything shaped like it."""
    if name not in cuts:
        return tensor
    dim, indices = cuts[name]
    return tensor.index_select(dim, indices.to(tensor.device)).contiguous()


def shrink(model: PreTrainedModel, cuts: Cuts, changes: Mapping[str, int]) -> None:
    """Cut the parameters of `model` and change its config, in place; it is then fit to be saved only."""
    for name in cuts:
        path, _, leaf = name.rpartition(".")
        module = model.get_submodule(path)
        tensor = kept(module.get_parameter(leaf).data, name, cuts)
        module._parameters[leaf] = torch.nn.Parameter(tensor, requires_grad=False)
    model.config = copy.deepcopy(model.config)  # whoever made the model may hold on to it
    for key, value in changes.items():
        setattr(model.config.get_text_config(), key, value)


def misfits(model: PreTrainedModel, cuts: Cuts, changes: Mapping[str, int]) -> dict[str, str]:
    """What a model built from the changed config would have in other shapes than what is kept.

    Returns:
        A clause a parameter, by full name; or why there is no such model, by `CONFIG`. An empty dict is the
        proof that the config can say the smaller model.
    """
    from huggingface_hub.errors import StrictDataclassError

    try:
        shapes = _shapes(_changed(model, changes))
    except (ValueError, StrictDataclassError) as error:
        return {CONFIG: " ".join(str(error).split()).rstrip(".")}
    told = {}
    for name, parameter in model.named_parameters():
        wanted = list(parameter.shape)
        if name in cuts:
            wanted[cuts[name][0]] = len(cuts[name][1])
        if list(shapes.get(name, ())) != wanted:
            told[name] = f"{name} would be {list(shapes.get(name, ()))} and not {wanted}"
    return told


def _changed(model: PreTrainedModel, changes: Mapping[str, int]) -> PreTrainedConfig:
    """A copy of the config with other numbers, checked as if it were read from a file."""
    config: Any = copy.deepcopy(model.config)
    config.__dict__.pop("quantization_config", None)
    for key, value in changes.items():
        setattr(config.get_text_config(), key, value)
    made: PreTrainedConfig = type(config).from_dict(config.to_dict())
    return made


def _shapes(config: PreTrainedConfig) -> dict[str, torch.Size]:
    from accelerate import init_empty_weights  # type: ignore[import-untyped]
    from transformers import AutoModelForCausalLM

    with init_empty_weights():
        model = AutoModelForCausalLM.from_config(config)
    return {name: parameter.shape for name, parameter in model.state_dict().items()}
