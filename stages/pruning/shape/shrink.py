"""A smaller model from indices to keep: a plain checkpoint with its new sizes in the config.

Neurons and heads are slices of matrices. To remove one, its rows in the linears that compute it and its
columns in the linear that reads it are cut out; the remaining model computes what the dense one would with
those columns zeroed. It is a plain checkpoint if the family's config can describe its sizes, which is checked
with an empty model built from the config: every parameter must have the shape that is left after the cut.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, TypeAlias

from stages.core.lazy import torch
from stages.model.artifact import as_written
from stages.model.blocks import Linear

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedConfig, PreTrainedModel

Cuts: TypeAlias = "dict[str, tuple[int, Tensor]]"
"""By a parameter's full name: the dimension to cut, as stored, and the indices to keep, ascending int64."""
CONFIG = "config"
"""The key under which `misfits` has the reason why the config is refused."""


def keep_outputs(linear: Linear, indices: Tensor) -> Cuts:
    """Return the cuts that keep these outputs of a linear, in its bias as well."""
    cuts = {f"{linear.name}.weight": (1 if linear.transposed else 0, indices)}
    return cuts | ({f"{linear.name}.bias": (0, indices)} if linear.module.bias is not None else {})


def keep_inputs(linear: Linear, indices: Tensor) -> Cuts:
    """Return the cuts that keep these inputs of a linear."""
    return {f"{linear.name}.weight": (0 if linear.transposed else 1, indices)}


def cut(tensor: Tensor, name: str, cuts: Cuts) -> Tensor:
    """Cut the parameter `name`, or a tensor of its shape."""
    if name not in cuts:
        return tensor
    dim, indices = cuts[name]
    return tensor.index_select(dim, indices.to(tensor.device)).contiguous()


def shrink(model: PreTrainedModel, cuts: Cuts, changes: Mapping[str, int]) -> None:
    """Cut the parameters of `model` and change its config, in place; afterwards it can only be saved."""
    for name in cuts:
        path, _, leaf = name.rpartition(".")
        module = model.get_submodule(path)
        tensor = cut(module.get_parameter(leaf).data, name, cuts)
        module._parameters[leaf] = torch.nn.Parameter(tensor, requires_grad=False)
    model.config = copy.deepcopy(model.config)  # the old one may be shared with another model
    for key, value in changes.items():
        setattr(model.config.get_text_config(), key, value)


def misfits(model: PreTrainedModel, cuts: Cuts, changes: Mapping[str, int]) -> dict[str, str]:
    """Compare the shapes of a model built from the changed config with those after the cuts.

    Returns:
        For each parameter that differs a clause, by full name; or why no model can be built, under `CONFIG`.
        An empty dict proves that the config can describe the smaller model.
    """
    from huggingface_hub.errors import StrictDataclassError

    try:
        shapes = _shapes(_changed(model, changes))
    except (ValueError, StrictDataclassError) as error:
        return {CONFIG: " ".join(str(error).split()).rstrip(".")}
    differences = {}
    for name, parameter in model.named_parameters():
        wanted = list(parameter.shape)
        if name in cuts:
            wanted[cuts[name][0]] = len(cuts[name][1])
        if list(shapes.get(name, ())) != wanted:
            differences[name] = f"{name} would be {list(shapes.get(name, ()))} instead of {wanted}"
    return differences


def _changed(model: PreTrainedModel, changes: Mapping[str, int]) -> PreTrainedConfig:
    """Return a copy of the config with other numbers, written and read again."""
    config: Any = copy.deepcopy(model.config)
    config.__dict__.pop("quantization_config", None)
    for key, value in changes.items():
        setattr(config.get_text_config(), key, value)
    return as_written(config)


def _shapes(config: PreTrainedConfig) -> dict[str, torch.Size]:
    from accelerate import init_empty_weights  # type: ignore[import-untyped]
    from transformers import AutoModelForCausalLM

    with init_empty_weights():
        model = AutoModelForCausalLM.from_config(config)
    return {name: parameter.shape for name, parameter in model.state_dict().items()}
